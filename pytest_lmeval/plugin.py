"""Pytest options, fixtures and hooks. Every pytest run loads this module, so all else is imported when it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest

from pytest_lmeval import _options as options
from pytest_lmeval._benchmarking import BenchmarkHooks, WithoutBenchmark
from pytest_lmeval._frames import release_frames, up_to_the_test
from pytest_lmeval._options import (
    CORPORA,
    SEQ_LENS,
    batch,
    budget,
    chat,
    count,
    is_worker,
    option,
    output_folder,
    share,
    template_kwargs,
    test_id,
)
from pytest_lmeval.errors import LmevalError, NoIntervalError, NotMeasuredError, WithheldError
from pytest_lmeval.report._gather import Reports

if TYPE_CHECKING:
    from pytest_lmeval._session import Session
    from pytest_lmeval.data._corpus import Corpus
    from pytest_lmeval.measures import Lmeval
    from pytest_lmeval.models._model import Model

T = TypeVar("T")
SESSION = pytest.StashKey["Session"]()
LOG = pytest.StashKey[Any]()
RANKS = pytest.StashKey[Any]()
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # variables that it sets


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    from pytest_lmeval import _hookspec as hookspec

    pluginmanager.add_hookspecs(hookspec)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lmeval: an evaluation (added to every test that uses the fixture lmeval)")
    config.addinivalue_line(
        "markers",
        'lmeval_gate(METRIC=margin, ...): how much worse than the baseline it may be (0.01, "0.5%", "off"); or "off"',
    )
    options.check(config)
    first = _join_ranks(config)
    if first and not is_worker(config):
        config.pluginmanager.register(Reports(config), "lmeval-reports")
        if option(config, "lmeval-fresh-evidence") and not config.option.collectonly:  # before workers start
            for certificate in (output_folder(config) / "certificates").glob("*.json"):
                try:
                    certificate.unlink(missing_ok=True)
                except OSError as error:
                    why = error.strerror or error
                    raise pytest.UsageError(f"--lmeval-fresh-evidence: {certificate} cannot be deleted ({why}).") from error
    config.pluginmanager.register(_fixtures_with_parameters(config), "lmeval-parameters")
    gated = first and option(config, "lmeval-gate") != "off" and share(config).is_whole  # merged shares are compared
    if gated and (config.getoption("lmeval_baseline") or config.getini("lmeval_baseline")):
        from pytest_lmeval.gates._gate import Gate, baseline_file

        if (file := baseline_file(config)) is not None:
            config.pluginmanager.register(Gate(config, file, LOG), "lmeval-gate")
    if config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(BenchmarkHooks(), "lmeval-benchmark")
    elif not config.pluginmanager.hasplugin("codspeed"):
        config.addinivalue_line("markers", "benchmark: a benchmark (pytest-benchmark is not active)")
        config.pluginmanager.register(WithoutBenchmark(), "lmeval-without-benchmark")


def _join_ranks(config: pytest.Config) -> bool:
    """Join the other processes of a run that torchrun started. Returns whether this is the first, or the only one."""
    if not all(name in os.environ for name in TORCHRUN) or os.environ["WORLD_SIZE"] == "1" or config.option.collectonly:
        return True
    from pytest_lmeval import _ranks as processes
    from pytest_lmeval._ranked import RankHooks

    if is_worker(config) or getattr(config.option, "numprocesses", None):
        raise pytest.UsageError(
            "torchrun starts a process for each rank, and -n (pytest-xdist) workers in each: use one of them."
        )
    if not share(config).is_whole:
        raise pytest.UsageError("torchrun and --lmeval-shard both share the examples out: use one of them.")
    try:
        config.stash[RANKS] = ranks = processes.Ranks.joined()
    except (LmevalError, ValueError) as error:  # variables of another launcher
        raise pytest.UsageError(str(error)) from None
    config.pluginmanager.register(RankHooks(config, ranks), "lmeval-ranks")
    return ranks.is_first


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _uses_lmeval(item):
            item.add_marker("lmeval")
        if item.get_closest_marker("lmeval_gate") and not is_worker(config):  # a worker can only fail the test
            from pytest_lmeval.gates._gate import margins_of

            margins_of(item)  # raises before the first test for a marker that makes no sense


def _uses_lmeval(item: pytest.Item) -> bool:
    """Whether a test uses our fixture `lmeval`, or one of the project that takes ours; not another of the same name."""
    known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    for definition in reversed(known.get("lmeval", ())):
        if definition.func.__module__ == __name__:
            return True
        if "lmeval" not in definition.argnames:
            break
    return False


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Check before the first test that results can be written, if there will be any."""
    config = session.config
    if config.option.collectonly or is_worker(config) or not (reports := config.pluginmanager.get_plugin("lmeval-reports")):
        return
    if own := [item.nodeid for item in session.items if item.get_closest_marker("lmeval")]:
        _check_output_folder(config)
        reports.tests |= dict.fromkeys(own, "it did not run")


