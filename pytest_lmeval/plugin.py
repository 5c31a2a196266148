"""The doors of the plugin: options, fixtures, hooks. What they open lies elsewhere, and is imported when it is used.

This module is loaded in every pytest run where the package is installed, so it imports pytest and the
standard library only; a test holds it to that.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from pytest_lmeval.data.corpus import Corpus
    from pytest_lmeval.lm import Model
    from pytest_lmeval.session import Session
    from pytest_lmeval.verbs import Lmeval

OPTIONS: dict[str, tuple[Any, str]] = {  # name -> (default, help); every one is an ini option of the same name too
    "lm": (["demo"], "model to evaluate: demo, zoo:NAME, hf:ID_OR_FOLDER or module.path:callable (repeatable)"),
    "lmeval-device": ("auto", "auto, cpu, cuda, cuda:N or mps"),
    "lmeval-bits": ("", "precision of the weights where the spec names none: 32, 16, 8 or 4"),
    "lmeval-seq-len": ([], "sequence length of speed tests (repeatable)"),
    "lmeval-limit": ("", "examples of a task, documents of a corpus that is read by document"),
    "lmeval-tokens": ("", "tokens of a stream; 200k and 1M read too"),
    "lmeval-data": ("", "local mirror that is used instead of the hub: DIR/<hub id>/<config>/<split>.parquet or .jsonl"),
    "lmeval-dir": (".lmeval", "folder for all output"),
    "lmeval-trust-remote-code": ([], "hub id of a model that may run code of its own (repeatable)"),
}
SESSION = pytest.StashKey["Session"]()
SEQ_LENS = ["128", "512"]
LOG = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
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


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lmeval: an evaluation (added to every test that uses the fixture lmeval)")
    for name in ("lmeval-limit", "lmeval-tokens"):
        count(config, name)
    for text in option(config, "lmeval-seq-len"):
        if not (str(text).isdigit() and int(text) > 0):
            raise pytest.UsageError(f"--lmeval-seq-len takes a positive number; got {text!r}.")
    if str(option(config, "lmeval-bits")) not in ("", "32", "16", "8", "4"):
        raise pytest.UsageError(f"--lmeval-bits takes 32, 16, 8 or 4; got {option(config, 'lmeval-bits')!r}.")
    if not _is_worker(config):
        config.pluginmanager.register(Reports(config), "lmeval-reports")
    config.pluginmanager.register(_fixtures_with_parameters(config), "lmeval-parameters")
    if not any(config.pluginmanager.hasplugin(name) for name in ("benchmark", "codspeed")):
        config.addinivalue_line("markers", "benchmark: a benchmark (pytest-benchmark is not active)")
        config.pluginmanager.register(WithoutBenchmark(), "lmeval-without-benchmark")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "lmeval" in getattr(item, "fixturenames", ()):
            item.add_marker("lmeval")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Before the first test: is there work to record, and can its results be written?"""
    config = session.config
    if (
        not config.option.collectonly
        and not _is_worker(config)
        and any(item.get_closest_marker("lmeval") for item in session.items)
    ):
        _check_output_folder(config)


def _check_output_folder(config: pytest.Config) -> None:
    from pytest_lmeval.results.journal import check_writable

    folder = output_folder(config)
    try:
        check_writable(folder)
    except OSError as error:
        raise pytest.UsageError(
            f"nothing can be written to the output folder {folder} ({error.strerror or error}), so every result of this "
            "run would be lost. Choose another one with --lmeval-dir."
        ) from error


# ---------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Any:
    """The torch device of `--lmeval-device`."""
    from pytest_lmeval.adapters import resolve_device

    return expected_errors(lambda: resolve_device(str(option(pytestconfig, "lmeval-device"))))


