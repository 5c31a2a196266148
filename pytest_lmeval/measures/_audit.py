"""Read a part of the measured data a second time, whole and alone, and refuse the measurement where the two readings differ.

The laws are tried on short random tokens; what is measured is longer, and real. So a twentieth of the work goes into trying
the same claim on the data itself: a text has the same losses in other chunks (`TextAudit`), and an answer the same
log-probabilities whichever others are read beside it or share its prefix (`TaskAudit`). The laws tell rounding from faults.
What is read a second time depends on counts of tokens and calls, never on a clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec import structs

from pytest_lmeval.data._tokens import TokenReader
from pytest_lmeval.engine import Chunk, Engine, Policy, Request
from pytest_lmeval.engine._policy import default_chunk_size
from pytest_lmeval.engine._tokens import Tokens
from pytest_lmeval.engine._tree import tree
from pytest_lmeval.errors import LawBroken, LmevalError, NotPossible, Refused
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import CONSISTENT, Audit, Certificate
from pytest_lmeval.records._example import Example
from pytest_lmeval.scoring._loss_accumulator import Beginning, LossAccumulator

if TYPE_CHECKING:
    from pytest_lmeval.laws._tolerance import Excess

SHARE = 1 / 20  # of the work of a measurement that its audit may take
CALL = 46  # cost of a call, in tokens that could be read instead
WHOLE = 16  # chunks read in one call: attention to n tokens takes no more memory than the text, if n is a twentieth of it
KEPT = 1 << 16  # tokens of a text of unknown length that are kept to be read again
BETWEEN = 0.382  # of a chunk: pieces shorter than a multiple of it by so much end between the chunks
COURSE = 64  # tokens read after the first wrong one, to see how the error goes on


@dataclass(frozen=True)
class Answered:
    """A question and what was read for it: tokens, and the log-probability of each requested one, as it was measured."""

    example: Example
    readings: Sequence[tuple[Request, np.ndarray]] = ()


def excess_of(found: np.ndarray, again: np.ndarray, lm: Model, rounding: float | None) -> Excess:
    """How far the losses [n] or [n, s] of a measurement are from those of a second reading, and how far they may be by the
    tolerance of the laws; `rounding` is the largest error of a full run in the probe."""
    from pytest_lmeval.laws._tolerance import Reference

    expected = torch.from_numpy(again).reshape(len(again), -1)
    reference = Reference(expected, torch.full((len(again),), rounding or 0.0, dtype=torch.float64), lm.dtype)
    return reference.measure(torch.from_numpy(found).reshape(len(found), -1))


class TextAudit:
    """Reads the beginning of a text again while it is streamed: once across the first two boundaries between its chunks, and
    once as far as the share of the work pays for. What it needs and finds is in the `beginning` of the sums.

    It reads in one call, where that fits, else in pieces that end between the chunks. Where chunks are longer than what the
    probe read, one call may be as wrong as they are, so the end is read in pieces of a length that was tried.

    expected  () -> the number of targets of the whole text; None if unknown: then each reading goes twice as far as the last
    name      of the text
    """

    def __init__(self, engine: Engine, sums: LossAccumulator, expected: Callable[[], int | None], name: str) -> None:
        self.engine, self.sums, self.expected, self.name = engine, sums, expected, name
        lm, policy, certificate, self.chunk = engine.lm, engine.policy, engine.policy.certificate, engine.chunk_size
        window = math.inf if policy.windows is None else policy.windows.size
        self.on = certificate is not None and policy.carry and self.chunk < window
        self.may_interrupt = certificate is not None and "fork" in certificate.with_status("kept")
        tried = 0 if certificate is None or policy.single else certificate.longest // policy.multiple * policy.multiple
        self.tried = tried if tried < self.chunk else 0
        self.books = 1 if lm.codebooks is None else len(lm.codebooks.scored)
        self.first = 2 * self.chunk + self.chunk // 8 + 1
        self.whole = int(min(max(WHOLE * self.chunk, default_chunk_size(lm)), policy.longest or math.inf, lm.limit or math.inf))
        self.piece = self._between(self.whole)
        self.longest = min(window, math.inf if self.piece not in (0, self.chunk) else self.whole)

    def _between(self, most: int) -> int:
        """The length of pieces of at most so many tokens that end elsewhere than the chunks; 0 if there is none."""
        multiple = self.engine.policy.multiple
        return 0 if self.engine.policy.single else max(0, most - round(BETWEEN * self.chunk)) // multiple * multiple

    @property
    def result(self) -> Audit | None:
        """What was read again; None if nothing was."""
        found = self.sums.beginning
        if not found.tokens:
            return None
        return Audit(tokens=found.tokens, difference=found.difference, share=found.work / self._work(self.sums.tokens))

    def watched(self, reader: TokenReader) -> Iterator[Tokens]:
        """The tokens of a sequence, of which the beginning is kept."""
        at, kept = reader.skip, self.sums.beginning
        for part in reader:
            if self.on and not kept.complete and at <= kept.held < (room := self._room):
                kept.hold(part.ids[kept.held - at : room - at].copy())
            at += len(part)
            yield part

    def add(self, chunk: Chunk) -> None:
        """Note the losses of the next chunk, and read the beginning again when it is time. Raises Refused if it differs."""
        kept = self.sums.beginning
        if self.on and not kept.complete:
            if chunk.window == 0 and chunk.start == kept.scored + 1:
                kept.score(chunk.nll[: max(0, kept.held - 1 - kept.scored)])
            if self.may_interrupt:  # another sequence may be read before this one is continued
                self._read_again(ended=False)

    def end(self) -> None:
        """End a sequence."""
        if self.on and not self.sums.beginning.complete:
            self._read_again(ended=True)

    @property
    def _room(self) -> int:
        """Tokens of a sequence to keep."""
        return 1 + int(min(self.longest, max(KEPT, self.first, self._affordable)))

    def _work(self, targets: int) -> float:
        """Tokens and calls of a text with so many targets."""
        windows, tokens = self.engine.policy.windows, targets / self.books
        if windows is not None:
            tokens += max(0, math.ceil((tokens - windows.size) / (windows.size - windows.overlap))) * windows.overlap
        return tokens + CALL * math.ceil(tokens / self.chunk)

    @property
    def _affordable(self) -> int:
        """The longest beginning that may be read again now."""
        left = SHARE * self._work(self.expected() or self.sums.tokens) - self.sums.beginning.work - CALL
        if self.tried:
            left -= CALL * math.ceil(self.chunk / self.tried)
        if left > self.whole and self.piece:
            left = self.whole + (left - self.whole) * self.piece / (self.piece + CALL)
        return max(0, int(left))

    def _goal(self, *, ended: bool) -> int:
        """How many tokens to read again next; 0: no more."""
        kept, affordable = self.sums.beginning, self._affordable
        if not kept.tokens or (kept.tokens <= 2 * self.chunk and kept.scored >= self.first):  # whatever it costs
            early = not ended and (affordable >= 4 * self.first or not self.expected())
            goal = self.first if early else max(self.first, affordable)
        else:
            further = 2 * kept.tokens  # or all of another document
            goal = affordable if affordable >= (min(kept.scored, further) if ended else further) else 0
        return int(min(goal, self.longest))

    def _read_again(self, *, ended: bool) -> None:
        """Read again as far as is due, and drop what was kept if there will be no more."""
        kept, goal = self.sums.beginning, self._goal(ended=ended)
        length = min(goal, kept.scored)
        if (length == goal or ended or kept.scored >= self._room - 1) and self._worth(length):
            self._compare(length)
        furthest = min(self._room - 1, self._affordable if self.expected() else KEPT)
        if ended or (kept.again and not self._worth(furthest)):
            kept.drop()

    def _worth(self, length: int) -> bool:
        """Whether a further reading of so many tokens is new enough."""
        again = self.sums.beginning.again
        return length > max(self.chunk, again) and (length >= 2 * again or length == self.longest)

    def _compare(self, length: int) -> None:
        kept, lm, certificate = self.sums.beginning, self.engine.lm, self.engine.policy.certificate
        assert certificate is not None
        began = time.perf_counter()
        ids, found = np.concatenate(kept.ids)[: length + 1], np.concatenate(kept.nll)[:length]
        with _peak_apart(lm, kept):
            again, sizes = self._again(ids, length)
        excess = excess_of(found, again, lm, certificate.rounding)
        if not excess.tolerance_ratio <= 1 and (broken := self._broken(ids, found, sizes, excess)):
            pieces = ", ".join([*map(str, sizes[:4]), *["..."] * (len(sizes) > 4)])
            raise Refused(
                f"{lm.spec} is {certificate.summary}, and {self.name} contradicts it: its first {length:,} tokens, in chunks "
                f"of {self.chunk}, were read again in pieces of {pieces}, and the loss after token {excess.position} differs "
                f"by {excess.error:.3g} nats (allowed {excess.allowed:.2g}).\n{broken}\nIts perplexity would be wrong, and may "
                "look good: nothing is reported. Repair its state, or read windows that carry none: window=512."
            )
        kept.again, kept.tokens = length, max(kept.tokens, length)
        kept.difference = max(kept.difference, excess.error)
        kept.work += length + CALL * len(sizes)
        kept.seconds += time.perf_counter() - began

    def _again(self, ids: np.ndarray, length: int) -> tuple[np.ndarray, list[int]]:
        """The losses in the longest pieces that the model reads, and their lengths."""
        most = min(self.whole, length)
        for smaller in (most // 2, most // 4, most // 8):
            if self._between(smaller) in (0, self.chunk):
                break
            try:
                sizes = self._sizes(length, most)
                return _losses(self.engine.lm, ids, sizes), sizes
            except LmevalError:
                raise
            except Exception:  # noqa: BLE001 - it does not fit the memory, or the model reads no calls of this length
                most = smaller
        sizes = self._sizes(length, most)
        return _losses(self.engine.lm, ids, sizes), sizes

    def _sizes(self, length: int, most: int) -> list[int]:
        """The lengths of pieces of at most so many tokens."""
        end = min(self.chunk, length // 4) if self.tried else 0
        head = (length - end) // self.engine.policy.multiple * self.engine.policy.multiple if end else length
        parts = [(head, head if head <= most else self._between(most)), (length - head, self.tried)]
        return [min(size, total - at) for total, size in parts for at in range(0, total, max(size, 1))]

    def _broken(self, ids: np.ndarray, found: np.ndarray, sizes: list[int], excess: Excess) -> str | None:
        """The law that is broken on this text, with its counterexample; None if rounding explains the difference."""
        lm, chunk = self.engine.lm, self.chunk
        wrong = next((at for at, ratio in enumerate(excess.profile.tolist()) if ratio > 1), excess.position)
        length = min(len(found), wrong + 1 + COURSE)
        for cuts in (range(chunk, length, chunk), [end for end in accumulate(sizes) if end < length]):
            last = max((cut for cut in cuts if cut <= wrong), default=chunk)
            if cuts and (broken := law_broken(lm, "splits", ids[:length], cuts, last)):
                return broken
        chunks = [min(chunk, length - at) for at in range(0, length, chunk)]
        same = excess_of(found[:length], _losses(lm, ids, chunks), lm, None)
        where = f"read in the same chunks once more, it was off by {same.error:.3g} nats at token {same.position}"
        return None if same.tolerance_ratio <= 1 else f"  repeat: {where}. It is not deterministic, or keeps something."


def _losses(lm: Model, ids: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The losses of the beginning of a text that is read in pieces of these lengths."""
    state, at, parts = None, 0, list[np.ndarray]()
    for size, pieces in groupby(sizes):
        end = at + size * len(list(pieces))
        last = end + (lm.codebooks is None)  # a target
        for chunk in Engine(lm, Policy(chunk_size=size)).stream(ids[at:last], state=state, position=at):
            state = chunk.state
            parts.append(chunk.nll)
        at = end
    return np.concatenate(parts)