def _check_output_folder(config: pytest.Config) -> None:
    from pytest_lmeval.records._journal import check_writable

    folder = output_folder(config)
    try:
        check_writable(folder)
    except OSError as error:
        raise pytest.UsageError(
            f"nothing can be written to the output folder {folder} ({error.strerror or error}), so this run would lose its "
            "results. Choose another folder with --lmeval-dir."
        ) from error


# ---------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Any:
    """The torch device of `--lmeval-device`."""
    from pytest_lmeval.models._sources import resolve_device

    return fail_in_words(lambda: resolve_device(str(option(pytestconfig, "lmeval-device"))))


@pytest.fixture(scope="session")
def load_lm(pytestconfig: pytest.Config) -> Callable[[str], Model]:
    """A function from a model spec to the model, which is loaded once in a session.

    def test_two_models_agree(load_lm):
        small, large = load_lm("demo"), load_lm("hf:./checkpoint@bf16")
    """
    session = shared_session(pytestconfig)

    def load_once(spec: str) -> Model:
        __tracebackhide__ = True
        return fail_in_words(lambda: session.load(spec))

    return load_once


@pytest.fixture(scope="session")
def corpus(pytestconfig: pytest.Config) -> Callable[..., Corpus]:
    """A function from a corpus name and split to the corpus; with special_tokens=True, special tokens that are written in its
    text are read as control tokens.

    def test_reads(lmeval, lm, corpus):
        lmeval.perplexity(lm, corpus("wikitext-2", "test"))
    """
    session = shared_session(pytestconfig)

    def named(name: str = "stdlib", split: str = "test", *, special_tokens: bool = False) -> Corpus:
        __tracebackhide__ = True
        return fail_in_words(lambda: session.corpus(name, split, special_tokens=special_tokens))

    return named


@pytest.fixture
def lmeval(request: pytest.FixtureRequest) -> Lmeval:
    """The verbs; every call is recorded under the test's name.

    def test_reads_easily(lmeval, lm, corpus):
        assert lmeval.perplexity(lm, corpus("stdlib", "test")).perplexity < 6
    """
    from pytest_lmeval._benchmarking import Driver
    from pytest_lmeval._session import TestLog
    from pytest_lmeval.measures import Lmeval
    from pytest_lmeval.measures._context import VerbContext

    log = TestLog(test_id(request.node.nodeid))
    request.node.stash[LOG] = log
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    return Lmeval(VerbContext(shared_session(request.config), log, Driver(benchmark)))


def _fixtures_with_parameters(config: pytest.Config) -> ModuleType:
    """Fixtures whose parameters are options. A single value is no parameter: the names of tests stay the same, so two runs with
    different models can be compared test by test."""

    @pytest.fixture(scope="session", params=_parameters(option(config, "lm")))
    def lm(request: pytest.FixtureRequest, load_lm: Callable[[str], Model]) -> Model:
        """The model of `--lm`. Define a fixture `lm` to test a model of your own."""
        return load_lm(_parameter(request, option(request.config, "lm")))

    @pytest.fixture(scope="session", params=_parameters(option(config, "lmeval-seq-len") or SEQ_LENS))
    def seq_len(request: pytest.FixtureRequest) -> int:
        """Each sequence length of `--lmeval-seq-len`; 128 and 512 by default."""
        return int(_parameter(request, option(request.config, "lmeval-seq-len") or SEQ_LENS))

    @pytest.fixture(scope="session", params=_parameters(option(config, "lmeval-corpus") or CORPORA))
    def corpus_name(request: pytest.FixtureRequest) -> str:
        """Each name of `--lmeval-corpus`; by default the two corpora that need no download."""
        return str(_parameter(request, option(request.config, "lmeval-corpus") or CORPORA))

    module = ModuleType("lmeval_parameters")
    module.lm, module.seq_len, module.corpus_name = lm, seq_len, corpus_name  # type: ignore[attr-defined]
    return module


def _parameters(values: list[str]) -> list[str] | None:
    return values if len(values) > 1 else None


def _parameter(request: pytest.FixtureRequest, values: list[str]) -> Any:
    return getattr(request, "param", values[0] if values else None)


# ----------------------------------------------------------------------------------------------- reports


