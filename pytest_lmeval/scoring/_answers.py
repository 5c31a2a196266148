"""Keep what is read for the questions of a task in a file of JSON lines, a line a batch, so that nothing is read twice.

What a metric or an audit needs is computed anew from it. It is found by the key of its question (model, prompt, choices, seed,
judge), and counts once one answer of it was read again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from pytest_lmeval.engine import Answer, Counts, OnText, Prompt, Results, Scored
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import replace_or_warn, warn
from pytest_lmeval.records._replacing import append, regular
from pytest_lmeval.records._schema import StoredStruct
from pytest_lmeval.scoring._requests import EncodedQuestion

RUN = uuid.uuid4().hex[:12]  # of this process: what it has read itself needs no second reading


class KeptScored(StoredStruct, frozen=True, kw_only=True):
    """A `Scored`."""

    loglikelihood: tuple[float, ...]
    greedy: bool
    read: int
    state_bytes: int


class KeptAnswer(StoredStruct, frozen=True, kw_only=True):
    """An `Answer`; `counts` are tokens, padding, calls and the largest state in bytes."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    judged: bool | None
    read: int
    why: str
    counts: tuple[int, int, int, int]


class Line(StoredStruct, frozen=True, kw_only=True):
    """What one batch read, by the names of its requests; or the differences that an audit found, by those of its questions."""

    run: str
    plan: str
    scored: dict[str, KeptScored] = {}
    answers: dict[str, KeptAnswer] = {}
    audited: dict[str, float] = {}


class AnswerStore:
    """What one model read for the questions of a task, in the file at `path`; None keeps nothing.

    plan          names how questions are put into batches: in other batches, an answer may have other last bits
    exchangeable  answers that were read in other batches are as good: what batches and shared prefixes change is proven to be
                  rounding
    audited       name of a question -> the difference that an audit found
    """

    def __init__(self, path: str | Path | None, plan: str = "", *, exchangeable: bool = False) -> None:
        self.path, self.plan, self.exchangeable = None if path is None else Path(path), plan, exchangeable
        self.audited: dict[str, float] = {}
        self._kept: dict[str, KeptScored | KeptAnswer] = {}
        self._own: set[str] = set()  # names of what was read in the batches of this plan
        self._earlier: set[str] = set()  # names of what another process read
        for line in self._lines():
            self._add(line)

    @property
    def has_earlier(self) -> bool:
        """Whether something is there that another process read."""
        return bool(self._earlier)

    def is_earlier(self, question: EncodedQuestion) -> bool:
        return any(name in self._earlier for name in names_of(question))

    def has(self, question: EncodedQuestion) -> bool:
        """Whether all results of the question are there."""
        return all(name in self._kept for name in names_of(question))

    def from_other_batches(self, question: EncodedQuestion) -> bool:
        """Whether all of them are there, and not all were read in the batches of this plan."""
        return self.has(question) and not self._own.issuperset(names_of(question))

    def scored(self, questions: Sequence[EncodedQuestion]) -> Results[Scored]:
        """The results that are there of all choices of these questions; new ones are kept."""
        names = [name for one in questions for name in names_of(one)]
        found = {
            number: Scored(np.array(kept.loglikelihood, dtype=np.float64), kept.greedy, kept.read, kept.state_bytes)
            for number, name in enumerate(names)
            if isinstance(kept := self._kept.get(name), KeptScored)
        }

        def keep(new: Mapping[int, Scored]) -> None:
            finite = {names[number]: one for number, one in new.items() if np.isfinite(one.loglikelihood).all()}
            scored = {
                name: KeptScored(
                    loglikelihood=tuple(one.loglikelihood.tolist()),
                    greedy=bool(one.greedy),
                    read=one.read,
                    state_bytes=one.state_bytes,
                )
                for name, one in finite.items()
            }
            self._write(Line(run=RUN, plan=self.plan, scored=scored))

        return Results(found, keep)

    def answers(
        self, questions: Sequence[EncodedQuestion], prompts: Sequence[Prompt], judged: OnText | None
    ) -> Results[Answer]:
        """The answers that are there, if the judge, asked anew, says of them what it said then; new ones are kept."""
        names = [name for one in questions for name in names_of(one)]
        found: dict[int, Answer] = {}
        for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            kept = self._kept.get(name)
            if isinstance(kept, KeptAnswer) and (judged is None or judged(number, kept.text) == kept.judged):
                found[number] = Answer(
                    prompt, list(kept.ids), list(kept.logprobs), kept.text, [], kept.judged, kept.read, kept.why,
                    Counts(*kept.counts),
                )  # fmt: skip

        def keep(new: Mapping[int, Answer]) -> None:
            answers = {
                names[number]: KeptAnswer(
                    ids=tuple(one.ids),
                    logprobs=tuple(one.logprobs),
                    text=one.text,
                    judged=one.judged,
                    read=one.read,
                    why=one.why,
                    counts=(one.counts.tokens, one.counts.padding, one.counts.calls, one.counts.peak_state_bytes),
                )
                for number, one in new.items()
            }
            self._write(Line(run=RUN, plan=self.plan, answers=answers))

        return Results(found, keep)

    def keep_audited(self, question: str, difference: float) -> None:
        self._write(Line(run=RUN, plan=self.plan, audited={question: difference}))

    def forget(self) -> None:
        """Delete everything: it may be wrong."""
        self.audited, self._kept, self._own, self._earlier = {}, {}, set(), set()
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()

    def _add(self, line: Line) -> None:
        new: dict[str, KeptScored | KeptAnswer] = {**line.scored, **line.answers}
        if line.plan == self.plan:
            self._own |= new.keys()
            self.audited |= line.audited
        elif self.exchangeable:
            new = {name: kept for name, kept in new.items() if name not in self._own}
        else:
            return
        self._kept |= new
        if line.run != RUN:
            self._earlier |= new.keys()

    def _lines(self) -> Iterable[Line]:
        """The lines of the file. Warns of one that is broken, and skips it."""
        try:
            lines = [] if self.path is None else regular(self.path).read_bytes().splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            warn(f"{self.path} cannot be read ({error.strerror or error}); its questions are asked again.")
            return
        for number, line in enumerate(lines, start=1):
            try:
                yield schema.convert(schema.parse(line, "", ""), Line)
            except ValueError as error:
                warn(f"{self.path}, line {number} is broken ({type(error).__name__}); what it held is read again.")

    def _write(self, line: Line) -> None:
        """Append a line. If that fails, warn and keep no more."""
        self._add(line)
        if self.path is None or not (line.scored or line.answers or line.audited):
            return
        try:
            append(self.path, schema.line_of(line).encode(), sync=False)  # a process that is killed loses nothing
        except OSError as error:
            why = error.strerror or error
            warn(f"{self.path} cannot be written ({why}); the questions are asked on. If interrupted, they are asked again.")
            self.path = None


def names_of(question: EncodedQuestion) -> list[str]:
    """The names of its requests."""
    return [f"{question.number} {question.key} {index}" for index in range(len(question.requests))]


def write_examples(examples: Iterable[Example], file: str | Path) -> None:
    """Write answered questions, in their order, in one move. Warns if that fails."""
    replace_or_warn(Path(file), "".join(schema.line_of(example) for example in examples))
