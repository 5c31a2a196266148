"""Run a model on random tokens in chunks, and compare the logits with a reference that is computed once."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.engine import Engine, Policy
from pytest_lmeval.engine._policy import CALL
from pytest_lmeval.errors import ModelError, NotFiniteError
from pytest_lmeval.laws._floors import SHORTEST_FLOOR
from pytest_lmeval.laws._moe_routing import first_tie, record_routing
from pytest_lmeval.laws._tolerance import Excess, Reference, log_probabilities, sampled, token_errors
from pytest_lmeval.laws._weights import copy_of, float64_copy, round_weights
from pytest_lmeval.models._failures import OUT_OF_MEMORY, NoMemory, failure_of, unless_full
from pytest_lmeval.models._model import Model, State, state_bytes, state_dtypes

LONGEST = SHORTEST_FLOOR
RAW = Policy()  # nothing is proven before it is tried
FEW = 24  # tokens that are read one by one
KEPT = 4  # readings of short sequences that are kept
NO_ROUNDING = 1 << 14  # roundings: a full run further than that from its reference may have chosen other experts
NOT_EXPLAINED = 1e3  # times the effect of rounding the weights once: rounding does not explain a larger error
FLOAT64 = 4  # times the cost of float32


class Raised(Exception):
    """The model raised without a reason to; the message says what it was reading."""


@dataclass
class Work:
    """What a model was asked to do: its calls, the tokens that they read, and their cost in tokens, CALL for each call; and the
    rows and tokens of the last call."""

    calls: int = 0
    tokens: int = 0
    cost: int = 0
    last: tuple[int, int] = (0, 0)

    def of(self, lm: Model | None, factor: int = 1) -> Model | None:
        """The model, each of whose steps is counted here, at `factor` times its cost."""
        if lm is None:
            return None
        step_fn = lm.step_fn

        def counted(input_ids: Tensor, state: State | None, keep: int | None) -> tuple[Tensor, State]:
            self._add(input_ids, factor)
            return step_fn(input_ids, state, keep)

        if (packing := lm.packing) is not None:
            packed_step = packing.step

            def counted_pack(input_ids: Tensor, *rest: Any) -> tuple[Tensor, State]:
                self._add(input_ids, factor)
                return packed_step(input_ids, *rest)

            counted.packing = replace(packing, step=counted_pack)  # type: ignore[attr-defined]
        return replace(lm, step_fn=counted)

    def _add(self, input_ids: Tensor, factor: int) -> None:
        self.last = input_ids.shape[0], input_ids.shape[-1]
        read = math.prod(self.last)
        self.calls, self.tokens, self.cost = self.calls + 1, self.tokens + read, self.cost + factor * (read + CALL)

    @property
    def full(self) -> str:
        """The words for a last call that ran out of memory."""
        rows, tokens = self.last
        return f"out of memory at {rows} row{'s' * (rows > 1)} of {tokens} token{'s' * (tokens > 1)}"


@dataclass(frozen=True)
class Run:
    """One reading of a sequence.

    logits       [t, v] as the model gave them; of a large vocabulary, the sample that is compared
    log_probs    [t, v] their log-probabilities in float64, of the same columns
    state_bytes  bytes of the state after each chunk
    dtypes       of the tensors of the last state
    state        after the last chunk
    """

    logits: Tensor
    log_probs: Tensor
    state_bytes: tuple[int, ...]
    dtypes: tuple[str, ...]
    state: State


@dataclass(frozen=True)
class _Reading:
    """Row `row` of ids [b, t], read in chunks."""

    ids: Tensor
    sizes: list[int]
    row: int = 0


@dataclass
class Harness:
    """A model under test: `harness.compare("splits", 0, harness.tokens(40, seed=0), sizes=[20, 20])`.

    longest       tokens of the sequence of which references are computed; a shorter sequence is its beginning
    most          tokens that it reads in one call at most; longer chunks are read in such pieces. None: any number
    most_rows     rows that it reads at once at most. None: any number
    text          ids [t] or codes [t, k] with which the sequences begin; by default they are random
    worst         by law, the comparison with the largest tolerance ratio, and what was read
    work          steps of the model, of its copies, and of its float64 copy so far
    routing_ties  tokens at which a tie between experts flipped
    references    by seed
    """

    lm: Model
    longest: int = LONGEST
    most: int | None = None
    most_rows: int | None = None
    text: np.ndarray | None = None
    worst: dict[str, tuple[Excess, str]] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    routing_ties: int = 0
    references: dict[int, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._unread = copy_of(self.lm)
        self.float64_copy = self.work.of(float64_copy(self.lm), FLOAT64) if self.lm.dtype != torch.float64 else None
        self.lm = self.work.of(self.lm) or self.lm
        self._logits_dtype = self.lm.dtype
        self._readings: dict[tuple[int, ...], Run] = {}

    def apart(self) -> Harness:
        """The same model, tried without a trace in what this harness has found so far."""
        other = copy.copy(self)
        other.worst, other.references, other._readings = {}, {}, {}
        return other

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
        books = self.lm.codebooks
        if self.text is not None and seed == 0 and length <= len(self.text):
            text = torch.from_numpy(self.text[:length])
            return (text.T if books else text)[None].to(self.lm.device)
        generator = torch.Generator().manual_seed(seed)
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
        return self._read(input_ids, sizes, [row], lm)[0][0]

    def rows(self, input_ids: Tensor, sizes: list[int]) -> list[Tensor]:
        """[t, v] log-probabilities of each row of [b, t]."""
        return [log_probabilities(logits) for logits in self._read(input_ids, sizes, range(input_ids.shape[0]))[0]]

    def reading(self, seed: int, length: int, sizes: list[int]) -> Run:
        """A reading of a seed's sequence in chunks. Those that several laws share are kept: of the longest sequence of seed 0,
        whole and in halves, of its first half, and of the last few short ones."""
        half = self.longest // 2
        shared = seed == 0 and (*sizes,) in ((self.longest,), (half, self.longest - half), (half,))
        kept, key = shared or length <= FEW, (seed, *sizes)
        if key in self._readings:
            return self._readings[key]
        (logits,), held, state = self._read(self.tokens(length, seed), sizes, [0])
        kept_state = state if sizes == [length] and length < self.longest else None
        run = Run(sampled(logits), log_probabilities(logits), held, tuple(state_dtypes(state)), kept_state)
        if kept:
            short = [other for other, run in self._readings.items() if len(run.log_probs) <= FEW]
            if len(short) > KEPT:
                del self._readings[short[0]]
            self._readings[key] = run
        return run

    def state_after(self, seed: int, length: int) -> State:
        """The state after a sequence, which the caller may write to: that of a kept reading once, then another one."""
        _ = self.largest_continuation  # found by reading another sequence, in which some models keep their state
        if (run := self._readings.get((seed, length))) is not None and run.state is not None:
            self._readings[seed, length] = replace(run, state=None)
            return run.state
        return self._read(self.tokens(length, seed), [length], [])[2]

    def _read(
        self, input_ids: Tensor, sizes: list[int], rows: Sequence[int], lm: Model | None = None
    ) -> tuple[list[Tensor], tuple[int, ...], State]:
        """The logits [t, v] of some rows, the bytes of the state after each chunk, and the last state."""
        # cloned, since a view of the sequence in a state would weigh as much as all of it
        chunks = [part.clone() for part in torch.split(input_ids, self.fitting(sizes), dim=-1)]
        parts, held, seen = list[list[Tensor]](), list[int](), 0
        try:
            for logits, state in Engine(lm or self.lm, RAW).steps(chunks):
                if lm is None:
                    self._logits_dtype = logits.dtype
                parts.append([self._positions_first(logits[row], seen) for row in rows])
                held.append(state_bytes(state))
                seen += logits.shape[-2]
        except Exception as error:
            if failure_of(error) == OUT_OF_MEMORY:  # which says nothing about the model
                raise
            batch = "" if input_ids.shape[0] == 1 else f" in each of {input_ids.shape[0]} rows"
            what = str(error).strip().splitlines()
            raise Raised(
                f"raised {type(error).__name__} when it read {chunks[len(parts)].shape[-1]} token(s) after {seen}{batch}"
                f"{': ' + what[0][:300] if what else ''}"
            ) from error
        return [torch.cat(of_row) for of_row in zip(*parts, strict=True)], tuple(held), state

    def fitting(self, sizes: list[int]) -> list[int]:
        """The chunks, those that are too long for one call cut into pieces.

        >>> from pytest_lmeval.models._sources import load
        >>> Harness(load("zoo:lstm"), most=16).fitting([3, 40])
        [3, 16, 16, 8]
        """
        most = self.most or max(sizes)
        return [min(most, size - at) for size in sizes for at in range(0, size, most)]

    def _positions_first(self, logits: Tensor, seen: int) -> Tensor:
        if self.lm.codebooks is None:
            return logits
        positions = seen + torch.arange(logits.shape[1], device=logits.device)
        delays = torch.tensor(self.lm.codebooks.delays, device=logits.device)
        return logits.transpose(0, 1).masked_fill((positions[:, None] < delays)[..., None], 0.0)

    def find_longest(self, longest: int) -> str | None:
        """Set `longest` to the longest sequence, up to this one, that the model reads, and `most` if it can only read that in
        several calls; say why if there is such a limit."""
        self.longest = longest
        if (why := self._refused(lambda: self.reference(0))) is None:
            return None
        good, why = self._longest_before(longest, why)
        continued = self.tokens(good + 1, 0)
        if good < longest and self.lm.stateful and self._refused(lambda: self.logits(continued, [good, 1])) is None:
            self.most = good
            if (again := self._refused(lambda: self.reference(0))) is not None:
                self.longest, _ = self._longest_before(longest, again)
        else:
            self.longest = good
        return f"it reads at most {good} tokens in one call: it {why}"

    def _longest_before(self, bad: int, why: str) -> tuple[int, str]:
        """The longest sequence, shorter than `bad`, that the model reads, and what it does beyond."""
        good = 0
        while bad - good > 1:
            middle = (good + bad) // 2
            ids = self.tokens(middle, 0)
            if (refused := self._refused(partial(self.run, ids, [middle]))) is None:
                good = middle
            else:
                bad, why = middle, refused
        if good < 2:
            raise ModelError(f"{self.lm.spec} cannot be tried: it {why}.")
        return good, why

    def _refused(self, work: Callable[[], object]) -> str | None:
        """Why the model cannot do it, in words that follow its name; None if it can."""
        try:
            full = isinstance(unless_full(work), NoMemory)
        except Raised as raised:
            return str(raised)
        return f"ran {self.work.full}" if full else None

    def find_most_rows(self, bad: int) -> int:
        """The most rows that it reads at once, of fewer than `bad`."""
        good = 1
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if self.reads_rows(middle) else (good, middle)
        return good

    def fresh(self) -> Model | None:
        """A copy of the model that has never read anything; None if it cannot be copied."""
        return self.work.of(copy_of(self._unread)) if self._unread is not None else None

    def _reads(self, ids: Tensor, sizes: list[int]) -> bool:
        try:
            self.logits(ids, sizes)
        except Raised:
            return False
        return True

    @functools.cached_property
    def has_routers(self) -> bool:
        """Whether tokens are sent to experts."""
        sizes = self.fitting([4])
        return bool(record_routing(lambda: self.logits(self.tokens(4, 0), sizes), rows=1, row=0, sizes=sizes))

    def reads(self, length: int) -> bool:
        """Whether it reads so many tokens."""
        return self._reads(self.tokens(length, 0), [length])

    def reads_rows(self, rows: int) -> bool:
        """Whether it reads so many rows at once, of a few tokens, in one call."""
        return self._reads(self.tokens(4, 0).repeat_interleave(rows, dim=0), [4])

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest precision: that of its weights, or of the logits that it gave."""
        return max(self.lm.dtype, self._logits_dtype, key=lambda dtype: torch.finfo(dtype).eps)

    @functools.cached_property
    def largest_continuation(self) -> int | None:
        """The most tokens that a state may be continued by in one step without raising: None for any number, 1, or 0."""
        tried = ((None, [2, 2]), (1, [2, 1, 1])) if self.lm.stateful else ()
        return next((most for most, sizes in tried if self._reads(self.tokens(4, 0), sizes)), 0)

    def reference(self, seed: int, length: int = 0) -> Reference:
        """The reference of a seed's longest sequence; computed once."""
        length = max(length, self.longest)
        if seed not in self.references or len(self.references[seed].expected) < length:
            ids = self.tokens(length, seed)
            full, exact = self._finite(self.reading(seed, length, [length]).log_probs, ids), self._in_float64(ids)
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
        length = self.fitting([ids.shape[-1]])
        one = record_routing(lambda: self.logits(ids, length), rows=1, row=0, sizes=length)
        other = record_routing(lambda: self.logits(ids, length, lm=self.float64_copy), rows=1, row=0, sizes=length)
        if (tie := first_tie(one, other, self.dtype)) is not None:
            self.routing_ties += 1
            exact = torch.cat([exact[:tie], full[tie:]])
            return Reference(exact, token_errors(full, exact), self.dtype)
        rounded = self.work.of(float64_copy(self.float64_copy), FLOAT64) if self.float64_copy is not None else None
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
                run = unless_full(partial(self.run, ids, [ids.shape[-1]], lm=self.float64_copy))
                if not isinstance(run, NoMemory) and not run.isnan().any():
                    return run
            except Raised:  # kernels or held states of one precision
                pass
            self.float64_copy = None
        return None

    def compare(self, law: str, seed: int, ids: Tensor, sizes: list[int]) -> Excess:
        """Read [1, t] in chunks and compare it with the reference of the seed."""
        reference, run = self.reference(seed, ids.shape[-1]), self.reading(seed, ids.shape[-1], sizes).log_probs
        own = self.tokens(len(reference.expected), seed)
        excess = self._judged(reference, run, _Reading(own, [own.shape[-1]]), _Reading(ids, sizes))
        self.note(law, excess, f"{len(run)} tokens (seed {seed}) in {len(sizes)} chunk(s)")
        return excess

    def compare_rows(
        self, law: str, seed: int, batch: Tensor, sizes: list[int], alone: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Excess, int]:
        """Read the rows of a batch [b, t], and compare each with `alone`: (its ids [1, t], the log-probabilities [n, v] of its
        first n tokens, read alone in the same chunks). The worst, and its row."""
        reference, found, runs = self.reference(seed, batch.shape[-1]), list[Excess](), list[Tensor]()
        for row, (run, (own, expected)) in enumerate(zip(self.rows(batch, sizes), alone, strict=True)):
            runs.append(run[: len(expected)])
            of_row, reading = replace(reference, expected=expected), _Reading(batch, sizes, row)
            found.append(self._judged(of_row, runs[row], _Reading(own, sizes), reading))
        worst, row = self.worst_of(found, runs, [(own[..., : len(expected)], expected) for own, expected in alone])
        self.note(law, worst, f"{len(runs[row])} tokens (seed {seed}) in {len(sizes)} chunk(s)")
        return worst, row

    def worst_of(
        self, found: Sequence[Excess], runs: Sequence[Tensor], alone: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Excess, int]:
        """The worst of several runs [n, v], each compared with the end of a sequence (ids [1, t], log-probabilities [n, v])
        that was read alone in the model's own precision; and its number.

        One token in a few hundred multiplies rounding, more than the errors of another sequence tell. So a run that is off by
        more than they allow is measured again, by a float64 run of its own sequence and what the lone reading is off there.
        """
        found = list(found)
        while True:
            worst = max(range(len(found)), key=lambda number: found[number].tolerance_ratio)
            if found[worst].tolerance_ratio <= 1 or (reference := self._own_reference(*alone[worst])) is None:
                return found[worst], worst
            found[worst] = reference.measure(runs[worst])
            if not found[worst].tolerance_ratio <= 1:
                return found[worst], worst

    def _own_reference(self, ids: Tensor, alone: Tensor) -> Reference | None:
        """The float64 run of the last tokens of ids [1, t], and what `alone` [n, v] is off there; None if rounding does not
        explain that much."""
        if (exact := self._in_float64(ids)) is None:
            return None
        exact = exact[len(exact) - len(alone) :]
        error = token_errors(alone, exact)
        rounded = float(error.max()) <= NO_ROUNDING * torch.finfo(self.dtype).eps
        return Reference(exact, error, self.dtype) if rounded else None

    def _judged(self, reference: Reference, run: Tensor, expected: _Reading, reading: _Reading) -> Excess:
        """Measure a run; a tie between experts, against the reading that is expected, explains what comes after it."""
        excess, tie = reference.measure(run), None
        if not excess.tolerance_ratio <= 1:
            tie = self._tie(expected, reading)
        if tie is not None:
            excess = reference.measure(run[:tie]) if tie else replace(excess, tolerance_ratio=0.0, ratio=0.0)
            self.routing_ties += 1
        return excess

    def note(self, law: str, excess: Excess, what: str) -> None:
        """Remember a comparison, if it is the worst of its law."""
        if law not in self.worst or excess.tolerance_ratio > self.worst[law][0].tolerance_ratio:
            self.worst[law] = (excess, what)

    def _tie(self, expected: _Reading, reading: _Reading) -> int | None:
        """The first token at which a tie between experts flipped; None if routing does not explain the error."""
        one, other = (
            record_routing(
                lambda: self.logits(read.ids, read.sizes),  # noqa: B023 - called at once
                rows=read.ids.shape[0],
                row=read.row,
                sizes=self.fitting(read.sizes),
            )
            for read in (expected, reading)
        )
        return first_tie(one, other, self.dtype) if one else None
