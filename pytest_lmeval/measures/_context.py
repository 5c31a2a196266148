"""Run a verb in the context of a test: the settings of the run, the log of the test, the journal.

A verb is a plain function; called outside of tests, it records and writes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from msgspec import structs

from pytest_lmeval._benchmarking import Driver
from pytest_lmeval._ranks import Ranks
from pytest_lmeval._session import Session, TestLog
from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.data._tokens import as_corpus
from pytest_lmeval.engine._policy import limited
from pytest_lmeval.errors import NotMeasuredError, ProfilingError, SpecError, UsageError, nearest
from pytest_lmeval.models._identity import facts, fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._precision import BITS
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.profiling._failures import DEVICE_LOST, failure_of, room_for
from pytest_lmeval.profiling._runner import Runner
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._certificate import Certificate
from pytest_lmeval.records._journal import PARTS, key_of, replace_or_warn, warn
from pytest_lmeval.records._measured import Record, Result
from pytest_lmeval.records._replacing import inside
from pytest_lmeval.records._share import WHOLE, Share

P = ParamSpec("P")
R = TypeVar("R")
Measured = TypeVar("Measured", bound=Any)  # the result of a verb: a frozen dataclass with a record


class ElsewhereError(Exception):
    """Another shard measures this; the message says why."""


@dataclass
class VerbContext:
    """The context of one test, or of one call outside of tests.

    driver  pytest-benchmark's fixture, if the test asks for it
    models  id of an object of the test -> that object, adapted
    alone_keys  of calls that are not shared out
    """

    session: Session = field(default_factory=Session)
    log: TestLog = field(default_factory=TestLog)
    driver: Driver = field(default_factory=Driver)
    models: dict[int, tuple[Any, Model]] = field(default_factory=dict)
    alone_keys: set[str] = field(default_factory=set)

    def model(self, lm: Any) -> Model:
        """The model of a spec, or an object of the test's own, adapted once. Raises SpecError where it has other bits."""
        if isinstance(lm, str):
            return self.session.load(lm)
        if id(lm) not in self.models:
            model, bits = as_model(lm), self.session.bits
            own = model is lm or model.module is None
            held = None if own or not bits else facts(model).precision
            if bits and held is not None and held.name != BITS[bits]:
                raise SpecError(
                    f"--lmeval-bits {bits} asks for {BITS[bits]}, and {model.spec} was handed over in {held.name}: its "
                    f"numbers would pass for those of {BITS[bits]}. Hand it over so, or give a spec: module.path:callable."
                )
            self.models[id(lm)] = (lm, model)
        return self.models[id(lm)][1]

    def corpus(self, text: Any) -> Corpus:
        """The corpus of that name; a corpus or token ids as a corpus."""
        return self.session.corpus(text) if isinstance(text, str) else as_corpus(text)

    def certified(self, lm: Any) -> tuple[Model, Certificate]:
        """The model, with the limit of tokens that its probe found, and its certificate."""
        model = self.model(lm)
        certificate = self.session.verdict(model).certificate
        return limited(model, certificate), certificate

    def key(self, kind: str, lm: Model, settings: Mapping[str, Any], data: Any = None) -> str:
        """The identity of this call, the same in an interrupted run."""
        return key_of(
            test=self.log.test,
            kind=kind,
            lm=[fingerprint(lm), str(lm.dtype), lm.device.type, lm.limit],
            settings=settings,
            data=data,
            version=importlib.metadata.version("pytest-lmeval"),
            call=self.log.calls,
        )

    @property
    def alone(self) -> bool:
        """What is measured now is measured in this process alone."""
        return self.session.alone

    @property
    def ranks(self) -> Ranks | None:
        """The processes with which this one agrees on what is measured now."""
        return self.session.agreeing

    def own_key(self, key: str) -> str:
        """The identity of this process's share of a call, under which unfinished work is kept."""
        share = self.session.share if self.session.ranks is None else self.session.ranks.share
        return key if share.is_whole else key_of(key=key, share=str(share))

    def shared(
        self,
        key: str,
        lm: Model,
        measure: Callable[[Share], Measured],
        merge: Callable[[Sequence[Measured]], Measured],
        *,
        alone: bool = False,
    ) -> Measured:
        """What `measure` measures of this run's share of the examples; of all of them, if one share does it `alone`.

        Of several ranks each measures a share, and all get what `merge` makes of them; a model that spans the ranks is measured
        by all at once.

        Raises ElsewhereError where another share measures it."""
        share, ranks = self.session.share, self.ranks
        if ranks is not None and lm.spans_ranks:
            return ranks.of_all(key, lambda: measure(WHOLE))[0]
        if ranks is not None and alone:
            return ranks.from_first(key, lambda: self.undivided_call(measure, (WHOLE,), {}))
        if ranks is not None:
            return merge(ranks.of_all(key, lambda: measure(ranks.share)))
        if self.alone or not alone or share.is_whole:
            return measure(WHOLE if self.alone else share)
        if not share.owns(key):
            raise ElsewhereError("another shard measures it: its state is carried from beginning to end")
        self.alone_keys.add(key)
        return measure(WHOLE)

    def undivided_call(self, function: Callable[..., R], args: Any, kwargs: Any) -> R:
        """What the function returns, measured in this process alone."""
        __tracebackhide__ = True
        with self.undivided():
            return function(*args, **kwargs)

    @contextlib.contextmanager
    def undivided(self) -> Iterator[None]:
        """What is called in the block is measured here, and nowhere else; so are the verbs that it calls."""
        before, self.session.alone = self.session.alone, True
        try:
            yield
        finally:
            self.session.alone = before

    def journaled(self, key: str) -> Record | None:
        """The record of this call that an interrupted run wrote. Warns of one that cannot be read."""
        if self.ranks is not None:
            return self.ranks.from_first(f"{key} in the journal", lambda: self.undivided_call(self.journaled, (key,), {}))
        own = key if self.session.share.is_whole else self.own_key(key)
        plain = self.session.journal.get(own) if self.session.journal is not None else None
        try:
            return None if plain is None else self._checked(schema.convert(plain, Record))
        except (ValueError, OSError) as error:
            warn(f"a result in the journal cannot be read ({error}); it is computed again.")
            return None

    def _checked(self, record: Record) -> Record:
        """The record. Raises OSError if it names a file that lies outside of the output folder: the journal was edited."""
        for file in filter(None, (record.examples, record.units)):
            with contextlib.suppress(FileNotFoundError):
                inside(self.session.folder or Path(), file)
        return record

    def finished(self, key: str) -> Record | None:
        """The same, logged as the record of this call."""
        record = self.journaled(key)
        if record is not None:
            self.log.keys.append(key if self.session.share.is_whole else self.own_key(key))
            self._log(record)
            self.log.notes.append(f"{record.lm.spec} on {record.subject}: result taken from an interrupted run")
            self.log.notes += record.details.get("warnings", [])
        return record

    def recorded(self, key: str, result: Measured) -> Measured:
        """The result, its record under the test's name, written to the journal and the log."""
        record, share = structs.replace(result.record, test=self.log.test), self.session.share
        if self.session.journal is not None and self.session.writes:
            own, of_share = key, dict[str, str | bool | None]()
            if not share.is_whole:
                own = self.own_key(key)
                part = self._written(own, result.part if hasattr(type(result), "part") else None)  # no metric of that name
                of_share = {"share": str(share), "whole": key, "alone": self.alone or key in self.alone_keys, "part": part}
            self.session.journal.add(own, schema.to_plain(record), **of_share)
            self.log.keys.append(own)
        self._log(record)
        return replace(result, record=record)

    def _written(self, own: str, part: dict[str, Any] | None) -> str | None:
        """Write what the shares of a call are merged from. Returns the name of the file in the output folder."""
        if part is None or self.session.folder is None:
            return None
        name = f"{PARTS}/{own}.json"
        replace_or_warn(self.session.folder / name, json.dumps(part, allow_nan=False))
        return name

    def _log(self, record: Record) -> None:
        share = self.session.share
        note = [] if share.is_whole else [f"shard {share}"]
        self.log.records.append(structs.replace(record, notes=[*note, *record.notes]))

    def measured(
        self, kind: str, lm: Model, settings: dict[str, Any], measure: Callable[..., Measured], runner: Runner | None = None
    ) -> Measured:
        """The recorded result of `measure`. Raises OutOfMemory, and ProfilingError for a failed model or a lost device, and
        ElsewhereError for a model that spans the ranks."""
        if self.session.ranks is not None and lm.spans_ranks:  # they would take other numbers of steps, and wait for ever
            raise ElsewhereError("it spans the ranks, and how long each of them takes is not the same")
        timed = {"runner": runner or self.runner()} if "runner" in inspect.signature(measure).parameters else {}
        what = f"{kind} of {lm.spec} with {', '.join(f'{name}={value}' for name, value in settings.items())}"
        try:
            result = room_for(what, lambda: measure(lm, **settings, **timed))
        except Exception as error:
            if failure_of(error) != DEVICE_LOST:
                raise
            raise ProfilingError(f"{lm.device} was lost during {what}; nothing more can be measured on it: {error}") from None
        result = self.kept(kind, lm, settings, result)
        if failure := result.record.details.get("failure"):
            self.driver.raise_error(ProfilingError(f"{lm.spec} failed at {result.record.subject}: {failure}"))
        return result

    def kept(self, kind: str, lm: Model, settings: dict[str, Any], result: Measured) -> Measured:
        """The result, recorded, and passed to pytest-benchmark if the test asked for its fixture."""
        result = self.recorded(self.key(kind, lm, settings), result)
        self.driver.describe(result.record, getattr(result, "samples", {}))
        return result

    def runner(self) -> Runner:
        """The runner of what is timed next: pytest-benchmark once a test, if the test asks for it, else a bare loop."""
        if self.session.parallel:
            return self.driver.idle("other tests may run at the same time (xdist): the step ran once, untimed")
        return self.driver.runner()

    def seq_len(self, given: int | None, default: int) -> int:
        """The length that the test gives, else the command line's, else the default."""
        lengths = self.session.seq_lens
        if given is None and len(lengths) > 1:
            every = ", ".join(map(str, lengths))
            raise SpecError(f"several --lmeval-seq-len were given ({every}): take the fixture `seq_len`, and pass it on.")
        return given if given is not None else lengths[0] if lengths else default

    def file(self, ending: str) -> str | None:
        """A file for the examples of this call, relative to the output folder; None without a folder."""
        if self.session.folder is None:
            return None
        name = re.sub(r"[^\w.-]+", "-", self.log.test.rpartition("::")[2]).encode()[:80].decode(errors="ignore")
        return f"examples/{name}-{key_of(test=self.log.test)[:8]}-{self.log.calls}-{ending}"

    def path(self, file: str | None) -> Path | None:
        """The path of a file of the output folder."""
        return None if file is None or self.session.folder is None else self.session.folder / file


