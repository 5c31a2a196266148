"""The laws, each a function of a subject and a case that raises `LawBroken` with what it saw.

splits      stepping pieces gives the logits of stepping the whole, wherever it is cut
steps       so does stepping one token at a time (apart: many models have a second code path for it)
causality   what comes later changes nothing before: bit-equal
isolation   a sequence is read the same after any other one: bit-equal; and the weights are as they were
prefix      the beginning of a sequence reads the same, however long the whole is
fork        two continuations of one state do not see each other
rows        two sequences side by side read as each does alone
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pytest_lmeval.equivalence.strategies import Case
from pytest_lmeval.equivalence.tolerance import Excess, Yardstick, log_probabilities, token_errors
from pytest_lmeval.equivalence.twin import twin
from pytest_lmeval.lm import Model, ModelError, fork
from pytest_lmeval.stream import NotFiniteError


class LawBroken(AssertionError):
    """A case on which a model breaks a law."""


class NotPossible(Exception):
    """A law that cannot be tried on this model."""


@dataclass
class Subject:
    """The model on trial, with what is worth computing once: its twin, and a yardstick a sequence."""

    lm: Model
    yardsticks: dict[tuple[int, int], Yardstick] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self) -> None:
        self.reference = twin(self.lm) if self.lm.dtype != torch.float64 else None

    @property
    def reference_kind(self) -> str:
        if self.reference is not None:
            return "float64 run of the same weights"
        return "full run in float64" if self.lm.dtype == torch.float64 else "full run, alone and as one of two rows"

    def tokens(self, length: int, seed: int) -> Tensor:
        """[1, length] random ids; a longer sequence of the same seed begins with the shorter one."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.lm.vocab_size, (1, length), generator=generator).to(self.lm.device)

    def run(self, input_ids: Tensor, sizes: list[int], lm: Model | None = None, *, row: int = 0) -> Tensor:
        """[t, v] logits of reading [b, t] in pieces of `sizes`, of one row."""
        state, parts = None, []
        for piece in torch.split(input_ids, sizes, dim=-1):
            with torch.no_grad():
                logits, state = (lm or self.lm).step(piece, state)
            self.calls += 1
            parts.append(logits[row])
        logits = torch.cat(parts)
        if bool((logits.isnan() | logits.isposinf()).any()):  # minus infinity is a token ruled out
            place = int((logits.isnan() | logits.isposinf()).any(-1).nonzero()[0])
            raise NotFiniteError(
                f"{self.lm.spec} gave logits that are no numbers at token {place} of {logits.shape[0]} random ones (id "
                f"{int(input_ids[0, place])}), read in pieces of {sizes if len(sizes) < 9 else len(sizes)}, in {logits.dtype}. "
                "Nothing can be concluded from such a model. Look for an overflow in low precision."
            )
        return logits

    def yardstick(self, case: Case) -> Yardstick:
        key = (case.length, case.seed)
        if key not in self.yardsticks:
            ids = self.tokens(*key)
            full = log_probabilities(self.run(ids, [case.length]))
            if (reference := self._in_float64(ids)) is not None:
                error = token_errors(full, reference)
            else:
                reference = full
                error = token_errors(self._in_other_shape(ids, full), full)
            self.yardsticks[key] = Yardstick(reference, error, self.lm.dtype)
        return self.yardsticks[key]

    def _in_float64(self, ids: Tensor) -> Tensor | None:
        if self.reference is None:
            return None
        try:
            return log_probabilities(self.run(ids, [ids.shape[-1]], self.reference))
        except Exception:  # noqa: BLE001 - kernels or held states of one precision: there is no reference to be had
            self.reference = None
            return None

    def _in_other_shape(self, ids: Tensor, full: Tensor) -> Tensor:
        try:
            return log_probabilities(self.run(ids.expand(2, -1), [ids.shape[-1]]))
        except Exception:  # noqa: BLE001 - a model of single rows: its own rounding is not known, the floor alone counts
            return full

    def compare(self, law: str, case: Case, logits: Tensor, other: Tensor | None = None) -> Excess:
        excess = self.yardstick(case).measure(logits, other)
        self.worst[law] = max(self.worst.get(law, 0.0), excess.ratio)
        return excess


def splits(subject: Subject, case: Case) -> None:
    logits = subject.run(subject.tokens(case.length, case.seed), case.sizes)
    _within(subject.compare("splits", case, logits), case)


