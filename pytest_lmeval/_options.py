"""The options of the command line, and their ini twins."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_lmeval.errors import LmevalError, nearest

OPTIONS: dict[str, tuple[Any, str]] = {  # name -> (default, help); every one is an ini option of the same name too
    "lm": (["demo"], "model to evaluate: demo, zoo:NAME, hf:ID_OR_FOLDER or module.path:callable (repeatable)"),
    "lmeval-device": ("auto", "auto, cpu, cuda, cuda:N or mps"),
    "lmeval-bits": ("", "precision of the weights where the spec names none: 32, 16, 8 or 4"),
    "lmeval-seq-len": ([], "sequence length of training and of speed tests (repeatable)"),
    "lmeval-corpus": ([], "text to train and compare on: stdlib, wikitext-2, text:PATH, ... (repeatable)"),
    "lmeval-limit": ("", "examples of a task, documents of a corpus that is read by document"),
    "lmeval-tokens": ("", "tokens of a stream; 200k and 1M read too"),
    "lmeval-profile": ("", "how hard to look for broken laws: dev, ci (the default where CI is set) or nightly"),
    "lmeval-budget": ("", "seconds that probing the laws of a model may take (default 2; nightly: 120)"),
    "lmeval-templates": ("", "folder of templates that extend those of the reports block by block"),
    "lmeval-data": ("", "local mirror that is used instead of the hub: DIR/<hub id>/<config>/<split>.parquet or .jsonl"),
    "lmeval-dir": (".lmeval", "folder for all output"),
    "lmeval-baseline": ("", "file of numbers that this run is compared with; a test whose numbers got worse fails"),
    "lmeval-gate": ("fail", "what a number that got worse does: fail its test, warn (it is only shown), or off"),
    "lmeval-trust-remote-code": ([], "hub id of a model that may run code of its own (repeatable)"),
}
SEQ_LENS = ["128", "512"]
CORPORA = ["stdlib", "automaton"]
PROFILES = ("dev", "ci", "nightly")  # those of `laws._profiles`, which would import torch
DEVICES = ("auto", "cpu", "cuda", "mps")  # what `models._sources` resolves, which would too


def add(parser: pytest.Parser) -> None:
    group = parser.getgroup("lmeval", "evaluations of language models")
    for name, (default, text) in OPTIONS.items():
        repeatable = isinstance(default, list)
        group.addoption(f"--{name}", action="append" if repeatable else "store", default=None, help=text)
        kind: Literal["args", "string"] = "args" if repeatable else "string"
        parser.addini(_dest(name), text, type=kind, default=default)
    group.addoption(
        "--lmeval-fresh",
        action="store_true",
        default=False,
        help="compute everything anew: do not go on from an interrupted run",
    )
    parser.addini("lmeval_fresh", "compute everything anew", type="bool", default=False)


def option(config: pytest.Config, name: str) -> Any:
    """The value of --NAME, or of its ini twin."""
    value = config.getoption(_dest(name))
    return config.getini(_dest(name)) if value in (None, [], False) else value


def count(config: pytest.Config, name: str) -> int | None:
    """A number option: 500, 200k, 1M; None if it was not given."""
    text = str(option(config, name)).strip()
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.replace("_", ""))
    value = round(float(match[1]) * {"": 1, "k": 1000, "m": 1_000_000}[match[2].lower()]) if match else 0
    if value < 1:
        raise pytest.UsageError(f"--{name} takes a positive number such as 500, 200k or 1M; got {text!r}.")
    return value


def budget(config: pytest.Config) -> float | None:
    """Seconds of --lmeval-budget; None if it was not given."""
    text = str(option(config, "lmeval-budget")).strip()
    try:
        seconds = float(text) if text else None
    except ValueError:
        seconds = -1.0
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise pytest.UsageError(f"--lmeval-budget takes seconds such as 2 or 0.5; got {text!r}.")
    return seconds


def check(config: pytest.Config) -> None:
    """Raises UsageError, before tests are collected, for an option that makes no sense or names something that is not there."""
    for name in ("lmeval-limit", "lmeval-tokens"):
        count(config, name)
    for text in option(config, "lmeval-seq-len"):
        if not (str(text).isdigit() and int(text) > 0):
            raise pytest.UsageError(f"--lmeval-seq-len takes a positive number; got {text!r}.")
    budget(config)
    if (profile := str(option(config, "lmeval-profile"))) not in ("", *PROFILES):
        raise pytest.UsageError(f"--lmeval-profile takes dev, ci or nightly; got {profile!r}.{nearest(profile, PROFILES)}")
    if (gate := str(option(config, "lmeval-gate"))) not in ("fail", "warn", "off"):
        raise pytest.UsageError(f"--lmeval-gate takes fail, warn or off; got {gate!r}.")
    if bits := str(option(config, "lmeval-bits")):
        from pytest_lmeval.models._specs import BITS

        if bits not in map(str, BITS):
            raise pytest.UsageError(f"--lmeval-bits takes {', '.join(map(str, BITS))}; got {bits!r}.")
    if (folder := templates_folder(config)) and not folder.is_dir():
        raise pytest.UsageError(f"--lmeval-templates names no folder: {folder}")
    if not is_worker(config):  # the process that started it has checked the same
        _check_names(config)


def _check_names(config: pytest.Config) -> None:
    """Refuse models, corpora and devices that are not there. Only what was given is looked up."""
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
    """`--lmeval-dir`, from where pytest was started; an ini value, from the ini file's folder."""
    if given := config.getoption("lmeval_dir"):
        return config.invocation_params.dir / str(given)
    return config.rootpath / str(config.getini("lmeval_dir"))


def test_id(nodeid: str) -> str:
    """The name of a test without the `@group` that xdist appends."""
    return nodeid.rpartition("@")[0] if re.search(r"@[\w-]+$", nodeid) and "[" not in nodeid.rpartition("@")[2] else nodeid


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is one of xdist's workers."""
    return hasattr(config, "workerinput")


def templates_folder(config: pytest.Config) -> Path | None:
    """`--lmeval-templates`, from where pytest was started; an ini value, from the ini file's folder; None if not given."""
    given = config.getoption("lmeval_templates")
    named = given or config.getini("lmeval_templates")
    return (config.invocation_params.dir if given else config.rootpath) / str(named) if named else None


def _dest(name: str) -> str:
    return name.replace("-", "_")
