"""What every verb works with: the session, the test's log, the journal, the model; and what it does with a result."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pytest_lmeval.benchmarking import Driver
from pytest_lmeval.errors import CorpusError, ModelError, ProfilingError, SpecError, StreamError, TaskError
from pytest_lmeval.models.identity import facts, fingerprint
from pytest_lmeval.models.model import Model
from pytest_lmeval.models.precision import BITS
from pytest_lmeval.models.sources import as_model
from pytest_lmeval.profiling.failures import DEVICE_LOST, failure_of, room_for
from pytest_lmeval.profiling.runner import Runner
from pytest_lmeval.records.journal import key_of
from pytest_lmeval.records.record import Record
from pytest_lmeval.session import Session, TestLog

EXPECTED = (CorpusError, ModelError, ProfilingError, SpecError, StreamError, TaskError)
"""Errors that were written for the user: they arrive as their messages."""

R = TypeVar("R")


@dataclass
class Desk:
    """Of one test.

    driver  pytest-benchmark's fixture, where the test asked for it
    models  what the test handed over, by identity, with what was made of it
    """

    session: Session
    log: TestLog
    driver: Driver
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
        if bits and not own and (found := facts(model)["precision"]["name"]) != BITS[bits]:
            raise SpecError(
                f"--lmeval-bits {bits} asks for {BITS[bits]}, and {model.spec} was handed over in {found}. What is measured "
                "would pass for that of another precision. Hand it over in that one, or give a spec: module.path:callable."
            )
        return model

    def certified(self, lm: Any) -> tuple[Model, Any]:
        """The model and the certificate of its laws, which may have found a limit of tokens that it does not declare."""
        model = self.model(lm)
        certificate = self.session.verdict(model).certificate
        if certificate.limit_tokens and not certificate.limit_is_step:
            model = replace(model, found_limit=certificate.limit_tokens)
        return model, certificate

    def key(self, kind: str, lm: Model, settings: dict[str, Any], data: Any = None) -> str:
        return key_of(
            test=self.log.test,
            kind=kind,
            lm=[fingerprint(lm), str(lm.dtype), str(lm.device), lm.limit],
            settings=settings,
            data=data,
            version=importlib.metadata.version("pytest-lmeval"),
            call=len(self.log.records),
        )

    def finished(self, key: str) -> Record | None:
        """The record of this call from a run that was interrupted later on."""
        data = self.session.journal.get(key)
        if data is None:
            return None
        record = Record.from_json(data)
        self.log.keys.append(key)
        self.log.records.append(record)
        self.log.notes.append(f"{record.lm['spec']} on {record.subject}: result taken from an interrupted run")
        self.log.notes += record.settings.get("warnings", [])
        return record

    def recorded(self, key: str, result: R) -> R:
        record = replace(result.record, test=self.log.test)  # type: ignore[attr-defined]
        self.session.journal.add(key, record.to_json())
        self.log.keys.append(key)
        self.log.records.append(record)
        return replace(result, record=record)  # type: ignore[type-var]

    def timed(self, kind: str, lm: Model, settings: dict[str, Any], measure: Callable[..., R]) -> R:
        """What `measure` finds, called as the test and its neighbours allow. Raises OutOfMemory, and ProfilingError where the
        model failed, or its device is gone; what was measured until then is kept."""
        what = f"{kind} of {lm.spec} with {', '.join(f'{name}={value}' for name, value in settings.items())}"
        try:
            result = room_for(what, lambda: measure(lm, **settings, runner=self.runner()))
        except Exception as error:
            if failure_of(error) != DEVICE_LOST:
                raise
            raise ProfilingError(
                f"{lm.device} was lost during {what}, and nothing more can be measured on it: {error}"
            ) from None
        result = self.kept(kind, lm, settings, result)
        record: Record = result.record  # type: ignore[attr-defined]
        if failure := record.settings.get("failure"):
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
        lengths = self.session.seq_lens
        if given is None and len(lengths) > 1:
            raise SpecError(
                f"several --lmeval-seq-len were given ({', '.join(map(str, lengths))}) and the test does not say which it "
                "means: take the fixture `seq_len` and pass it on."
            )
        return given if given is not None else lengths[0] if lengths else default

    def file(self, ending: str) -> str:
        """A file for per-example values of this call, relative to the output folder."""
        (self.session.folder / "examples").mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]+", "-", self.log.test.rpartition("::")[2])[:80]
        return f"examples/{name}-{key_of(test=self.log.test)[:8]}-{len(self.log.records)}-{ending}"