def steps(subject: Subject, case: Case) -> None:
    single = Case(case.length, tuple(range(1, case.length)), case.seed)
    logits = subject.run(subject.tokens(case.length, case.seed), single.sizes)
    _within(subject.compare("steps", case, logits), f"{case.length} tokens (seed {case.seed}), one at a time")


def causality(subject: Subject, case: Case) -> None:
    ids = subject.tokens(case.length, case.seed)
    cut = case.cuts[0]
    other = ids.clone()
    other[:, cut:] = (ids[:, cut:] + 1) % subject.lm.vocab_size
    before, after = (subject.run(x, [case.length])[:cut] for x in (ids, other))
    if torch.equal(before, after):
        return
    first = int((before != after).any(dim=-1).nonzero()[0])
    error = float((before.double() - after.double()).abs().max())
    raise LawBroken(
        f"changing the tokens from position {cut} on (of {case.length}, seed {case.seed}) changed the logits of position "
        f"{first} before it, by up to {error:.3g}. The model sees its future; its perplexity says nothing."
    )


def isolation(subject: Subject, case: Case) -> None:
    ids, others = subject.tokens(case.length, case.seed), subject.tokens(case.length, case.seed + 1000)
    sizes = case.sizes if subject.lm.stateful else [case.length]
    first = subject.run(ids, sizes)
    subject.run(others, sizes)
    again = subject.run(ids, sizes)
    if torch.equal(first, again):
        return
    error = float((first.double() - again.double()).abs().max())
    raise LawBroken(
        f"{case} gave other logits after another sequence was read in between: off by {error:.3g}. Something is "
        "left over from one sequence to the next, or the model is not deterministic."
    )


def prefix(subject: Subject, case: Case) -> None:
    cut = case.cuts[-1]
    alone = subject.run(subject.tokens(cut, case.seed), [cut])
    excess = subject.compare("prefix", case, alone)
    if not excess.share <= 1:
        raise LawBroken(
            f"the first {cut} of {case.length} tokens (seed {case.seed}) read alone are off by {excess.error:.3g} nats at "
            f"token {excess.position}, allowed {excess.allowed:.2g}. What a token costs depends on how long the text is."
        )


def fork_(subject: Subject, case: Case) -> None:
    ids, cut = subject.tokens(case.length, case.seed), case.cuts[0]
    other = (ids[:, cut:] + 1) % subject.lm.vocab_size
    with torch.no_grad():
        _, state = subject.lm.step(ids[:, :cut])
        try:
            branch = fork(state)
            straight, _ = subject.lm.step(ids[:, cut:], fork(state))
            subject.lm.step(other, state)
            after, _ = subject.lm.step(ids[:, cut:], branch)
        except (ModelError, TypeError, RuntimeError) as error:
            raise NotPossible(f"its state cannot be forked ({str(error).splitlines()[0][:200]})") from error
    subject.calls += 4
    if not torch.equal(straight, after):
        off = float((straight.double() - after.double()).abs().max())
        raise LawBroken(
            f"two continuations of one state after {cut} of {case.length} tokens (seed {case.seed}) saw each other: off by "
            f"{off:.3g}. A copy of the state shares something with it."
        )


def rows(subject: Subject, case: Case) -> None:
    ids, other = subject.tokens(case.length, case.seed), subject.tokens(case.length, case.seed + 1000)
    sizes = case.sizes if subject.lm.stateful else [case.length]
    alone = subject.run(ids, sizes)
    for row, pair in enumerate(([ids, other], [other, ids])):
        try:
            together = subject.run(torch.cat(pair), sizes, row=row)
        except Exception as error:
            raise NotPossible(f"it does not read two rows at once ({type(error).__name__}: {str(error)[:200]})") from error
        excess = subject.compare("rows", case, together, alone)
        if not excess.share <= 1:
            raise LawBroken(
                f"{case}, as row {row} of two: off by {excess.error:.3g} nats at token {excess.position}, allowed "
                f"{excess.allowed:.2g}. A row depends on its neighbour."
            )


LAWS: dict[str, Callable[[Subject, Case], None]] = {
    "splits": splits,
    "steps": steps,
    "causality": causality,
    "isolation": isolation,
    "prefix": prefix,
    "fork": fork_,
    "rows": rows,
}
NEED_STATE = frozenset({"splits", "steps", "fork"})


def _within(excess: Excess, case: Case | str) -> None:
    if not excess.share <= 1:
        raise LawBroken(
            f"{case}: log-probabilities off by {excess.error:.3g} nats at token {excess.position}, allowed "
            f"{excess.allowed:.2g}. The state does not carry what was read before."
        )
