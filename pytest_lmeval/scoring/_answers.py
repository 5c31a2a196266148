"""Keep what is read for the questions of a task in a file of JSON lines, a line a batch, so that nothing is read twice.

What a metric or an audit needs is computed anew from it. It is found by the key of its question (model, prompt, choices, seed,
judge) and by the batches that it was read in, and counts once one answer of it was read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pytest_lmeval.engine import Answer, Counts, OnText, Prompt, Results, Scored
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import key_of, replace_or_warn, warn
from pytest_lmeval.records._kept import KeptAnswer, KeptBatch, KeptScored, name_of
from pytest_lmeval.records._replacing import append, regular
from pytest_lmeval.scoring._encoded import EncodedQuestion

Kept: TypeAlias = "KeptScored | KeptAnswer"


class AnswerStore:
    """What one model read for the questions of a task, in the file at `path`; None keeps nothing.

    plan          names how questions are read and, from the first `begin` on, all questions so far: an answer has the same last
                  bits in the same batches
    alone         each request is read alone, whatever the other questions are
    exchangeable  answers that were read in other batches are as good: what batches and shared prefixes change is proven to be
                  rounding
    """

    def __init__(self, path: str | Path | None, plan: str = "", *, alone: bool = False, exchangeable: bool = False) -> None:
        self.path, self.alone, self.exchangeable = None if path is None else Path(path), alone, exchangeable
        self.plan = self._first_plan = plan
        self._kept: dict[str, dict[str, Kept]] = {}  # name of a request -> plan -> what was read for it
        self._audited: dict[tuple[str, str], float] = {}  # (plan, name of a question) -> the difference that an audit found
        self._earlier: set[str] = set()  # names of what was there at the beginning, and was not read since
        for line in self._lines():
            self._add(line)
            self._earlier |= {*line.scored, *line.answers}

    def begin(self, block: Iterable[EncodedQuestion]) -> None:
        """Begin a block of questions. Its batches depend on the blocks before it, too, whose prefixes it shares."""
        if not self.alone:
            self.plan = key_of(plan=[self.plan, *chain.from_iterable(map(names_of, block))])[:12]

    @property
    def has_earlier(self) -> bool:
        """Whether something is there that an earlier call read."""
        return bool(self._earlier)

    def is_earlier(self, question: EncodedQuestion) -> bool:
        return any(name in self._earlier for name in names_of(question))

    def has(self, question: EncodedQuestion) -> bool:
        """Whether all results of the question are there."""
        return len(self._results(question)) == len(question.requests)

    def from_other_batches(self, question: EncodedQuestion) -> bool:
        """Whether all of them are there, and none was read in the batches of this plan."""
        return self.has(question) and not any(self.plan in self._kept[name] for name in names_of(question))

    def _results(self, question: EncodedQuestion) -> dict[str, Kept]:
        """The results of a question by name: those from the batches of this plan, or all from others."""
        there = {name: self._kept[name] for name in names_of(question) if name in self._kept}
        if own := {name: plans[self.plan] for name, plans in there.items() if self.plan in plans}:
            return own
        whole = self.exchangeable and len(there) == len(question.requests)
        return {name: [*plans.values()][-1] for name, plans in there.items()} if whole else {}

    def scored(self, questions: Sequence[EncodedQuestion]) -> Results[Scored]:
        """The results that are there of all scored requests of these questions; new ones are kept."""
        kept = self._results_of(questions)
        names = [name for one in questions for name in names_of(one)[: len(one.scored)]]
        requests = [request for one in questions for request in one.scored]
        found = {
            number: Scored(np.array(one.loglikelihood, dtype=np.float64), one.greedy, one.read, one.state_bytes)
            for number, (name, request) in enumerate(zip(names, requests, strict=True))
            if isinstance(one := kept.get(name), KeptScored) and len(one.loglikelihood) == request.asked
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
            self._write(KeptBatch(plan=self.plan, scored=scored))

        return Results(found, keep)

    def answers(
        self, questions: Sequence[EncodedQuestion], prompts: Sequence[Prompt], judged: OnText | None
    ) -> Results[Answer]:
        """The answers that are there, if the judge, asked anew, says of them what it said then; new ones are kept."""
        kept = self._results_of(questions)
        names = [name for one in questions for name in names_of(one)[len(one.scored) :]]
        found: dict[int, Answer] = {}
        for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            answer = _answer(kept.get(name), prompt)
            if answer is not None and (judged is None or judged(number, answer.text) == answer.judged):
                found[number] = answer

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
                    thought=one.thought,
                )
                for number, one in new.items()
            }
            self._write(KeptBatch(plan=self.plan, answers=answers))

        return Results(found, keep)

    def _results_of(self, questions: Sequence[EncodedQuestion]) -> dict[str, Kept]:
        """The results that are there of the requests of these questions, by name."""
        return {name: kept for one in questions for name, kept in self._results(one).items()}

    def audited(self, question: str) -> float | None:
        """The difference that an audit found for a question in the batches of this plan."""
        return self._audited.get((self.plan, question))

    def keep_audited(self, question: str, difference: float) -> None:
        self._write(KeptBatch(plan=self.plan, audited={question: difference}))

    def forget(self) -> None:
        """Delete everything: it may be wrong."""
        self._kept, self._audited, self._earlier, self.plan = {}, {}, set(), self._first_plan
        for file in self._files():
            with suppress(OSError):
                file.unlink()

    def _add(self, line: KeptBatch) -> None:
        for name, kept in (line.scored | line.answers).items():
            plans = self._kept.setdefault(name, {})
            plans.pop(line.plan, None)  # the last one is the latest
            plans[line.plan] = kept
        self._audited |= {(line.plan, question): difference for question, difference in line.audited.items()}

    def _lines(self) -> Iterable[KeptBatch]:
        """The lines of this file, and of those of the ranks of a run. Warns of a broken line, and skips it."""
        for file in self._files():
            try:
                lines = regular(file).read_bytes().splitlines()
            except FileNotFoundError:
                continue
            except OSError as error:
                warn(f"{file} cannot be read ({error.strerror or error}); its questions are asked again.")
                continue
            for number, line in enumerate(lines, start=1):
                try:
                    yield schema.convert(schema.parse(line, "", ""), KeptBatch)
                except ValueError as error:
                    warn(f"{file}, line {number} is broken ({type(error).__name__}); what it held is read again.")

    def _files(self) -> list[Path]:
        """This file, and those of the ranks of a run."""
        if self.path is None:
            return []
        name = self.path.stem.partition("-rank")[0]
        return list(dict.fromkeys([self.path, *sorted(self.path.parent.glob(f"{name}*.jsonl"))]))

    def _write(self, line: KeptBatch) -> None:
        """Append a line. If that fails, warn and keep no more."""
        self._add(line)
        self._earlier -= {*line.scored, *line.answers}
        if self.path is None or not (line.scored or line.answers or line.audited):
            return
        try:
            append(self.path, schema.line_of(line).encode(), sync=False)  # a process that is killed loses nothing
        except OSError as error:
            why = error.strerror or error
            warn(f"{self.path} cannot be written ({why}); the questions are asked on. If interrupted, they are asked again.")
            self.path = None


def _answer(kept: Kept | None, prompt: Prompt) -> Answer | None:
    """What was kept as an answer to the prompt; None for what can be none."""
    if not isinstance(kept, KeptAnswer) or not kept.why or not len(kept.ids) == len(kept.logprobs) <= prompt.max_tokens:
        return None
    ids, logprobs, counts = list(kept.ids), list(kept.logprobs), Counts(*kept.counts)
    answer = Answer(prompt, ids, logprobs, kept.text, [], kept.judged, kept.read, kept.why, counts)
    answer.thought = kept.thought
    return answer


def names_of(question: EncodedQuestion) -> list[str]:
    """The names of its requests."""
    return [name_of(question.number, question.key, index) for index in range(len(question.requests))]


def write_examples(examples: Iterable[Example], file: str | Path) -> None:
    """Write answered questions, in their order, in one move. Warns if that fails."""
    replace_or_warn(Path(file), "".join(schema.line_of(example) for example in examples))