@pytest.fixture(scope="session")
def load_lm(pytestconfig: pytest.Config, device: Any) -> Callable[[str], Model]:
    """A function from a model spec to the model, loaded once a session.

    def test_two_models_agree(load_lm):
        small, large = load_lm("demo"), load_lm("hf:./checkpoint@bf16")
    """
    from pytest_lmeval.adapters import load

    loaded: dict[str, Model] = {}
    bits = option(pytestconfig, "lmeval-bits")
    trusted = option(pytestconfig, "lmeval-trust-remote-code")

    def load_once(spec: str) -> Model:
        __tracebackhide__ = True
        if spec not in loaded:
            trust = spec.removeprefix("hf:").partition("@")[0] in trusted
            loaded[spec] = expected_errors(
                lambda: load(spec, device=device, bits=int(bits) if bits else None, trust_remote_code=trust)
            )
        return loaded[spec]

    return load_once


@pytest.fixture(scope="session")
def corpus(pytestconfig: pytest.Config) -> Callable[..., Corpus]:
    """A function from a corpus name and split to the corpus.

    def test_reads(lmeval, lm, corpus):
        lmeval.perplexity(lm, corpus("wikitext-2", "test"))
    """
    from pytest_lmeval import data

    mirror = option(pytestconfig, "lmeval-data") or None

    def named(name: str = "stdlib", split: str = "test") -> Corpus:
        __tracebackhide__ = True
        found: Corpus = expected_errors(lambda: data.corpus(name, split, data_dir=mirror))
        return found

    return named


@pytest.fixture
def lmeval(request: pytest.FixtureRequest) -> Lmeval:
    """What a test measures with; every call is recorded under the test's name.

    def test_reads_easily(lmeval, lm, corpus):
        assert lmeval.perplexity(lm, corpus("stdlib", "test")).perplexity < 6
    """
    from pytest_lmeval.session import TestLog
    from pytest_lmeval.verbs import Lmeval

    log = TestLog(_test_id(request.node.nodeid))
    request.node.stash[LOG] = log
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    return Lmeval(shared_session(request.config), log, benchmark)


def _fixtures_with_parameters(config: pytest.Config) -> ModuleType:
    """Fixtures whose parameters are options. A single value is no parameter: the names of tests stay as they are, and
    two runs with different models can be compared test by test."""

    @pytest.fixture(scope="session", params=_parameters(option(config, "lm")))
    def lm(request: pytest.FixtureRequest, load_lm: Callable[[str], Model]) -> Model:
        """The model under test: that of `--lm`. Define a fixture `lm` of your own to test a model of your own."""
        return load_lm(_parameter(request, option(request.config, "lm")))

    @pytest.fixture(scope="session", params=_parameters(option(config, "lmeval-seq-len") or SEQ_LENS))
    def seq_len(request: pytest.FixtureRequest) -> int:
        """The sequence lengths of `--lmeval-seq-len`, one after the other; 128 and 512 by default."""
        return int(_parameter(request, option(request.config, "lmeval-seq-len") or SEQ_LENS))

    module = ModuleType("lmeval_parameters")
    module.lm, module.seq_len = lm, seq_len  # type: ignore[attr-defined]
    return module


def _parameters(values: list[str]) -> list[str] | None:
    return values if len(values) > 1 else None


def _parameter(request: pytest.FixtureRequest, values: list[str]) -> Any:
    return getattr(request, "param", values[0] if values else None)


