"""Where a verb runs: the run's settings, the test's log, the journal; and what it does with a result.

A verb is a plain function. Called as `lmeval.latency(...)` in a test, it runs in that test's context: its record is kept under
the test's name and written to the journal, and the command line's defaults hold. Called as `pytest_lmeval.latency(...)`
anywhere else, nothing is kept or written.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from msgspec import structs

from pytest_lmeval._benchmarking import Driver
from pytest_lmeval._session import Session, TestLog
from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._ids import as_corpus
from pytest_lmeval.engine._policy import limited
from pytest_lmeval.errors import ProfilingError, SpecError, UsageError, nearest
from pytest_lmeval.models._identity import facts, fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._precision import BITS
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.profiling._failures import DEVICE_LOST, failure_of, room_for
from pytest_lmeval.profiling._runner import Runner
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._journal import key_of, warn
from pytest_lmeval.records._measured import Record

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class VerbContext:
    """Of one test, or of one call outside of tests.

    driver  pytest-benchmark's fixture, where the test asked for it
    models  what the test handed over, by identity, with what was made of it
    """

    session: Session = field(default_factory=Session)
    log: TestLog = field(default_factory=TestLog)
    driver: Driver = field(default_factory=Driver)
    models: dict[int, tuple[Any, Model]] = field(default_factory=dict)

    def model(self, lm: Any) -> Model:
        """What the test handed over (a spec, too), adapted once a test, and let go with it."""
        if isinstance(lm, str):
            return self.session.load(lm)
        if id(lm) not in self.models:
            self.models[id(lm)] = (lm, self._adapted(lm))
        return self.models[id(lm)][1]

    def _adapted(self, lm: Any) -> Model:
        """An object of the test's own is measured as it is. Raises SpecError where the command line asks for other bits."""
        model, bits = as_model(lm), self.session.bits
        own = model is lm or model.module is None
        held = None if own or not bits else facts(model).precision
        if bits and held is not None and held.name != BITS[bits]:
            raise SpecError(
                f"--lmeval-bits {bits} asks for {BITS[bits]}, and {model.spec} was handed over in {held.name}. What is "
                "measured would pass for that of another precision. Hand it over in that one, or give a spec: "
                "module.path:callable."
            )
        return model

    def corpus(self, text: Any) -> Corpus:
        """The corpus of that name; a corpus as it is; token ids as one."""
        return self.session.corpus(text) if isinstance(text, str) else as_corpus(text)

    def certified(self, lm: Any) -> tuple[Model, Certificate]:
        """The model and the certificate of its laws, which may have found a limit of tokens that it does not declare."""
        model = self.model(lm)
        certificate = self.session.verdict(model).certificate
        return limited(model, certificate), certificate

    def key(self, kind: str, lm: Model, settings: Mapping[str, Any], data: Any = None) -> str:
        """The identity of this call: an interrupted run had the same one."""
        return key_of(
            test=self.log.test,
            kind=kind,
            lm=[fingerprint(lm), str(lm.dtype), str(lm.device), lm.limit],
            settings=settings,
            data=data,
            version=importlib.metadata.version("pytest-lmeval"),
            call=len(self.log.records),
        )

    def journaled(self, key: str) -> Record | None:
        """The record of this call that an interrupted run has written. One that cannot be read is told, and made anew."""
        plain = self.session.journal.get(key) if self.session.journal is not None else None
        if plain is None:
            return None
        try:
            return schema.convert(plain, Record)
        except ValueError as error:
            warn(f"a result in the journal cannot be read ({error}); it is computed again.")
            return None

    def finished(self, key: str) -> Record | None:
        """The record of this call from a run that was interrupted later on; it counts as this call's."""
        record = self.journaled(key)
        if record is not None:
            self.log.keys.append(key)
            self.log.records.append(record)
            self.log.notes.append(f"{record.lm.spec} on {record.subject}: result taken from an interrupted run")
            self.log.notes += record.details.get("warnings", [])
        return record

    def recorded(self, key: str, result: R) -> R:
        """The result, its record under the test's name, in the journal and the log."""
        record = structs.replace(result.record, test=self.log.test)  # type: ignore[attr-defined]
        if self.session.journal is not None:
            self.session.journal.add(key, schema.to_plain(record))
            self.log.keys.append(key)
        self.log.records.append(record)
        return replace(result, record=record)  # type: ignore[type-var]

    def measured(
        self, kind: str, lm: Model, settings: dict[str, Any], measure: Callable[..., R], runner: Runner | None = None
    ) -> R:
        """What `measure` finds, called as the test and its neighbours allow. Raises OutOfMemory, and ProfilingError where the
        model failed, or its device is gone; what was measured until then is kept."""
        timed = {"runner": runner or self.runner()} if "runner" in inspect.signature(measure).parameters else {}
        what = f"{kind} of {lm.spec} with {', '.join(f'{name}={value}' for name, value in settings.items())}"
        try:
            result = room_for(what, lambda: measure(lm, **settings, **timed))
        except Exception as error:
            if failure_of(error) != DEVICE_LOST:
                raise
            raise ProfilingError(
                f"{lm.device} was lost during {what}, and nothing more can be measured on it: {error}"
            ) from None
        result = self.kept(kind, lm, settings, result)
        record: Record = result.record  # type: ignore[attr-defined]
        if failure := record.details.get("failure"):
            self.driver.raise_error(ProfilingError(f"{lm.spec} failed at {record.subject}: {failure}"))
        return result

    def kept(self, kind: str, lm: Model, settings: dict[str, Any], result: R) -> R:
        """The result, recorded, and left with pytest-benchmark where the test asked for its fixture."""
        result = self.recorded(self.key(kind, lm, settings), result)
        self.driver.describe(result.record, getattr(result, "samples", {}))  # type: ignore[attr-defined]
        return result

    def runner(self) -> Runner:
        """Who calls what is timed next: pytest-benchmark once a test, if the test asks for it, else a bare loop."""
        if self.session.parallel:
            return self.driver.idle("other tests may run at the same time (xdist): the step ran once, untimed")
        return self.driver.runner()

    def seq_len(self, given: int | None, default: int) -> int:
        """The length that a test, or else the command line, asks for."""
        lengths = self.session.seq_lens
        if given is None and len(lengths) > 1:
            raise SpecError(
                f"several --lmeval-seq-len were given ({', '.join(map(str, lengths))}) and the test does not say which it "
                "means: take the fixture `seq_len` and pass it on."
            )
        return given if given is not None else lengths[0] if lengths else default

    def file(self, ending: str) -> str | None:
        """A file for per-example values of this call, relative to the output folder; None without one."""
        if self.session.folder is None:
            return None
        (self.session.folder / "examples").mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]+", "-", self.log.test.rpartition("::")[2])[:80]
        return f"examples/{name}-{key_of(test=self.log.test)[:8]}-{len(self.log.records)}-{ending}"

    def path(self, file: str | None) -> Path | None:
        """Where a file of the output folder lies."""
        return None if file is None or self.session.folder is None else self.session.folder / file


