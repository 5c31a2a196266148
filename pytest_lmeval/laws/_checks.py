"""The laws, each a function of a harness and a case that raises `LawBroken`: use them in a test of your own.

repeat      the same call twice gives the same numbers: bit-equal
isolation   a sequence is read the same after any other one, and by a fresh copy: bit-equal; and reading changes no weight
causality   what comes later changes nothing before: bit-equal, or different by rounding, which is far smaller in float64
prefix      the beginning of a sequence reads the same, however long the whole is
splits      chunks give the logits of one call, wherever the sequence is cut
steps       so does one token at a time, from the beginning or after a first chunk (apart: many models have a second code path
            for it)
fork        two continuations of one state, in turns, do not see each other: bit-equal
resume      a saved state, continued by a fresh copy of the model, goes on as if it had never stopped
rows        each row of a batch reads as it does alone, whatever its neighbours, their order, and the padding after it
size        a state that is declared constant does not grow
sums        the engine's chunks and windows score every target token once, and add up to the whole
packed      several continuations of one beginning, read in one row with a mask, read as each would alone; a model that cannot
            do this is not wrong: it is read otherwise
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pytest_lmeval.engine import Engine
from pytest_lmeval.errors import ArgumentError, LawBroken, NotFiniteError, NotPossible, OutOfMemory, no_such
from pytest_lmeval.laws._diagnosis import assert_tolerated, broken, one_line
from pytest_lmeval.laws._harness import FEW, RAW, Harness, Raised
from pytest_lmeval.laws._packed import packed
from pytest_lmeval.laws._strategies import MOST_ROWS, Case
from pytest_lmeval.laws._sums import sums
from pytest_lmeval.laws._tolerance import ROUNDINGS, log_probabilities, sampled
from pytest_lmeval.laws._weights import preserve_weights
from pytest_lmeval.models._failures import OUT_OF_MEMORY, NoMemory, failure_of, unless_full
from pytest_lmeval.models._model import Model, State, fork
from pytest_lmeval.models._seeds import reseed
from pytest_lmeval.scoring._text_files import safe_load

SEQUENCES = 2  # different sequences in a batch, whose rows are read alone too
FINER = 30  # a difference that is so many times smaller in float64 is rounding


def repeat(harness: Harness, case: Case) -> None:
    sizes = _readable_sizes(harness, case)
    first = harness.reading(case.seed, case.length, sizes).logits
    again = sampled(harness.logits(harness.tokens(case.length, case.seed), sizes))
    assert_bit_equal(harness, case, first, again, "read twice in a row, gave two results", _why_not_again(harness.lm))


def _why_not_again(lm: Model) -> str:
    held = vars(lm.source).values() if lm.module is None and hasattr(lm.source, "__dict__") else ()
    parts = [part for own in held if isinstance(own, nn.Module) for part in own.modules() if part.training]
    training = f" A module that it holds is in train mode ({type(parts[0]).__name__}): call its eval()." if parts else ""
    return f"It is not deterministic (dropout? sampling?), or keeps something from one sequence to the next.{training}"


def isolation(harness: Harness, case: Case) -> None:
    ids, sizes = harness.tokens(case.length, case.seed), _readable_sizes(harness, case)
    others = harness.tokens(min(max(1, case.before), harness.longest), case.seed + 1000)
    with preserve_weights(harness.lm) as changed:
        first = harness.reading(case.seed, case.length, sizes).logits
        try:
            harness.logits(others.repeat_interleave(case.rows, dim=0), [others.shape[-1]])
        except Raised:
            harness.logits(others, [others.shape[-1]])  # a model of single rows
        again = sampled(harness.logits(ids, sizes))
        if changed_by := changed():
            raise broken(case, f"{case}: {changed_by}")
    why = "Something is left over from one sequence to the next."
    assert_bit_equal(harness, case, first, again, "gave other logits after another sequence was read in between", why)
    if case.length <= 2 * FEW and (fresh := harness.fresh()) is not None:
        unread = sampled(harness.logits(ids[..., : sizes[0]], sizes[:1], lm=fresh))  # what its state does is the law `resume`
        what = "gave other logits than a copy that had read nothing before"
        assert_near(harness, case, unread, again[: len(unread)], what, why)


def causality(harness: Harness, case: Case) -> None:
    *cuts, change = case.cuts  # a continuing chunk has another mask than the first one
    sizes = Case(case.length, tuple(cuts)).sizes if harness.largest_continuation is None else [case.length]
    ids = harness.tokens(case.length, case.seed)
    other, unchanged, where = _other_future(harness.lm, ids, change)

    def difference(before: Tensor, lm: Model | None = None) -> tuple[int, float] | None:
        after = sampled(harness.logits(other, sizes, lm=lm))
        return first_difference(*(logits.flatten(0, -2)[:unchanged] for logits in (before, after)))

    if (found := difference(harness.reading(case.seed, case.length, sizes).logits)) is None:
        return
    first, error = found
    # How a token is rounded may depend on how many others its expert has. Rounding is smaller in float64; a leak is not.
    if harness.float64_copy is None:
        rounding = harness.has_routers and error <= ROUNDINGS * torch.finfo(harness.lm.dtype).eps
    else:
        exact = harness.float64_copy
        finer = difference(sampled(harness.logits(ids, sizes, lm=exact)), exact)
        rounding = finer is None or finer[1] <= error / FINER
    if not rounding:
        raise broken(
            case,
            f"changing {where} on (of {case.length}, seed {case.seed}, in chunks of {sizes}) changed the logits of "
            f"{_name_row(harness.lm, first)} before it, by up to {error:.3g}. The model sees its future; its perplexity says "
            "nothing.",
            error=error,
        )


def _other_tokens(lm: Model, ids: Tensor) -> Tensor:
    sizes = torch.tensor(lm.codebooks.sizes, device=ids.device)[:, None] if lm.codebooks else lm.vocab_size
    return (ids + 1) % sizes


def _other_future(lm: Model, ids: Tensor, change: int) -> tuple[Tensor, int, str]:
    """(ids that differ from position `change` on, number of leading logit rows that must not change, where it begins in words).

    Of the frame at `change` only the last codes change; the first of these must still be predicted as before. A delayed code
    counts where it is predicted.
    """
    positions, books = torch.arange(ids.shape[-1], device=ids.device), lm.codebooks
    if not books:
        return torch.where(positions >= change, _other_tokens(lm, ids), ids), change, f"the tokens from position {change}"
    column = change % len(books.scored)
    book, delays = books.scored[column], dict(zip(books.scored, books.delays, strict=True))
    begins = [change - delays.get(k, 0) + (k < book) for k in range(len(books.sizes))]
    future = positions >= torch.tensor(begins, device=ids.device)[:, None]
    unchanged = change * len(books.scored) + column + 1
    return torch.where(future, _other_tokens(lm, ids), ids), unchanged, f"the codes from codebook {book} at position {change}"


def _name_row(lm: Model, row: int) -> str:
    if not lm.codebooks:
        return f"position {row}"
    position, column = divmod(row, len(lm.codebooks.scored))
    return f"codebook {lm.codebooks.scored[column]} at position {position}"


def prefix(harness: Harness, case: Case) -> None:
    cut = case.cuts[-1]
    excess = harness.compare("prefix", case.seed, harness.tokens(cut, case.seed), [cut])
    message = f"{cut} tokens (seed {case.seed}) read alone, against the beginning of {harness.longest}: {excess}."
    assert_tolerated(case, excess, f"{message} The loss of a token depends on how long the text is.")


def splits(harness: Harness, case: Case) -> None:
    _same_as_full_run(harness, case, "splits", case.sizes, str(case))


def steps(harness: Harness, case: Case) -> None:
    first = case.cuts[0] if case.cuts else 0
    after = f" after a chunk of {first}" if first else ""
    what = f"{case.length} tokens (seed {case.seed}), one at a time{after}"
    _same_as_full_run(harness, case, "steps", [*[first] * bool(first), *[1] * (case.length - first)], what)


def _same_as_full_run(harness: Harness, case: Case, law: str, sizes: list[int], what: str) -> None:
    excess = harness.compare(law, case.seed, harness.tokens(case.length, case.seed), sizes)
    assert_tolerated(case, excess, f"{what}: log-probabilities {excess}.", sizes=sizes)


def rows(harness: Harness, case: Case) -> None:
    count = min(max(2, case.rows), harness.most_rows or MOST_ROWS)
    sizes, longest_padding = _readable_sizes(harness, case), min(case.padding, case.length - 1)
    alone = [  # with real tokens in place of the padding
        (harness.tokens(case.length, seed), harness.reading(seed, case.length, sizes).log_probs)
        for seed in range(case.seed + 1000, case.seed + 1000 + SEQUENCES)
    ]
    batch, expected = list[Tensor](), list[tuple[Tensor, Tensor]]()
    for row in range(count):
        own, run = alone[row.bit_count() % SEQUENCES]  # Thue-Morse: no shift, and no wrap after 2^k rows, maps it to itself
        length = case.length - row * longest_padding % (longest_padding + 1)  # every padding in turn, the longest first
        batch.append(torch.nn.functional.pad(own[..., :length], (0, case.length - length)))
        expected.append((own, run[:length]))
    try:
        excess, row = harness.compare_rows("rows", case.seed, torch.cat(batch), sizes, expected)
    except Raised as raised:
        if not harness.reads_rows(2):
            raise NotPossible(f"it does not read 2 rows at once (it {raised})") from raised
        if harness.reads_rows(count):  # not their number is too large for it
            raise
        harness.most_rows = harness.find_most_rows(count)
        rows(harness, case)
        return
    why = "A row depends on its neighbours, their order, or the padding after it."
    assert_tolerated(case, excess, f"{case}: row {row} of {len(batch)}, against the row alone: {excess}. {why}")


def fork_(harness: Harness, case: Case) -> None:
    ids, cut = harness.tokens(case.length, case.seed), case.cuts[0]
    rest, state = ids[..., cut:], harness.state_after(case.seed, cut)
    with _not_possible_if_it_raises("its state cannot be forked"):
        branch, first = fork(state), fork(state)
        (straight,) = _take_turns(harness, harness.lm, (rest, first))
        after, _ = _take_turns(harness, harness.lm, (rest, branch), (_other_tokens(harness.lm, rest), state))
    message = f"two continuations of one state after {cut} of its tokens saw each other"
    assert_bit_equal(harness, case, straight, after, message, "A copy of the state shares something with it.", after=cut)


def resume(harness: Harness, case: Case) -> None:
    ids, cut, file = harness.tokens(case.length, case.seed), case.cuts[0], io.BytesIO()
    rest, state = ids[..., cut:], harness.state_after(case.seed, cut)
    with _not_possible_if_it_raises("its state cannot be saved"):
        torch.save({"state": state}, file)
        (straight,) = _take_turns(harness, harness.lm, (rest, state))
        saved = safe_load(file.getvalue(), harness.lm)["state"]
        (resumed,) = _take_turns(harness, harness.fresh() or harness.lm, (rest, saved))
    message = f"saved after {cut} tokens and continued by a fresh copy of the model, gave other logits than without the stop"
    assert_near(harness, case, straight, resumed, message, "A part of its state is not in the state.", after=cut)


@contextmanager
def _not_possible_if_it_raises(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if failure_of(error) == OUT_OF_MEMORY:
            raise
        raise NotPossible(f"{what} ({one_line(error)})") from error


def _take_turns(harness: Harness, lm: Model, *continuations: tuple[Tensor, State]) -> list[Tensor]:
    """[n, v] or [n, s, v] logits of each continuation (ids, state) after each of its n chunks, read in turns.

    Up to eight tokens are read: single ones, and in the end several if the model reads several.
    """
    length, engine = min(8, continuations[0][0].shape[-1]), Engine(lm, RAW)
    single = min(3, length - 2) if harness.largest_continuation is None and length > 2 else length
    sizes = harness.fitting([1] * single + [length - single] * (length > single))
    turns = zip(
        *(engine.steps(torch.split(ids[..., :length], sizes, dim=-1), state) for ids, state in continuations), strict=True
    )
    found = [[logits[0, ..., -1, :] for logits, _ in turn] for turn in turns]
    return [torch.stack(logits) for logits in zip(*found, strict=True)]


def size(harness: Harness, case: Case) -> None:
    case = replace(case, length=harness.longest)
    (seen, before), (end, after), _ = state_sizes(harness, case)
    if not harness.lm.constant_state or after <= before:
        return
    if waiting := [boundary for boundary in harness.lm.boundaries if boundary > seen]:
        raise NotPossible(f"its state may grow until it has read {max(waiting)} tokens, and it was read only {end}")
    raise broken(
        case,
        f"its state is declared constant, and grew from {before:,} bytes after {seen} tokens to {after:,} after {end}. A long "
        "text would need memory without end.",
        tolerance_ratio=after / before,
    )


def state_sizes(harness: Harness, case: Case) -> tuple[tuple[int, int], tuple[int, int], tuple[str, ...]]:
    """(tokens read, bytes of the state) in the middle and at the end of a sequence, and the dtypes of the state."""
    any_chunk = harness.largest_continuation is None
    length = case.length if any_chunk else min(case.length, FEW)
    sizes = [length // 2, length - length // 2] if any_chunk else [1] * length
    run, sizes = harness.reading(case.seed, length, sizes), harness.fitting(sizes)
    held = run.state_bytes
    if not held[-1]:
        raise NotPossible("its state holds no tensor that could be weighed")
    middle = (len(held) - 1) // 2
    return (sum(sizes[: middle + 1]), held[middle]), (length, held[-1]), run.dtypes


def _readable_sizes(harness: Harness, case: Case) -> list[int]:
    """Chunks in which the model can read the case, right or wrong: the law is not about them."""
    if harness.largest_continuation is None:
        return case.sizes
    singles = min(8, case.length - 1) * harness.largest_continuation
    return [case.length - singles, *[1] * singles]


def first_difference(one: Tensor, other: Tensor) -> tuple[int, float] | None:
    """(first row that differs, largest difference: infinite if only one of the two is finite); None if bit-equal."""
    equal = (one == other) | (one.isnan() & other.isnan())
    if equal.all():
        return None
    error = (one.double() - other.double()).abs().masked_fill(equal, 0.0)
    return int((~equal).nonzero()[0, 0]), float(error.nan_to_num(nan=math.inf, posinf=math.inf).max())


def assert_bit_equal(harness: Harness, case: Case, one: Tensor, other: Tensor, what: str, why: str, *, after: int = 0) -> None:
    """Refuse any difference between logits [t, v] on a CPU; elsewhere kernels round differently from call to call."""
    if harness.lm.device.type != "cpu":
        assert_near(harness, case, one, other, what, why, after=after)
    elif difference := first_difference(one, other):
        first, error = difference
        raise broken(case, f"{case}, {what}: off by {error:.3g} at token {after + first}. {why}", error=error)


def assert_near(harness: Harness, case: Case, one: Tensor, other: Tensor, what: str, why: str, *, after: int = 0) -> None:
    """Allow the rounding of two runs [t, v] of the same shape, whose weights may lie elsewhere in memory."""
    reference = replace(harness.reference(case.seed, case.length), expected=log_probabilities(one))
    excess = reference.measure(log_probabilities(other))
    message = f"{case}, {what}: off by {excess.error:.3g} nats at token {after + excess.position}. {why}"
    assert_tolerated(case, excess, message)


@dataclass(frozen=True)
class Law:
    """A law, the fields of a case that it uses, whether it needs a model that carries a state, and a case that is cut.

    optional  it is about reading several sequences in one row (`Model.packing`), which a right model need not do
    """

    check: Callable[[Harness, Case], None]
    uses: tuple[str, ...]
    needs_state: bool = False
    cut: bool = True
    optional: bool = False

    def applies_to(self, lm: Model) -> bool:
        return (lm.stateful or not self.needs_state) and (lm.packing is not None or not self.optional)

    def relevant(self, case: Case) -> Case:
        """The case as this law sees it: each field that it ignores is the simplest."""
        return Case(case.length, **{name: value for name, value in vars(case).items() if name in self.uses})


LAWS: dict[str, Law] = {
    "repeat": Law(repeat, ("cuts", "seed"), cut=False),
    "isolation": Law(isolation, ("cuts", "seed", "rows", "before"), cut=False),
    "causality": Law(causality, ("cuts", "seed")),
    "prefix": Law(prefix, ("cuts", "seed")),
    "splits": Law(splits, ("cuts", "seed"), needs_state=True),
    "steps": Law(steps, ("cuts", "seed"), needs_state=True, cut=False),
    "fork": Law(fork_, ("cuts", "seed"), needs_state=True),
    "resume": Law(resume, ("cuts", "seed"), needs_state=True),
    "rows": Law(rows, ("cuts", "seed", "rows", "padding")),
    "size": Law(size, ("seed",), needs_state=True, cut=False),
    "sums": Law(sums, ("cuts", "seed")),
    "packed": Law(packed, ("cuts", "seed", "rows"), needs_state=True, cut=False, optional=True),
}


def check(law: str, harness: Harness, case: Case) -> None:
    """Try a law on a case.

    Raises LawBroken if it is broken, also by a model that raises although it read the sequence in one call; NotPossible if the
    law cannot be tried; OutOfMemory if the case does not fit; ArgumentError for an unknown law or an impossible case.
    """
    if law not in LAWS:
        raise ArgumentError(no_such("law", law, LAWS))
    case = LAWS[law].relevant(case)
    if case.length < 2:
        raise ArgumentError(f"a law needs two tokens at least; got a sequence of {case.length}.")
    if LAWS[law].cut and not case.cuts:
        case = replace(case, cuts=(case.length // 2,))
    device = harness.lm.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        reseed(device, case.seed)  # a model that draws random numbers draws the same whenever a case is tried again
        found = unless_full(lambda: _tried(law, harness, case))
    if isinstance(found, NoMemory):
        said = f"{harness.work.full}: nothing is known about the law {law}. Free memory, or try a smaller case."
        raise OutOfMemory(f"{case}: {said}", found.wanted)


def _tried(law: str, harness: Harness, case: Case) -> None:
    try:
        LAWS[law].check(harness, case)
    except Raised as raised:
        raise broken(case, f"{case}: it {raised}") from raised
    except (LawBroken, NotPossible, NotFiniteError):
        raise  # not finite in one call: nothing can be said of such a model
    except Exception as error:
        if failure_of(error) == OUT_OF_MEMORY:
            raise
        raise broken(case, f"{case}: it raised {one_line(error)}") from error