def _skip_if_not_measured(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip a test that reads a time which was not measured, or judges numbers of a share of the examples, with the reason: it
    says nothing about the model."""
    try:
        return (yield)
    except NotMeasuredError as error:
        why, raised = str(error), cast(Exception, error)
    except (AssertionError, NoIntervalError, WithheldError) as error:
        if not _is_about_a_share(item):
            raise
        said = str(error).partition("\n")[0] or "an assertion failed"
        why, raised = f"{said}: of shard {share(item.config)} alone. After `lmeval merge` the test decides", error
    raise pytest.skip.Exception(why).with_traceback(up_to_the_test(raised, str(item.path))) from None


def _is_about_a_share(item: pytest.Item) -> bool:
    """Whether a test knows a share of the examples only: what it says of numbers decides nothing."""
    log = item.stash.get(LOG, None)
    return log is not None and bool(log.records) and not share(item.config).is_whole


pytest_runtest_setup = pytest_runtest_call = pytest.hookimpl(wrapper=True)(_skip_if_not_measured)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the outermost wrapper: nothing reads the frames after it
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if item.get_closest_marker("lmeval"):
        report._lmeval_test = True
    if call.when == "call" and (log := item.stash.get(LOG, None)) is not None:
        report._lmeval = json.dumps(log.to_plain(), allow_nan=False)  # one string, which xdist sends from a worker unchanged
    debugged = item.config.getoption("usepdb", False) or item.config.getoption("trace", False)
    if call.excinfo is not None and "lmeval" in getattr(item, "fixturenames", ()) and not debugged:
        release_frames(call.excinfo.value)
    return report


def shared_session(config: pytest.Config) -> Session:
    """The session of this process, created when the first test needs it."""
    if SESSION not in config.stash:
        from pytest_lmeval._session import Session

        if is_worker(config):  # the process with the terminal collects no tests, so it did not check
            try:
                _check_output_folder(config)
            except pytest.UsageError as error:
                pytest.fail(str(error), pytrace=False)
        config.stash[SESSION] = Session(
            folder=output_folder(config),
            tokens=count(config, "lmeval-tokens"),
            limit=count(config, "lmeval-limit"),
            profile=str(option(config, "lmeval-profile")),
            budget=budget(config),
            batch=batch(config),
            concurrency=count(config, "lmeval-concurrency"),
            chat=chat(config),
            chat_template_kwargs=template_kwargs(config),
            seq_lens=tuple(map(int, option(config, "lmeval-seq-len"))),
            share=share(config),
            ranks=config.stash.get(RANKS, None),
            parallel=is_worker(config),
            device=str(option(config, "lmeval-device")),
            bits=int(option(config, "lmeval-bits")) if option(config, "lmeval-bits") else None,
            trusted=tuple(option(config, "lmeval-trust-remote-code")),
            mirror=option(config, "lmeval-data") or None,
            fresh=bool(option(config, "lmeval-fresh")),
            progress=_progress(config),
            say=_say(config),
        )
    return config.stash[SESSION]


def fail_in_words(work: Callable[[], T]) -> T:
    """Fail the test with the message alone, without a traceback, for an error of this package."""
    __tracebackhide__ = True
    try:
        return work()
    except LmevalError as error:
        message = str(error)
    pytest.fail(message, pytrace=False)


def _progress(config: pytest.Config) -> Callable[..., Any]:
    from pytest_lmeval import _progress as progress
    from pytest_lmeval.report._words import one_line

    terminal, live = _terminal(config), _live_file(config)
    return lambda title, **options: progress.shown(one_line(title), terminal, live, **options)


def _live_file(config: pytest.Config) -> Any:
    """The file that tells `lmeval watch` what this process does; None in a rank that is not the first."""
    from pytest_lmeval.records._live import LiveFile

    if not is_worker(config) and not config.pluginmanager.hasplugin("lmeval-reports"):
        return None
    file = LiveFile(output_folder(config), str(vars(config)["workerinput"]["workerid"]) if is_worker(config) else "")
    config.add_cleanup(file.close)
    return file


def _say(config: pytest.Config) -> Callable[[str], None] | None:
    terminal = _terminal(config)
    if terminal is None:
        return None
    from pytest_lmeval.report._words import safe_lines

    return lambda line: terminal.write(f"\n{safe_lines(line)}\n")


def _terminal(config: pytest.Config) -> Any:
    """The terminal past pytest's capture; None in a worker, and without one."""
    from pytest_lmeval._progress import Uncaptured

    terminal = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if is_worker(config) or terminal is None or capture is None or not config.pluginmanager.hasplugin("lmeval-reports"):
        return None
    return Uncaptured(terminal, capture)
