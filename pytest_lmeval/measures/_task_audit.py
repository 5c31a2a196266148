"""Read answered questions a second time, whole and alone, and refuse the task where an answer depends on the others."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec import structs

from pytest_lmeval.engine import Engine, Policy, Prompt, Request
from pytest_lmeval.engine._policy import CALL
from pytest_lmeval.engine._tree import tree
from pytest_lmeval.errors import Refused
from pytest_lmeval.measures._audit import GROSS, SHARE, UNEXPLAINED, excess_of, law_broken
from pytest_lmeval.models._failures import NoMemory, unless_full
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import Audit
from pytest_lmeval.records._example import Example
from pytest_lmeval.scoring._answers import AnswerStore

if TYPE_CHECKING:
    from pytest_lmeval.laws._tolerance import Excess

# Generated answers that are read again, whatever that costs: rows that share a state may all see that of one of them, which is
# right. The choices of one question are several rows.
LEAST = 2


@dataclass(frozen=True)
class Answered:
    """A question and what was read for it: tokens, and the log-probability of each requested one, as it was measured.

    prompt   of a generated answer
    kept     nothing had to be read: it was there
    earlier  an earlier call read it
    values   its numbers, where another harness scores it (`Requests`)
    """

    example: Example
    readings: Sequence[tuple[Request, np.ndarray]] = ()
    prompt: Prompt | None = None
    kept: bool = False
    earlier: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reading:
    """A request of a question (of its choice of this number), the part of it to read again, and its log-probabilities."""

    number: int
    request: Request
    read: Request
    logprobs: np.ndarray


class TaskAudit:
    """Reads answered questions again, each of their requests whole and alone, and compares the log-probabilities.

    By the hashes of the questions, first those that shared a prefix, it takes as many of a block as the share of the work pays
    for, and one at least (two answers) of the second block, in which more are read together than in the first. What an
    interrupted run read again is not read a third time.

    name     of the task
    store    keeps what was found
    work     tokens and calls of the second readings, in tokens
    full     tokens of the shortest question that did not fit into memory, whole and alone; longer ones are not read again
    found    what was read again; its share is not known before the end
    audited  the examples that were read again, by place
    """

    def __init__(self, engine: Engine, name: str, store: AnswerStore) -> None:
        self.engine, self.name, self.store, self.work, self.seconds = engine, name, store, 0, 0.0
        self.found, self.full = Audit(), 0
        self.audited: dict[tuple[int, int], Example] = {}
        self._waiting: list[Answered] = []
        asked = engine.asked  # without a longest step, one that does not fit into memory is not read in several
        self._alone = Policy(carry=asked.carry and asked.longest is not None, longest=asked.longest, multiple=asked.multiple,
                             single=asked.single, fork=False, batch_size=1)  # fmt: skip

    def result(self, examples: Sequence[Example]) -> Audit | None:
        """What was read again of these; None if nothing was."""
        share = self.work / max(1.0, self._work(examples))
        found = structs.replace(self.found, share=share, full=self.full)
        return found if found.questions or found.answers or found.full else None

    def confirm(self, earlier: Sequence[Answered]) -> None:
        """Read the shortest of these answers of an earlier call again. Raises Refused if it is not the model's."""
        if self.engine.policy.certificate is None or self.engine.executor is not None:
            return
        alone = Engine(self.engine.lm, replace(self._alone, carry=self.engine.asked.carry))  # in pieces, if it has to be
        if not self._readable:
            told = [answered for answered in earlier if answered.prompt is not None]
            shortest = min(told, key=lambda answered: len(answered.example.output or ""))
            assert shortest.prompt is not None
            if (now := alone.generate([shortest.prompt])[0].text) != shortest.example.output:
                said = f"answered {shortest.example.output!r} to {shortest.prompt.name}, and now answers {now!r}"
                raise Refused(f"{self.engine.lm.spec} {said}")
            return
        if told := [answered for answered in earlier if answered.readings]:
            self._compare(min(told, key=lambda answered: max(len(request.ids) for request, _ in answered.readings)), alone)
            return
        prompt = earlier[0].prompt
        assert prompt is not None  # only a generated answer has no token
        if (answer := alone.generate([replace(prompt, max_tokens=1)])[0]).ids:
            raise Refused(f"{self.engine.lm.spec} had no answer to {prompt.name}, and now begins {answer.text!r}")

    def block(self, answers: Sequence[Answered], examples: Sequence[Example]) -> None:
        """Read some of a block again; `examples` are all so far. Raises Refused for one that differs from what it is alone."""
        first = not (self._waiting or self.found.questions or self.found.answers or self.full)
        if first and self._comparable(answers):
            self._waiting = list(answers)
        else:
            self._read_again(self._comparable(answers) or self._comparable(self._waiting), examples)

    def end(self, examples: Sequence[Example]) -> None:
        """Read some of the first block again, if it was the only one."""
        self._read_again(self._comparable(self._waiting), examples)

    def _read_again(self, answers: Sequence[Answered], examples: Sequence[Example]) -> None:
        """Read again as many of the answers as are due."""
        work, self._waiting = self._work(examples), []
        for answered in answers:
            chosen, name = bool(answered.example.choices), f"{answered.example.number} {answered.example.key}"
            cost = sum(_cost([one.read for one in some]) for some in self._readings(answered))
            tokens = max(len(request.read) for request, _ in answered.readings)
            few = not self.found.questions if chosen else self.found.answers < LEAST
            due = few or self.work + cost <= SHARE * work
            if due and not 0 < self.full <= tokens:
                if (difference := self.store.audited(name)) is None:
                    began = time.perf_counter()
                    found = unless_full(partial(self._compare, answered))
                    self.seconds += time.perf_counter() - began
                    if isinstance(found, NoMemory):
                        self.full = tokens
                        continue
                    difference = found
                    self.store.keep_audited(name, difference)
                self._count(chosen, difference, cost)
                self.audited[answered.example.place] = structs.replace(answered.example, audited=difference)

    def _comparable(self, answers: Sequence[Answered]) -> list[Answered]:
        """Those that were read otherwise than whole and alone, in the order in which they are read again."""
        found = [answered for answered in answers if answered.readings and self._may_differ(answered)]
        return sorted(found, key=lambda answered: (not answered.example.saved, answered.example.key))

    def _readings(self, answered: Answered) -> list[list[_Reading]]:
        """What to read again, apart: the requests; and of those that are longer than what the probe read the beginning, to the
        first requested token, where a model that sees its future differs."""
        whole = [_Reading(number, request, request, logprobs) for number, (request, logprobs) in enumerate(answered.readings)]
        beginnings = [
            replace(one, read=Request(one.request.ids[: one.request.context_len + 1], one.request.context_len))
            for one in whole
            if self._is_long(one.request) and one.request.asked > 1
        ]
        return [whole, beginnings] if beginnings else [whole]

    def _is_long(self, request: Request) -> bool:
        certificate = self.engine.policy.certificate
        return certificate is not None and 0 < certificate.longest < len(request.read)

    def _may_differ(self, answered: Answered) -> bool:
        """Whether it was answered otherwise than whole and alone, or at a length that was not tried."""
        policy = self.engine.policy
        carried = policy.share if answered.example.choices else policy.decode
        other = carried or policy.batch_size > 1 or any(self._is_long(request) for request, _ in answered.readings)
        return policy.certificate is not None and self.engine.executor is None and self._readable and other

    @property
    def _readable(self) -> bool:
        """Whether what was answered can be read again: some servers give no log-probabilities of a text."""
        served = self.engine.lm.served
        return served is None or not served.facts.no_scores

    def _work(self, examples: Sequence[Example]) -> float:
        counts = self.engine.counts
        return sum(example.read for example in examples) + counts.padding + CALL * counts.calls

    def _count(self, chosen: bool, difference: float, cost: int) -> None:
        old = self.found
        self.work += cost
        self.found = Audit(
            questions=old.questions + chosen, answers=old.answers + (not chosen), difference=max(old.difference, difference)
        )

    def _compare(self, answered: Answered, second: Engine | None = None) -> float:
        """The largest difference between the two readings of a question, in nats."""
        lm, policy, example = self.engine.lm, self.engine.policy, answered.example
        assert policy.certificate is not None
        differences, second = [], second or Engine(lm, self._alone)
        pairs = [
            (one, again)
            for some in self._readings(answered)
            for one, again in zip(some, second.score([one.read for one in some]), strict=True)
        ]
        for one, scored in pairs:
            found, alone = one.logprobs[: one.read.asked], scored.loglikelihood
            excess = excess_of(found, alone, lm, policy.certificate.rounding)
            broken = None
            if not excess.tolerance_ratio <= 1:
                tried = unless_full(partial(self._broken, answered, one, found, alone, excess))
                broken = f"\n{UNEXPLAINED}" if isinstance(tried, NoMemory) else tried
            if broken is not None:
                what = f"the choice {example.choices[one.number]!r}" if example.choices else f"the answer {example.output!r}"
                raise Refused(
                    f"{lm.spec} is {policy.certificate.summary}, and {self.name} contradicts it: row {example.number} "
                    f"({example.id}) was read again, whole and alone. In batches of up to {policy.batch_size}, with "
                    f"{policy.sharing}, {what} had a log-likelihood of {found.sum():.6g}, and has {alone.sum():.6g} alone: off "
                    f"by {excess.error:.3g} nats at one token (allowed {excess.allowed:.2g}).{broken}\nAn answer would depend "
                    "on the others, and may look good: nothing is reported. Repair what rows or copies of a state share, or "
                    "read each question alone: invariant=True."
                )
            differences.append(excess.error)
        return max(differences)

    def _broken(self, answered: Answered, one: _Reading, found: np.ndarray, alone: np.ndarray, excess: Excess) -> str | None:
        """The laws that are broken on this request, with counterexamples; None if rounding explains the difference.

        A float64 copy decides. The laws do where there is none, and in a mixture of experts, where a tie may fall either way.
        """
        from pytest_lmeval.laws._moe_routing import record_routing
        from pytest_lmeval.laws._tolerance import Reference, token_errors

        lm, ids, certificate = self.engine.lm, one.request.read, self.engine.policy.certificate
        if lm.served is not None:
            return f"\n{law_broken(self.engine, 'rows', ids, [1], 1)}"
        rounding = certificate.rounding if certificate is not None else None
        row = torch.from_numpy(ids[None]).to(lm.device)
        routed = record_routing(lambda: Engine(lm, self._alone).step(row), rows=1, row=0, sizes=[len(ids)])
        exact = None if routed else self._in_float64(one.read)
        if exact is not None:
            expected = torch.from_numpy(exact)[:, None]
            error = token_errors(torch.from_numpy(alone)[:, None], expected).clamp(min=rounding or 0.0)
            reference = Reference(expected, error, lm.dtype)
            if reference.measure(torch.from_numpy(found)[:, None]).tolerance_ratio <= 1:
                return None
        context, length = one.request.context_len, len(ids)
        cuts = sorted({length // 2, context - 1, context}) if answered.example.choices else list(range(context, length))
        cuts = [cut for cut in cuts if 0 < cut < length] or [max(1, length // 2)]
        company: list[tuple[str, dict[str, int]]] = [("rows", {"rows": max(2, self.engine.policy.batch_size), "padding": 3})]
        if length > 1:
            company += [("prefix", {})] + ([("splits", {}), ("fork", {})] if lm.stateful else [])
        laws = [law_broken(self.engine, law, ids, cuts, cuts[0], **others) for law, others in company]
        messages = [law for law in laws if law is not None]
        explained = exact is None and not messages and (routed or excess.tolerance_ratio <= GROSS)
        return None if explained else "".join(f"\n{message}" for message in messages)

    @cached_property
    def _float64_copy(self) -> Model | None:
        from pytest_lmeval.laws._weights import float64_copy

        return float64_copy(self.engine.lm)

    def _in_float64(self, request: Request) -> np.ndarray | None:
        """The log-likelihoods of a float64 copy; None if there is none that reads."""
        if (copy := self._float64_copy) is None:
            return None
        try:
            return Engine(copy, self._alone).score([request])[0].loglikelihood
        except Exception:  # noqa: BLE001 - kernels or held states of one precision
            return None


def _cost(requests: Sequence[Request]) -> int:
    """Tokens and calls of reading each alone, in tokens; one that is a prefix of another is read with it."""
    return sum(len(node.ids) + CALL for node in tree(requests, step=math.inf))
