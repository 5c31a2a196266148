"""Run a model on random tokens in chunks, and compare the logits with a reference that is computed once."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pytest_lmeval.engine import Engine, Policy
from pytest_lmeval.errors import ModelError, NotFiniteError
from pytest_lmeval.laws._moe_routing import first_tie, record_routing
from pytest_lmeval.laws._tolerance import Excess, Reference, log_probabilities, token_errors
from pytest_lmeval.laws._weights import copy_of, float64_copy, round_weights
from pytest_lmeval.models._model import Model

LONGEST = 160
RAW = Policy()  # nothing is proven before it is tried
FEW = 24  # tokens that are read one by one
NO_ROUNDING = 1 << 14  # roundings: a full run further than that from its reference may have chosen other experts
NOT_EXPLAINED = 1e3  # times the effect of rounding the weights once: rounding does not explain a larger error
MEMORY = (torch.OutOfMemoryError, MemoryError)  # say nothing about a model


class Raised(Exception):
    """The model raised without a reason to; the message says what it was reading."""


@dataclass
class Harness:
    """A model under test: `harness.compare("splits", 0, harness.tokens(40, seed=0), sizes=[20, 20])`.

    longest       tokens of the sequence of which references are computed; a shorter sequence is its beginning
    worst         by law, the comparison with the largest tolerance ratio, and what was read
    calls         steps of the model and of its float64 copy so far
    routing_ties  tokens at which a tie between experts flipped
    references    by seed
    """

    lm: Model
    longest: int = LONGEST
    worst: dict[str, tuple[Excess, str]] = field(default_factory=dict)
    calls: int = 0
    routing_ties: int = 0
    references: dict[int, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.float64_copy = float64_copy(self.lm) if self.lm.dtype != torch.float64 else None
        self._unread = copy_of(self.lm)
        self._logits_dtype = self.lm.dtype

    @property
    def reference_kind(self) -> str:
        if self.float64_copy is not None:
            return "float64 run of the same weights"
        return "full run in float64" if self.lm.dtype == torch.float64 else "full run, alone and as one of two rows"

    def tokens(self, length: int, seed: int) -> Tensor:
        """[1, t] random ids, or [1, k, t] codes; a longer sequence of the same seed begins with the shorter one.

        Every third seed gives runs of one repeated token, many of them of id 0, as padding looks (of codes: missing ones, if
        the model takes them).
        """
        generator = torch.Generator().manual_seed(seed)
        books = self.lm.codebooks
        sizes = torch.tensor(books.sizes if books else [self.lm.vocab_size])
        ids = torch.randint(0, int(sizes.max()), (length, len(sizes)), generator=generator) % sizes
        if seed % 3 == 2:
            blank = -1 if books and books.gaps else 0
            ids = torch.where(torch.arange(length)[:, None] % 2 == 1, ids, blank).repeat_interleave(3, dim=0)[:length]
        return (ids.T if books else ids[:, 0])[None].to(self.lm.device)

    def run(self, input_ids: Tensor, sizes: list[int], *, row: int = 0, lm: Model | None = None) -> Tensor:
        """[t, v] log-probabilities of one row, read in chunks of `sizes`. Raises Raised if the model does."""
        return log_probabilities(self.logits(input_ids, sizes, row=row, lm=lm))

    def logits(self, input_ids: Tensor, sizes: list[int], *, row: int = 0, lm: Model | None = None) -> Tensor:
        """[t, v] logits of one row, as the model gave them; [t, s, v] of frames, zeros before a codebook's delay."""
        chunks, parts, seen = torch.split(input_ids, sizes, dim=-1), list[Tensor](), 0
        try:
            for logits, _ in Engine(lm or self.lm, RAW).steps(chunks):
                if lm is None:
                    self._logits_dtype = logits.dtype
                parts.append(self._positions_first(logits[row], seen))
                seen += logits.shape[-2]
        except MEMORY:
            raise
        except Exception as error:
            batch = "" if input_ids.shape[0] == 1 else f" in each of {input_ids.shape[0]} rows"
            what = str(error).strip().splitlines()
            raise Raised(
                f"raised {type(error).__name__} when it read {chunks[len(parts)].shape[-1]} token(s) after {seen}{batch}"
                f"{': ' + what[0][:300] if what else ''}"
            ) from error
        finally:
            self.calls += min(len(parts) + 1, len(chunks))
        return torch.cat(parts)

    def _positions_first(self, logits: Tensor, seen: int) -> Tensor:
        if self.lm.codebooks is None:
            return logits
        positions = seen + torch.arange(logits.shape[1], device=logits.device)
        delays = torch.tensor(self.lm.codebooks.delays, device=logits.device)
        return logits.transpose(0, 1).masked_fill((positions[:, None] < delays)[..., None], 0.0)

    def find_longest(self, longest: int) -> str | None:
        """Set `longest` to the longest sequence, up to this one, that the model reads in one call; say why if it is shorter."""
        self.longest = longest
        try:
            self.reference(0)
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
        return f"it reads at most {good} tokens in one call: it {why}"

    def fresh(self) -> Model | None:
        """A copy of the model that has never read anything; None if it cannot be copied."""
        return copy_of(self._unread) if self._unread is not None else None

    def _reads(self, ids: Tensor, sizes: list[int]) -> bool:
        try:
            self.logits(ids, sizes)
        except Raised:
            return False
        return True

    @functools.cached_property
    def has_routers(self) -> bool:
        """Whether tokens are sent to experts."""
        return bool(record_routing(lambda: self.logits(self.tokens(4, 0), [4]), rows=1, row=0, sizes=[4]))

    @functools.cached_property
    def reads_batches(self) -> bool:
        """Whether it reads two rows at once, in one call."""
        return self._reads(self.tokens(4, 0).repeat_interleave(2, dim=0), [4])

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest precision: that of its weights, or of the logits that it gave."""
        return max(self.lm.dtype, self._logits_dtype, key=lambda dtype: torch.finfo(dtype).eps)

    @functools.cached_property
    def largest_continuation(self) -> int | None:
        """The most tokens that a state may be continued by in one step without raising: None for any number, 1, or 0."""
        tried = ((None, [2, 2]), (1, [2, 1, 1])) if self.lm.stateful else ()
        return next((most for most, sizes in tried if self._reads(self.tokens(4, 0), sizes)), 0)

    def continues_past_longest(self) -> bool:
        return self._reads(self.tokens(self.longest + 1, 0), [self.longest, 1]) and self.lm.stateful

    def reference(self, seed: int, length: int = 0) -> Reference:
        """The reference of a seed's longest sequence; computed once."""
        length = max(length, self.longest)
        if seed not in self.references or len(self.references[seed].expected) < length:
            ids = self.tokens(length, seed)
            full, exact = self._finite(self.run(ids, [length]), ids), self._in_float64(ids)
            if exact is not None:
                self.references[seed] = self._trusted(ids, full, exact)
            else:
                try:
                    other = self.run(ids.repeat_interleave(2, dim=0), [length])
                except Raised:  # a model of single rows: its own rounding is not known, only the floor counts
                    other = full
                self.references[seed] = Reference(full, token_errors(other, full), self.dtype)
        return self.references[seed]

    def _trusted(self, ids: Tensor, full: Tensor, exact: Tensor) -> Reference:
        """The float64 run, or the full run where rounding does not explain their difference.

        That is from the first flipped tie between experts on, or everywhere if the model is wrong in its own precision (a
        fallback on overflow); then allow what one rounding of the weights changes in float64.
        """
        error = token_errors(full, exact)
        if float(error.max()) <= NO_ROUNDING * torch.finfo(self.dtype).eps:
            return Reference(exact, error, self.dtype)
        length = [ids.shape[-1]]
        one = record_routing(lambda: self.logits(ids, length), rows=1, row=0, sizes=length)
        other = record_routing(lambda: self.logits(ids, length, lm=self.float64_copy), rows=1, row=0, sizes=length)
        if (tie := first_tie(one, other, self.dtype)) is not None:
            self.routing_ties += 1
            exact = torch.cat([exact[:tie], full[tie:]])
            return Reference(exact, token_errors(full, exact), self.dtype)
        rounded = float64_copy(self.float64_copy) if self.float64_copy is not None else None
        if rounded is not None and rounded.module is not None:
            round_weights(rounded.module, self.dtype)
            rounding = token_errors(self.run(ids, length, lm=rounded), exact)
            if float(error.max()) > NOT_EXPLAINED * float(rounding.max()):
                return Reference(full, rounding, self.dtype)
        return Reference(exact, error, self.dtype)

    def _finite(self, run: Tensor, ids: Tensor) -> Tensor:
        wrong = run.isnan() | run.isposinf()  # minus infinity is a token ruled out
        if wrong.any():
            position = int(wrong.nonzero()[0, 0])
            raise NotFiniteError(
                f"{self.lm.spec} gave logits that are not finite at token {position} of {len(run)} random ones (id "
                f"{ids[0, ..., position].tolist()}), read in one call, in {self.lm.dtype} on {self.lm.device}, so no law "
                "can be tried. Look for an overflow in low precision."
            )
        return run

    def _in_float64(self, ids: Tensor) -> Tensor | None:
        if self.float64_copy is not None:
            try:
                run = self.run(ids, [ids.shape[-1]], lm=self.float64_copy)
                if not run.isnan().any():
                    return run
            except Raised:  # kernels or held states of one precision
                pass
            self.float64_copy = None
        return None

    def compare(
        self, law: str, seed: int, ids: Tensor, sizes: list[int], *, row: int = 0, other: tuple[Tensor, Tensor] | None = None
    ) -> Excess:
        """Read row `row` of [b, t] in chunks and compare it with the reference of the seed, or with another run: (ids [1, t]
        read in the same chunks, log-probabilities [t, v])."""
        reference = self.reference(seed, ids.shape[-1])
        run = self.run(ids, sizes, row=row)
        if other is None:
            own = self.tokens(len(reference.expected), seed)
            own_sizes = [own.shape[-1]]
        else:
            (own, expected), own_sizes = other, sizes
            reference, run = replace(reference, expected=expected), run[: len(expected)]
        excess, tie = reference.measure(run), None
        if not excess.tolerance_ratio <= 1:
            tie = self._tie(own, own_sizes, ids, sizes, row)
        if tie is not None:
            excess = reference.measure(run[:tie]) if tie else replace(excess, tolerance_ratio=0.0, ratio=0.0)
            self.routing_ties += 1
        if law not in self.worst or excess.tolerance_ratio > self.worst[law][0].tolerance_ratio:
            self.worst[law] = (excess, f"{len(run)} tokens (seed {seed}) in {len(sizes)} chunk(s)")
        return excess

    def _tie(self, own: Tensor, own_sizes: list[int], ids: Tensor, sizes: list[int], row: int) -> int | None:
        """The first token at which a tie between experts flipped; None if routing does not explain the error."""
        one = record_routing(lambda: self.logits(own, own_sizes), rows=1, row=0, sizes=own_sizes)
        if not one:
            return None
        other = record_routing(lambda: self.logits(ids, sizes), rows=ids.shape[0], row=row, sizes=sizes)
        return first_tie(one, other, self.dtype)

    def seconds_a_call(self) -> float:
        """Time a short call."""
        began = time.perf_counter()
        try:
            self.run(self.tokens(2, 0), [2])
        except Raised:  # it reads some lengths only
            self.run(self.tokens(self.longest, 0), [self.longest])
        return time.perf_counter() - began
