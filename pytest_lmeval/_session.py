"""Hold what the tests of one run share: settings, the output folder, the journal, models and verdicts.

Each process has one session (under xdist, each worker); records travel to the one that writes the reports in pytest's reports.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_lmeval._ranks import Ranks
from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.errors import RankError
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._weak_cache import WeakCache
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import Journal
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._share import WHOLE, Share

if TYPE_CHECKING:
    from pytest_lmeval.laws._probe import EquivalenceResult

ProgressBars = Callable[..., AbstractContextManager[Any]]


@dataclass
class Session:
    """The settings of a run, from the command line, and what its tests share.

    folder           for all output; None writes nothing
    profile, budget  how hard the probe of a model's laws searches, and for how many tokens beyond their floors
    batch            rows of a batch of questions; "auto": as many as fit; None: as many as the verb says
    concurrency      requests to a server under way at once; None: as many as its client says
    chat             whether tasks are asked in turns: True, False or "auto"; with these `chat_template_kwargs`
    share            of the examples that this run scores
    ranks            the processes that share them out among themselves, if torchrun started several
    alone            what is measured now is measured in this process alone
    parallel         other tests run at the same time, so speed is not measured
    trusted          models that may run their own code
    mirror           a folder to use instead of the hub
    fresh            use nothing from an earlier run
    progress         (title, unit) -> a context manager of a progress bar's callback, or of None
    say              prints a line at once
    """

    folder: Path | None = None
    tokens: int | None = None
    limit: int | None = None
    seq_lens: tuple[int, ...] = ()
    profile: str = ""
    budget: int | None = None
    batch: int | Literal["auto"] | None = None
    concurrency: int | None = None
    chat: Literal["auto"] | bool = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    share: Share = WHOLE
    ranks: Ranks | None = None
    alone: bool = False
    parallel: bool = False
    device: str = "auto"
    bits: int | None = None
    trusted: tuple[str, ...] = ()
    mirror: str | None = None
    fresh: bool = False
    progress: ProgressBars = lambda title, **options: nullcontext(None)
    say: Callable[[str], None] | None = None
    loaded: dict[str, Model] = field(default_factory=dict)
    verdicts: WeakCache[dict[tuple[str, ...], EquivalenceResult]] = field(default_factory=WeakCache)

    @property
    def agreeing(self) -> Ranks | None:
        """The processes with which this one agrees on what is measured now."""
        return None if self.alone else self.ranks

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run: of several, the first."""
        return self.folder is not None and (self.ranks is None or self.ranks.is_first)

    @functools.cached_property
    def journal(self) -> Journal | None:
        return None if self.folder is None else Journal(self.folder)

    def load(self, spec: str) -> Model:
        """The model that a spec names, loaded once in a run; anew without an output folder, outside of runs."""
        from pytest_lmeval.models._sources import load, resolve_device

        if spec in self.loaded:
            return self.loaded[spec]
        trust = spec.removeprefix("hf:").partition("@")[0] in self.trusted
        device = resolve_device(self.device)
        model = load(spec, device=device, bits=self.bits, trust_remote_code=trust, concurrency=self.concurrency)
        if self.folder is not None:
            self.loaded[spec] = model
        return model

    def corpus(self, name: str = "stdlib", split: str = "test", *, special_tokens: bool = False) -> Corpus:
        """The corpus of that name, from the mirror if there is one."""
        from pytest_lmeval.data import corpus

        return corpus(name, split, data_dir=self.mirror, special_tokens=special_tokens)

    @property
    def probe(self) -> dict[str, Any]:
        """How hard every probe in this run searches."""
        from pytest_lmeval.laws._run_probe import default_profile

        return {"profile": self.profile or default_profile(), "budget": self.budget}

    def verdict(self, lm: Model) -> EquivalenceResult:
        """The equivalence result of a model, which is probed once in a session. Does not keep the model in memory."""
        known = self.verdicts.value(lm.step_fn if lm.module is None else lm.module, dict)
        key = (fingerprint(lm), str(lm.dtype), str(lm.device))
        if key not in known:
            known[key] = self.probed(lm) if self.agreeing is None else self._agreed(self.agreeing, lm, key)
        return known[key]

    def _agreed(self, ranks: Ranks, lm: Model, key: tuple[str, ...]) -> EquivalenceResult:
        """The verdict of the first rank for all; they probe a model that spans them together. Raises RankError where the ranks
        do not hold the same model."""
        what = f"the laws of {lm.spec}"
        versions = importlib.metadata.version("torch"), importlib.metadata.version("pytest-lmeval")
        for rank, theirs in enumerate(ranks.together(what, (*key[:2], *versions))):
            if theirs != (*key[:2], *versions):
                named = "fingerprint", "precision", "torch", "pytest-lmeval"
                pairs = zip(named, (*key[:2], *versions), theirs, strict=True)
                unlike = ", ".join(f"{name} {own} and {other}" for name, own, other in pairs if own != other)
                raise RankError(f"ranks {ranks.rank} and {rank} do not hold the same model {lm.spec}: {unlike}.")
        if not lm.spans_ranks:
            return ranks.from_first(what, lambda: self.probed(lm))
        # All take the same steps, or they would wait for one another: the cases are no random ones, nor those of files.
        same: dict[str, Any] = {"profile": "ci", "counterexamples": None, "certificates": None, "say": None}
        return ranks.of_all(what, lambda: self.probed(lm, **same))[0]

    def probed(self, lm: Model, **options: Any) -> EquivalenceResult:
        """Probe a model with the options of this run, and these; show how far it is."""
        from pytest_lmeval.laws._probe import probe

        known = None if self.folder is None else self.folder / "counterexamples.jsonl"
        certificates = None if self.folder is None else self.folder / "certificates"
        files = {"counterexamples": known, "certificates": certificates}
        with self.progress(f"{lm.spec} is tried on the laws", unit="laws") as progress:
            return probe(lm, **{**self.probe, **files, "progress": progress, "say": self.say, **options})


@dataclass
class TestLog:
    """What one test has recorded so far, and the notes for its reader.

    keys   of the journal's lines that this test wrote or resumed from
    calls  of verbs so far
    """

    test: str = ""
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    calls: int = 0

    def to_plain(self) -> dict[str, Any]:
        return {"records": [schema.to_plain(record) for record in self.records], "notes": self.notes, "keys": self.keys}