_CURRENT: ContextVar[VerbContext | None] = ContextVar("lmeval_context", default=None)
_OUTSIDE = Session()


def current() -> VerbContext:
    """The context of the running test; outside of tests a new one, which writes nothing."""
    return _CURRENT.get() or VerbContext(_OUTSIDE)


@contextlib.contextmanager
def running_in(context: VerbContext) -> Iterator[None]:
    """Run the verbs called in the block in this context."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@dataclass(frozen=True)
class ElsewhereResult(Result):
    """The result of a verb that another shard measures: every number of it raises NotMeasuredError."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "record" not in vars(self):  # of a copy that is being made
            raise AttributeError(name)
        raise NotMeasuredError(f"{self.record.subject} was not measured here: {self.record.not_measured}.")


def _elsewhere(context: VerbContext, function: Callable[..., R], args: Any, kwargs: Any, why: str) -> R:
    """The result of a verb that another process measures."""
    name, lm = function.__name__, context.model(args[0] if args else kwargs["lm"])
    record = Record(test=context.log.test, kind=name, subject=name, lm=facts(lm), not_measured=why)
    context.log.records.append(record)
    return ElsewhereResult(record)  # type: ignore[return-value]


def _or_elsewhere(context: VerbContext, function: Callable[..., R], args: Any, kwargs: Any) -> R:
    __tracebackhide__ = True
    try:
        return function(*args, **kwargs)
    except ElsewhereError as elsewhere:
        return _elsewhere(context, function, args, kwargs, str(elsewhere))