_CURRENT: ContextVar[VerbContext | None] = ContextVar("lmeval_context", default=None)
_OUTSIDE = Session()


def current() -> VerbContext:
    """The context of the test that runs; outside of tests a new one, which keeps and writes nothing."""
    return _CURRENT.get() or VerbContext(_OUTSIDE)


@contextlib.contextmanager
def running_in(context: VerbContext) -> Iterator[None]:
    """Verbs that are called in the block run in this context."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """A public verb: a call that it does not know is refused before anything is done, and of a keyword the nearest named."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        check_call(function, args, kwargs)
        return function(*args, **kwargs)

    return checked


def check_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises UsageError for a call that the function does not take, with the nearest of its keywords."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions that are written in C do not tell
        return
    known = [name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    called = getattr(function, "__name__", "the verb")
    if len(known) == len(signature.parameters) and (wrong := [name for name in kwargs if name not in known]):
        raise UsageError(f"{called} has no keyword {wrong[0]!r}.{nearest(wrong[0], known)} It has {', '.join(known)}.")
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"{called} cannot be called so: {error}. It has {', '.join(known)}.") from None


def verb_of(
    name: str,
    measure: Callable[Concatenate[Model, P], R],
    prepare: Callable[[VerbContext, Model, dict[str, Any]], dict[str, Any]] = lambda context, model, settings: settings,
) -> Callable[Concatenate[Any, P], R]:
    """The verb of a function that measures a `Model`: it takes a model or a spec, the command line's sequence length where none
    is given, and the runner of its context if it has a parameter `runner`; its result is recorded.

    prepare  (context, model, settings) -> the settings that it is measured with
    """
    signature = inspect.signature(measure)

    def function(lm: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        context = current()
        model = context.model(lm)
        given = signature.bind(model, *args, **kwargs)
        length = given.arguments.get("seq_len")
        given.apply_defaults()
        settings = {key: value for key, value in given.arguments.items() if key not in ("lm", "runner")}
        if "seq_len" in settings:
            settings["seq_len"] = context.seq_len(length, settings["seq_len"])
        return context.measured(name, model, prepare(context, model, settings), measure, given.arguments.get("runner"))

    function.__doc__, function.__module__, function.__name__ = measure.__doc__, measure.__module__, name
    function.__qualname__, function.__annotations__ = name, dict(measure.__annotations__)
    function.__signature__ = signature  # type: ignore[attr-defined]
    return verb(function)  # type: ignore[return-value]  # whose first parameter may be named
