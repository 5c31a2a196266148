"""A model on harness: it is read from in pieces, and what is worth computing once is kept (its twin, a yardstick a sequence).

harness = Harness(as_model(my_model))
excess = harness.compare("splits", 0, harness.tokens(40, seed=0), sizes=[20, 20])
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pytest_lmeval.engine import Engine, Policy
from pytest_lmeval.errors import ModelError, NotFiniteError
from pytest_lmeval.laws._float64_copy import round_weights, twin
from pytest_lmeval.laws._moe_routing import recorded, until_first_tie
from pytest_lmeval.laws._sequences import beside, drawn
from pytest_lmeval.laws._tolerance import Excess, Yardstick, log_probabilities, token_errors
from pytest_lmeval.models._model import Model

LONGEST = 160
RAW = Policy()  # nothing is proven before it is tried
FEW = 24  # tokens that are read one by one
NO_ROUNDING = 1 << 14  # roundings; where a full run is further than that from its reference, a router may have flipped
NOT_EXPLAINED = 1e3  # times what one rounding of the weights does: an error that rounding cannot be blamed for
MEMORY = (torch.OutOfMemoryError, MemoryError)  # say nothing about a model


class Raised(Exception):
    """The model raised where it had no reason to; the message says what it was reading."""


@dataclass
class Harness:
    """longest  tokens of the sequence that references are computed on; a shorter one is a beginning of it
    worst    the comparison that took most of its allowance, law by law
    calls    steps of the model and of its twin so far
    flips    tokens at which experts were chosen otherwise because two of them were as good
    """

    lm: Model
    longest: int = LONGEST
    worst: dict[str, tuple[Excess, str]] = field(default_factory=dict)
    calls: int = 0
    flips: int = 0
    yardsticks: dict[int, Yardstick] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reference = twin(self.lm) if self.lm.dtype != torch.float64 else None
        self._untouched = twin(self.lm, None)
        self._logits_dtype = self.lm.dtype

    @property
    def reference_kind(self) -> str:
        if self.reference is not None:
            return "float64 run of the same weights"
        return "full run in float64" if self.lm.dtype == torch.float64 else "full run, alone and as one of two rows"

    def tokens(self, length: int, seed: int) -> Tensor:
        """[1, t] ids, or [1, k, t] codes, of a seed (see `laws._sequences.drawn`)."""
        return drawn(self.lm, length, seed)

    def run(self, input_ids: Tensor, sizes: list[int], *, row: int = 0, lm: Model | None = None) -> Tensor:
        """[t, v] log-probabilities of one row, read in pieces of `sizes`. Raises Raised where the model does."""
        return log_probabilities(self.logits(input_ids, sizes, row=row, lm=lm))

    def logits(self, input_ids: Tensor, sizes: list[int], *, row: int = 0, lm: Model | None = None) -> Tensor:
        """[t, v] logits of one row, as the model gave them; [t, s, v] of frames, zeros where they are about none."""
        pieces, parts, seen = torch.split(input_ids, sizes, dim=-1), list[Tensor](), 0
        try:
            for logits, _ in Engine(lm or self.lm, RAW).steps(pieces):
                if lm is None:
                    self._logits_dtype = logits.dtype
                parts.append(self._place_first(logits[row], seen))
                seen += logits.shape[-2]
        except MEMORY:
            raise
        except Exception as error:
            batch = "" if input_ids.shape[0] == 1 else f" in each of {input_ids.shape[0]} rows"
            what = str(error).strip().splitlines()
            raise Raised(
                f"raised {type(error).__name__} when it read {pieces[len(parts)].shape[-1]} token(s) after {seen}{batch}"
                f"{': ' + what[0][:300] if what else ''}"
            ) from error
        finally:
            self.calls += min(len(parts) + 1, len(pieces))
        return torch.cat(parts)

    def _place_first(self, logits: Tensor, seen: int) -> Tensor:
        if self.lm.codebooks is None:
            return logits
        places = seen + torch.arange(logits.shape[1], device=logits.device)
        delays = torch.tensor(self.lm.codebooks.delays, device=logits.device)
        return logits.transpose(0, 1).masked_fill((places[:, None] < delays)[..., None], 0.0)

    def reach(self, longest: int) -> str | None:
        """Find the longest sequence that can be read in one piece, up to `longest`; where it is shorter, say why."""
        self.longest = longest
        try:
            self.yardstick(0)
            return None
        except Raised as raised:
            why = raised
        good, bad = 0, longest
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                self.run(self.tokens(middle, 0), [middle])
                good = middle
            except Raised as raised:
                bad, why = middle, raised
        if good < 2:
            raise ModelError(f"{self.lm.spec} cannot be tried: it {why}.") from why
        self.longest = good
        return f"it reads at most {good} tokens in one piece: it {why}"

    def fresh(self) -> Model | None:
        """A copy of the model that has never read anything; None where it cannot be copied."""
        return twin(self._untouched, None) if self._untouched is not None else None

    @functools.cached_property
    def routes(self) -> bool:
        """Whether tokens are sent to experts."""
        return bool(recorded(lambda: self.logits(self.tokens(4, 0), [4]), rows=1, row=0, pieces=[4]))

    @functools.cached_property
    def reads_rows(self) -> bool:
        """Whether it reads two rows at once, in one piece."""
        try:
            self.logits(beside(self.tokens(4, 0), 2), [4])
        except Raised:
            return False
        return True

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest precision: that of its weights, or of the logits that it gave."""
        return max(self.lm.dtype, self._logits_dtype, key=lambda dtype: torch.finfo(dtype).eps)

    @functools.cached_property
    def goes_on(self) -> int | None:
        """The most tokens that it takes at once after the first piece, right or wrong: None for any number, 1, or 0 for a model
        that raises whenever it is to go on."""
        if not self.lm.stateful:
            return 0
        for most, sizes in ((None, [2, 2]), (1, [2, 1, 1])):
            try:
                self.logits(self.tokens(4, 0), sizes)
                return most
            except Raised:
                continue
        return 0

    def goes_on_past_its_reach(self) -> bool:
        """Whether a sequence longer than the longest piece can be read in pieces."""
        try:
            self.logits(self.tokens(self.longest + 1, 0), [self.longest, 1])
        except Raised:
            return False
        return self.lm.stateful

    def yardstick(self, seed: int, length: int = 0) -> Yardstick:
        """The full run of a seed's longest sequence and its reference; computed once."""
        length = max(length, self.longest)
        if seed not in self.yardsticks or len(self.yardsticks[seed].reference) < length:
            ids = self.tokens(length, seed)
            full, reference = self._finite(self.run(ids, [length]), ids), self._in_float64(ids)
            if reference is not None:
                self.yardsticks[seed] = self._trusted(ids, full, reference)
            else:
                self.yardsticks[seed] = Yardstick(full, token_errors(self._in_other_shape(ids, full), full), self.dtype)
        return self.yardsticks[seed]

    def _trusted(self, ids: Tensor, full: Tensor, reference: Tensor) -> Yardstick:
        """The yardstick that the float64 run makes, unless the full run is further from it than rounding explains.

        Where a router chose other experts on a tie, the full run itself is the reference from there on. Where the model is
        wrong in its own precision (a fallback on overflow), the full run is the reference, and what may differ from it is
        what a change of the weights by one rounding makes of the float64 run.
        """
        error = token_errors(full, reference)
        if float(error.max()) <= NO_ROUNDING * torch.finfo(self.dtype).eps:
            return Yardstick(reference, error, self.dtype)
        length = [ids.shape[-1]]
        one = recorded(lambda: self.logits(ids, length), rows=1, row=0, pieces=length)
        other = recorded(lambda: self.logits(ids, length, lm=self.reference), rows=1, row=0, pieces=length)
        if (tie := until_first_tie(one, other, self.dtype)) is not None:
            self.flips += 1
            reference = torch.cat([reference[:tie], full[tie:]])
            return Yardstick(reference, token_errors(full, reference), self.dtype)
        rounded = twin(self.reference) if self.reference is not None else None
        if rounded is None or rounded.module is None:
            return Yardstick(reference, error, self.dtype)
        round_weights(rounded.module, self.dtype)
        rounding = token_errors(self.run(ids, length, lm=rounded), reference)
        if float(error.max()) <= NOT_EXPLAINED * float(rounding.max()):
            return Yardstick(reference, error, self.dtype)
        return Yardstick(full, rounding, self.dtype)

    def _finite(self, run: Tensor, ids: Tensor) -> Tensor:
        wrong = run.isnan() | run.isposinf()  # minus infinity is a token ruled out
        if wrong.any():
            place = int(wrong.nonzero()[0, 0])
            raise NotFiniteError(
                f"{self.lm.spec} gave logits that are no numbers at token {place} of {len(run)} random ones (id "
                f"{ids[0, ..., place].tolist()}), read in one piece, in {self.lm.dtype} on {self.lm.device}. Nothing can be "
                "concluded from such a model. Look for an overflow in low precision."
            )
        return run

    def _in_float64(self, ids: Tensor) -> Tensor | None:
        if self.reference is None:
            return None
        try:
            reference = self.run(ids, [ids.shape[-1]], lm=self.reference)
        except Raised:  # kernels or held states of one precision: there is no reference to be had
            self.reference = None
            return None
        if reference.isnan().any():
            self.reference = None
            return None
        return reference

    def _in_other_shape(self, ids: Tensor, full: Tensor) -> Tensor:
        try:
            return self.run(beside(ids, 2), [ids.shape[-1]])
        except Raised:  # a model of single rows: its own rounding is not known, the floor alone counts
            return full

    def compare(
        self,
        law: str,
        seed: int,
        ids: Tensor,
        sizes: list[int],
        *,
        row: int = 0,
        other: tuple[Tensor, Tensor] | None = None,
    ) -> Excess:
        """Read row `row` of [b, t] in pieces and compare it with the full run of the seed, or with another run: of the ids
        [1, t] in the same pieces, log-probabilities [t, v]."""
        yardstick = self.yardstick(seed, ids.shape[-1])
        own, against = other if other is not None else (self.tokens(len(yardstick.reference), seed), None)
        run = self.run(ids, sizes, row=row)
        if against is not None:
            yardstick, run = yardstick.against(against), run[: len(against)]
        excess = yardstick.measure(run)
        tie = None
        if not excess.share <= 1:
            tie = self._tie(own, [own.shape[-1]] if other is None else sizes, ids, sizes, row)
        if tie is not None:
            excess = yardstick.measure(run[:tie]) if tie else replace(excess, share=0.0, ratio=0.0)
            self.flips += 1
        if law not in self.worst or excess.share > self.worst[law][0].share:
            self.worst[law] = (excess, f"{len(run)} tokens (seed {seed}) in {len(sizes)} piece(s)")
        return excess

    def _tie(self, own: Tensor, own_sizes: list[int], ids: Tensor, sizes: list[int], row: int) -> int | None:
        """The first token whose experts were chosen otherwise on a tie; None where routing does not explain the difference."""
        one = recorded(lambda: self.logits(own, own_sizes), rows=1, row=0, pieces=own_sizes)
        if not one:
            return None
        other = recorded(lambda: self.logits(ids, sizes), rows=ids.shape[0], row=row, pieces=sizes)
        return until_first_tie(one, other, self.dtype)

    def seconds_a_call(self) -> float:
        """What a short call costs."""
        began = time.perf_counter()
        try:
            self.run(self.tokens(2, 0), [2])
        except Raised:  # it reads some lengths only, this one not
            self.run(self.tokens(self.longest, 0), [self.longest])
        return time.perf_counter() - began