def verb(function: Callable[P, R], shared: bool = False, trains: bool = False) -> Callable[P, R]:
    """Make a function a public verb, which refuses wrong arguments before it does anything (see `check_call`).

    shared  each of several processes calls it: it shares the examples out, or is needed in all of them. Another verb is called
            in one of them
    trains  of several ranks, the first calls it before the others, which find the models that it has trained
    """

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        check_call(function, args, kwargs)
        context = current()
        context.log.calls += 1
        number, ranks, share = context.log.calls, context.ranks, context.session.share
        if context.alone or (shared and (ranks is None or not trains)) or (share.is_whole and ranks is None):
            return _or_elsewhere(context, function, args, kwargs)
        call = f"{context.log.test} {function.__name__} {number}"
        try:
            if ranks is not None:
                inner = (context, function, args, kwargs)
                own: Callable[[], R] = functools.partial(context.undivided_call, _or_elsewhere, inner, {})
                lm = context.model(args[0] if args else kwargs["lm"])
                if not (trains or lm.spans_ranks):
                    return ranks.from_first(call, own)
                context.certified(lm)  # all agree on it now: in the call each would try the laws by itself
                return ranks.in_each(call, own, first_alone=not lm.spans_ranks)
            if not share.owns(call):
                return _elsewhere(context, function, args, kwargs, "another shard measures it")
            return context.undivided_call(function, args, kwargs)
        finally:
            context.log.calls = number  # as where it is not called

    return checked


shared_verb = functools.partial(verb, shared=True)
"""Decorates a verb that each of several processes calls."""


def check_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise UsageError for arguments that the function does not take, with the nearest of its keywords."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
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
    measure: Callable[Concatenate[Model, P], Measured],
    prepare: Callable[[VerbContext, Model, dict[str, Any]], dict[str, Any]] = lambda context, model, settings: settings,
) -> Callable[Concatenate[Any, P], Measured]:
    """Make a function that measures a `Model` a verb: it takes specs, has the context's defaults, and its result is recorded.

    prepare  (context, model, settings) -> settings to measure with
    """
    signature = inspect.signature(measure)

    @functools.wraps(measure)
    def function(lm: Any, *args: P.args, **kwargs: P.kwargs) -> Measured:
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

    function.__name__ = function.__qualname__ = name
    return verb(function)  # type: ignore[return-value]  # whose first parameter may be named