class WithoutBenchmark:
    """Stands in for pytest-benchmark where it is blocked, so that tests that ask for `benchmark` still run."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    @pytest.fixture(name="benchmark")
    def benchmark_fixture(self) -> WithoutBenchmark:
        return WithoutBenchmark()

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def pedantic(
        self, target: Callable[..., Any], args: Any = (), kwargs: Any = None, rounds: int = 1, warmup_rounds: int = 0, **_: Any
    ) -> Any:
        for _round in range(warmup_rounds + rounds - 1):
            target(*args, **(kwargs or {}))
        return target(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------------------------- reports


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """A test that looks at a time that could not be taken says nothing about the model: it is skipped, with the reason."""
    try:
        return (yield)
    except Exception as error:
        if type(error).__name__ == "NotMeasuredError":
            pytest.skip(str(error))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "call" and (log := item.stash.get(LOG, None)) is not None:
        report._lmeval = json.dumps(log.to_json())  # one string: it crosses from an xdist worker unharmed
    return report


class Reports:
    """Gathers the records of all tests, from workers too, and writes the reports. Lives where the terminal is."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.started = config, time.time()
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.keys: set[str] = set()
        self.written: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        folder = output_folder(self.config)
        if option(self.config, "lmeval-fresh") and not self.config.option.collectonly and (folder / "journal.jsonl").exists():
            from pytest_lmeval.results.journal import Journal

            Journal(folder, fresh=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if content := getattr(report, "_lmeval", None):
            log = json.loads(content)
            self.records += [{**record, "outcome": report.outcome} for record in log["records"]]
            self.notes += log["notes"]
            self.keys.update(log["keys"])

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if not self.records:
            return
        from pytest_lmeval.report import write

        folder = output_folder(self.config)
        run = {"started": self.started, "command": self.config.invocation_params.args, "exit_status": int(exitstatus)}
        self.written = write.reports(folder, self.records, run=run, root=self.config.rootpath)
        if exitstatus not in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            from pytest_lmeval.results.journal import Journal

            Journal(folder).end(self.keys)  # this run came to its end: the next one measures anew

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.records or self.config.get_verbosity() < -1:
            return
        from pytest_lmeval.report import terminal

        terminalreporter.section("lmeval")
        for line in terminal.lines(self.records, width=terminalreporter._tw.fullwidth):
            terminalreporter.write_line(line)
        for line in (*self.notes, *self.written):
            terminalreporter.write_line(line)


def output_folder(config: pytest.Config) -> Path:
    """`--lmeval-dir`, from where pytest was started; an ini value, from the ini file's folder."""
    if given := config.getoption("lmeval_dir"):
        return config.invocation_params.dir / str(given)
    return config.rootpath / str(config.getini("lmeval_dir"))


def shared_session(config: pytest.Config) -> Session:
    """The session object of this process, made when the first test needs it."""
    if SESSION not in config.stash:
        from pytest_lmeval.session import Session

        if _is_worker(config):  # the process with the terminal has no tests of its own, and could not know before
            try:
                _check_output_folder(config)
            except pytest.UsageError as error:
                pytest.fail(str(error), pytrace=False)
        config.stash[SESSION] = Session(
            folder=output_folder(config),
            tokens=count(config, "lmeval-tokens"),
            limit=count(config, "lmeval-limit"),
            seq_lens=tuple(map(int, option(config, "lmeval-seq-len"))),
            parallel=_is_worker(config),
            progress=_progress(config),
        )
    return config.stash[SESSION]


def expected_errors(work: Callable[[], Any]) -> Any:
    """Errors that were written for the user end the test with their message alone, not with a traceback."""
    from pytest_lmeval.verbs import EXPECTED

    __tracebackhide__ = True
    try:
        return work()
    except EXPECTED as error:
        message = str(error)
    pytest.fail(message, pytrace=False)


def _progress(config: pytest.Config) -> Callable[[str], Any]:
    from contextlib import nullcontext

    terminal = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if _is_worker(config) or terminal is None or capture is None:
        return lambda title: nullcontext(None)
    from pytest_lmeval import progress

    return lambda title: progress.bar(title, progress.Uncaptured(terminal, capture))


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _test_id(nodeid: str) -> str:
    """Without the `@group` that xdist appends: it is not part of the test's name."""
    return nodeid.rpartition("@")[0] if re.search(r"@[\w-]+$", nodeid) and "[" not in nodeid.rpartition("@")[2] else nodeid


def _dest(name: str) -> str:
    return name.replace("-", "_")