@contextmanager
def _peak_apart(lm: Model, kept: Beginning) -> Iterator[None]:
    """Leave what is allocated in the block out of the peak of the device's memory."""
    on_cuda = lm.device.type == "cuda"
    if on_cuda:
        kept.peak_bytes = max(kept.peak_bytes, torch.cuda.max_memory_allocated(lm.device))
    yield
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(lm.device)


class TaskAudit:
    """Reads answered questions again, each of their requests whole and alone, and compares the log-probabilities.

    By the hashes of the questions, first those that shared a prefix, it takes as many of a block as the share of the work pays
    for, and one at least of the second block, in which more are read together than in the first. Answers wait for it: none is
    kept before one was read again.

    name     of the task
    work     tokens and calls of the second readings, in tokens
    found    what was read again; its share is not known before the end
    audited  the examples that were read again, by number
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name, self.work, self.seconds, self.found = engine, name, 0, 0.0, Audit()
        self.audited: dict[int, Example] = {}
        self._waiting: list[Answered] = []
        self._alone = replace(engine.policy, fork=False, batch_size=1, invariant=False, certificate=None)

    def result(self, examples: Sequence[Example]) -> Audit | None:
        """What was read again of these; None if nothing was."""
        share = self.work / max(1.0, self._work(examples))
        return structs.replace(self.found, share=share) if self.found.questions or self.found.answers else None

    def add(self, example: Example, requests: Sequence[Request]) -> None:
        """Count an answer of an interrupted run."""
        if example.audited is not None:
            chosen = bool(example.choices)
            self._count(chosen, example.audited, _cost(requests) if chosen else example.read + example.saved + CALL)

    def block(self, answers: Sequence[Answered], earlier: Sequence[Example]) -> list[Example]:
        """The examples that may be kept after this block. Raises Refused for one that differs from what it is alone."""
        first = not (self._waiting or self.found.questions or self.found.answers)
        if first and self._comparable(answers):
            self._waiting = list(answers)
            return []
        return self._kept(answers, [*earlier, *(answered.example for answered in answers)])

    def end(self, examples: Sequence[Example]) -> list[Example]:
        """The examples that may be kept after the last block."""
        return self._kept([], examples)

    def _kept(self, answers: Sequence[Answered], examples: Sequence[Example]) -> list[Example]:
        """Read again as many of the answers as are due, and return those that waited for it too; `examples` are all so far."""
        work = self._work(examples)
        for answered in self._comparable(answers) or self._comparable(self._waiting):
            chosen = bool(answered.example.choices)
            cost = _cost([request for request, _ in answered.readings])
            if not (self.found.questions if chosen else self.found.answers) or self.work + cost <= SHARE * work:
                began = time.perf_counter()
                difference = self._compare(answered)
                self.seconds += time.perf_counter() - began
                self._count(chosen, difference, cost)
                self.audited[answered.example.number] = structs.replace(answered.example, audited=difference)
        kept, self._waiting = [answered.example for answered in (*self._waiting, *answers)], []
        return [self.audited.get(example.number, example) for example in kept]

    def _comparable(self, answers: Sequence[Answered]) -> list[Answered]:
        """Those that were read otherwise than whole and alone, in the order in which they are read again."""
        found = [answered for answered in answers if answered.readings and self._may_differ(answered.example)]
        return sorted(found, key=lambda answered: (not answered.example.saved, answered.example.key))

    def _may_differ(self, example: Example) -> bool:
        """Whether it was answered otherwise than whole and alone."""
        policy = self.engine.policy
        carried = policy.share if example.choices else policy.decode
        return policy.certificate is not None and self.engine.executor is None and (carried or policy.batch_size > 1)

    def _work(self, examples: Sequence[Example]) -> float:
        counts = self.engine.counts
        return sum(example.read for example in examples) + counts.padding + CALL * counts.calls

    def _count(self, chosen: bool, difference: float, cost: int) -> None:
        old = self.found
        self.work += cost
        self.found = Audit(
            questions=old.questions + chosen, answers=old.answers + (not chosen), difference=max(old.difference, difference)
        )

    def _compare(self, answered: Answered) -> float:
        """The largest difference between the two readings of a question, in nats."""
        lm, policy, example = self.engine.lm, self.engine.policy, answered.example
        assert policy.certificate is not None
        differences = []
        again = Engine(lm, self._alone).score([request for request, _ in answered.readings])
        for number, ((request, found), scored) in enumerate(zip(answered.readings, again, strict=True)):
            alone = scored.loglikelihood
            excess = excess_of(found, alone, lm, policy.certificate.rounding)
            if not excess.tolerance_ratio <= 1 and (broken := self._broken(answered, request, found, alone)) is not None:
                what = f"the choice {example.choices[number]!r}" if example.choices else f"the answer {example.output!r}"
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

    def _broken(self, answered: Answered, request: Request, found: np.ndarray, alone: np.ndarray) -> str | None:
        """The laws that are broken on this request, with counterexamples; None if rounding explains the difference.

        A float64 copy decides. The laws do where there is none, and in a mixture of experts, where a tie may fall either way.
        """
        from pytest_lmeval.laws._moe_routing import record_routing
        from pytest_lmeval.laws._tolerance import Reference, token_errors

        lm, ids, certificate = self.engine.lm, request.read, self.engine.policy.certificate
        rounding = certificate.rounding if certificate is not None else None
        one = torch.from_numpy(ids[None]).to(lm.device)
        routed = record_routing(lambda: Engine(lm, self._alone).step(one), rows=1, row=0, sizes=[len(ids)])
        exact = None if routed else self._in_float64(request)
        if exact is not None:
            expected = torch.from_numpy(exact)[:, None]
            error = token_errors(torch.from_numpy(alone)[:, None], expected).clamp(min=rounding or 0.0)
            reference = Reference(expected, error, lm.dtype)
            if reference.measure(torch.from_numpy(found)[:, None]).tolerance_ratio <= 1:
                return None
        context, length = request.context_len, len(ids)
        cuts = sorted({length // 2, context - 1}) if answered.example.choices else list(range(context, length))
        cuts = [cut for cut in cuts if 0 < cut < length] or [max(1, length // 2)]
        laws = [law_broken(lm, "splits", ids, cuts, cuts[0])] if lm.stateful and length > 1 else []
        laws += [law_broken(lm, "rows", ids, cuts, cuts[0], rows=max(2, self.engine.policy.batch_size), padding=3)]
        messages = [law for law in laws if law is not None]
        return None if exact is None and not messages else "".join(f"\n{message}" for message in messages)

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


def law_broken(lm: Model, law: str, ids: np.ndarray, cuts: Sequence[int], cut: int, **company: Any) -> str | None:
    """The message of a law that is broken on these tokens, and a line that tries it again: on random tokens, cut once at `cut`
    or everywhere, if it is broken on these too. None if it is kept."""
    from pytest_lmeval.laws import Case, Harness, check

    case, longest = Case(len(ids), tuple(cuts), **company), len(ids)

    def failure(harness: Harness, case: Case) -> LawBroken | None:
        try:
            check(law, harness, case)
        except LawBroken as broken:
            return broken
        except NotPossible:
            pass
        return None

    if (broken := failure(Harness(lm, longest=longest, text=ids), case)) is None:
        return None
    random = Harness(lm, longest=longest)
    everywhere = f"tuple({cuts!r})" if isinstance(cuts, range) and len(cuts) > 1 else repr(tuple(cuts))
    for simple, shown in ((replace(case, cuts=(cut,)), repr((cut,))), (case, everywhere)):
        if failure(random, simple) is not None:
            others = "".join(f", {name}={value}" for name, value in company.items())
            return f'  {law}: {broken}\n    pytest_lmeval.replay(lm, "{law}", length={longest}, cuts={shown}{others})'
    others = "".join(f", {name}={value}" for name, value in company.items())
    return f'  {law}: {broken}\n    check("{law}", Harness(lm, {longest}, text=ids), Case({longest}, {everywhere}{others}))'


def spread_note(certificate: Certificate | None, audit: Audit | None, policy: Policy) -> list[str]:
    """What a number of 16 bits depends on, beside the model and the data, and by how much."""
    if certificate is None or certificate.verdict != CONSISTENT or policy.invariant:
        return []
    spread, where = ("scores", "") if audit is None else (f"up to {audit.difference:.2g} nats a token", f" ({audit})")
    return [f"{spread} in {certificate.dtype} depend on batch, neighbours and chunks{where}; invariant=True fixes all shapes"]
