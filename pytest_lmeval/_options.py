"""Define, read and check the command line's options and the ini options of the same names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_lmeval.errors import LmevalError, nearest
from pytest_lmeval.records._share import WHOLE, Share, parsed

OPTIONS: dict[str, tuple[Any, str]] = {  # name -> (default, help)
    "lm": (["demo"], "model to evaluate: demo, zoo:NAME, hf:ID_OR_FOLDER, server:URL or module.path:callable (repeatable)"),
    "lmeval-device": ("auto", "auto, cpu, cuda, cuda:N or mps"),
    "lmeval-bits": ("", "precision of the weights where the spec names none: 32, 16, 8 or 4"),
    "lmeval-seq-len": ([], "sequence length of training and of speed tests (repeatable)"),
    "lmeval-corpus": ([], "text to train and compare on: stdlib, wikitext-2, text:PATH, ... (repeatable)"),
    "lmeval-limit": ("", "examples of a task, documents of a corpus that is read by document"),
    "lmeval-tokens": ("", "tokens of a stream; 200k and 1M read too"),
    "lmeval-batch": ("", "rows of a batch of questions, 8 by default; auto: as many as fit into the memory"),
    "lmeval-concurrency": ("", "requests to a server under way at once, 8 by default"),
    "lmeval-chat": ("auto", "ask tasks in turns, by the chat template of the model: auto (generated answers only), on or off"),
    "lmeval-chat-template-kwargs": ("", 'keywords of the chat template, as JSON: {"enable_thinking": false}'),
    "lmeval-profile": ("", "how hard to look for broken laws: dev, ci (the default where CI is set) or nightly"),
    "lmeval-budget": (
        "",
        "tokens that the probe of a model's laws may read beyond their floors, such as 200k; 0: prove nothing",
    ),
    "lmeval-templates": ("", "folder of templates that extend those of the reports block by block"),
    "lmeval-data": ("", "local mirror to use instead of the hub: DIR/<hub id>/<config>/<split>.parquet, .jsonl, .json or .csv"),
    "lmeval-shard": ("", "I/N: score one share of N of the examples; `lmeval merge` joins the output of all"),
    "lmeval-dir": (".lmeval", "folder for all output"),
    "lmeval-baseline": ("", "file of numbers to compare this run with; a test whose numbers got worse fails"),
    "lmeval-gate": ("fail", "on a number that got worse: fail its test, warn, or off"),
    "lmeval-fresh": (False, "compute everything anew: do not resume an interrupted run"),
    "lmeval-fresh-evidence": (False, "forget what earlier runs have tried of a model's laws"),
    "lmeval-trust-remote-code": ([], "hub id of a model that may run its own code (repeatable)"),
}
LEAST_BUDGET = 1000  # tokens; fewer are taken for seconds
SEQ_LENS = ["128", "512"]
CORPORA = ["stdlib", "automaton"]
DEVICES = ("auto", "cpu", "cuda", "mps")  # those of `models._sources`, which imports torch
CHOICES = {  # an empty one: not given
    "lmeval-profile": ("", "dev", "ci", "nightly"),  # those of `laws._run_probe`, which imports torch
    "lmeval-gate": ("fail", "warn", "off"),
    "lmeval-chat": ("auto", "on", "off"),
    "lmeval-bits": ("", "32", "16", "8", "4"),
}


def add(parser: pytest.Parser) -> None:
    group = parser.getgroup("lmeval", "evaluations of language models")
    for name, (default, text) in OPTIONS.items():
        action = {list: "append", bool: "store_true", str: "store"}[type(default)]
        group.addoption(f"--{name}", action=action, default=None, help=text)
        kind: Any = {list: "args", bool: "bool", str: "string"}[type(default)]
        parser.addini(_dest(name), text, type=kind, default=default)


def option(config: pytest.Config, name: str) -> Any:
    """The value of --NAME, or of its ini option."""
    value = config.getoption(_dest(name))
    return config.getini(_dest(name)) if value in (None, [], False) else value


def count(config: pytest.Config, name: str) -> int | None:
    """The number of an option: 500, 200k, 1M; None if it is not given."""
    text = str(option(config, name)).strip()
    if not text:
        return None
    value = _number(text)
    if value is None or value < 1:
        raise pytest.UsageError(f"--{name} takes a positive number such as 500, 200k or 1M; got {text!r}.")
    return value


def _number(text: str) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.replace("_", ""))
    return round(float(match[1]) * {"": 1, "k": 1000, "m": 1_000_000}[match[2].lower()]) if match else None


def batch(config: pytest.Config) -> int | Literal["auto"] | None:
    """Rows of --lmeval-batch; None if it is not given."""
    text = str(option(config, "lmeval-batch")).strip()
    if text == "auto":
        return "auto"
    if text and not (text.isdigit() and int(text) > 0):
        raise pytest.UsageError(f"--lmeval-batch takes a positive number or auto; got {text!r}.{nearest(text, ['auto'])}")
    return int(text) if text else None


def chat(config: pytest.Config) -> Literal["auto"] | bool:
    """Whether --lmeval-chat asks tasks in turns."""
    given: dict[str, Literal["auto"] | bool] = {"auto": "auto", "on": True, "off": False}
    return given[str(option(config, "lmeval-chat"))]


def share(config: pytest.Config) -> Share:
    """The share of the examples that --lmeval-shard names; the whole if it is not given."""
    text = str(option(config, "lmeval-shard")).strip()
    try:
        return parsed(text) if text else WHOLE
    except LmevalError as error:
        raise pytest.UsageError(f"--lmeval-shard: {error}") from None


def template_kwargs(config: pytest.Config) -> dict[str, Any]:
    """The keywords of --lmeval-chat-template-kwargs."""
    text = str(option(config, "lmeval-chat-template-kwargs")).strip()
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise pytest.UsageError(
            f"--lmeval-chat-template-kwargs takes a JSON object of keywords, in quotes that the shell keeps; got {text!r}: "
            """--lmeval-chat-template-kwargs='{"enable_thinking": false}'."""
        )
    return found


def budget(config: pytest.Config) -> int | None:
    """Tokens of --lmeval-budget; None if it is not given. Refuses what looks like seconds."""
    text = str(option(config, "lmeval-budget")).strip()
    tokens = _number(text) if text else None
    if text and text != "0" and (tokens is None or tokens < LEAST_BUDGET or ("." in text and text[-1:].isdigit())):
        raise pytest.UsageError(
            f"--lmeval-budget is a number of tokens, not of seconds, so that a busy machine proves as much as an idle one; got "
            f"{text!r}. Write 200k to let the probe read 200,000 tokens beyond the floors of the laws, 0 to prove nothing (the "
            "verdict is then `unproven`, and everything is read the slow, safe way), or leave it out."
        )
    return tokens


def check(config: pytest.Config) -> None:
    """Raise UsageError, before tests are collected, for an option that makes no sense or names nothing that exists."""
    for name in ("lmeval-limit", "lmeval-tokens", "lmeval-concurrency"):
        count(config, name)
    for text in option(config, "lmeval-seq-len"):
        if not (str(text).isdigit() and int(text) > 0):
            raise pytest.UsageError(f"--lmeval-seq-len takes a positive number; got {text!r}.")
    budget(config)
    batch(config)
    share(config)
    template_kwargs(config)
    for name, choices in CHOICES.items():
        if (given := str(option(config, name))) not in choices:
            *others, last = filter(None, choices)
            raise pytest.UsageError(f"--{name} takes {', '.join(others)} or {last}; got {given!r}.{nearest(given, choices)}")
    if (folder := templates_folder(config)) and not folder.is_dir():
        raise pytest.UsageError(f"--lmeval-templates names no folder: {folder}")
    if not is_worker(config):  # the process that started a worker has checked the same
        _check_names(config)


def _check_names(config: pytest.Config) -> None:
    """Refuse models, corpora and devices that do not exist. Looks up only what is given."""
    if (specs := option(config, "lm")) != OPTIONS["lm"][0]:
        from pytest_lmeval.models._specs import check as check_spec

        folders = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
        folders = [folder if folder.is_dir() else folder.parent for folder in folders]
        _refuse("lm", specs, lambda spec: check_spec(spec, folders))
    if (mirror := str(option(config, "lmeval-data") or "")) and not os.path.isdir(os.path.expanduser(mirror)):
        raise pytest.UsageError(f"--lmeval-data names no folder: {mirror}")
    if corpora := option(config, "lmeval-corpus"):
        from pytest_lmeval.data import check as check_corpus

        _refuse("lmeval-corpus", corpora, check_corpus)
    if (device := str(option(config, "lmeval-device"))) not in ("auto", "cpu"):
        if not re.fullmatch(r"cuda(:\d+)?|mps", device):
            near = nearest(device, DEVICES)
            raise pytest.UsageError(f"--lmeval-device takes auto, cpu, cuda, cuda:N or mps; got {device!r}.{near}")
        from pytest_lmeval.models._sources import resolve_device

        _refuse("lmeval-device", [device], resolve_device)


def _refuse(name: str, values: list[str], check_one: Callable[[str], object]) -> None:
    for value in values:
        try:
            check_one(value)
        except LmevalError as error:
            raise pytest.UsageError(f"--{name}: {error}") from None


def output_folder(config: pytest.Config) -> Path:
    return _folder(config, "lmeval-dir") or config.rootpath


def templates_folder(config: pytest.Config) -> Path | None:
    return _folder(config, "lmeval-templates")


def _folder(config: pytest.Config, name: str) -> Path | None:
    """The folder of --NAME, relative to where pytest was started, or of its ini option, relative to the ini file; or None."""
    given = config.getoption(_dest(name))
    named = given or config.getini(_dest(name))
    return (config.invocation_params.dir if given else config.rootpath) / str(named) if named else None


def test_id(nodeid: str) -> str:
    """The node id of a test without the `@group` that xdist appends."""
    return nodeid.rpartition("@")[0] if re.search(r"@[\w-]+$", nodeid) and "[" not in nodeid.rpartition("@")[2] else nodeid


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is one of xdist's workers."""
    return hasattr(config, "workerinput")


def _dest(name: str) -> str:
    return name.replace("-", "_")
