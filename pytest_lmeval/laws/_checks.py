"""The laws, each a function of a harness and a case that raises `LawBroken` with what it saw: use them in a test of your own.

repeat      the same call twice gives the same numbers: bit-equal
isolation   a sequence is read the same after any other one: bit-equal; and by a copy that has read nothing yet; and the
            weights are as they were
causality   what comes later changes nothing before: bit-equal, or what differs is rounding, being far smaller in float64
prefix      the beginning of a sequence reads the same, however long the whole is
splits      stepping pieces gives the logits of stepping the whole, wherever it is cut
steps       so does stepping one token at a time (apart: many models have a second code path for it)
fork        two continuations of one state, in turns, do not see each other: bit-equal
resume      a saved state, continued by a fresh copy of the model, goes on as if it had never stopped
rows        a row of a batch reads as it does alone, whatever its neighbours, their order, and the padding after it
size        a state that is declared constant does not grow
sums        the harness's own chunks and windows score every target token once, and add up to the whole
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pytest_lmeval.errors import ArgumentError, LawBroken, NotFiniteError, NotPossible, no_such
from pytest_lmeval.laws._assertions import bit_equal, broken, first_difference, largest_difference, near, same, within
from pytest_lmeval.laws._harness import MEMORY, Harness, Raised
from pytest_lmeval.laws._sequences import beside, named, other_future
from pytest_lmeval.laws._states import fork_, in_a_line, resume, size
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.laws._sums import sums
from pytest_lmeval.laws._tolerance import ROUNDINGS
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._seeds import reseed

FINER = 30  # times smaller in float64, and a difference is rounding


def repeat(harness: Harness, case: Case) -> None:
    ids, sizes = harness.tokens(case.length, case.seed), sizes_for(harness, case)
    first, again = harness.logits(ids, sizes), harness.logits(ids, sizes)
    bit_equal(harness, case, first, again, "read twice in a row, gave two results", _why_not_again(harness.lm))


def isolation(harness: Harness, case: Case) -> None:
    ids, sizes = harness.tokens(case.length, case.seed), sizes_for(harness, case)
    others = harness.tokens(max(1, case.before), case.seed + 1000)
    first = harness.logits(ids, sizes)
    try:
        harness.logits(beside(others, case.rows), [others.shape[-1]])
    except Raised:
        harness.logits(others, [others.shape[-1]])  # a model of single rows
    again = harness.logits(ids, sizes)
    why = "Something is left over from one sequence to the next."
    bit_equal(harness, case, first, again, "gave other logits after another sequence was read in between", why)
    if (fresh := harness.fresh()) is not None:
        never = harness.logits(ids, sizes, lm=fresh)
        near(harness, case, never, again, "gave other logits than in a copy of the model that had read nothing before", why)


def causality(harness: Harness, case: Case) -> None:
    _blind_to_the_future(harness, case, [case.length], case.cuts[0])
    *cuts, change = case.cuts
    if cuts and harness.goes_on is None:  # a piece that goes on has another mask than the first one
        _blind_to_the_future(harness, case, Case(case.length, tuple(cuts)).sizes, change)


def _blind_to_the_future(harness: Harness, case: Case, sizes: list[int], change: int) -> None:
    ids = harness.tokens(case.length, case.seed)
    other, kept, said = other_future(harness.lm, ids, change)
    before, after = (harness.logits(x, sizes).flatten(0, -2)[:kept] for x in (ids, other))
    if same(before, after):
        return
    first, error = first_difference(before, after)
    if _is_rounding(harness, error, ids, other, sizes, kept):
        return
    raise broken(
        case,
        f"changing {said} on (of {case.length}, seed {case.seed}, in pieces of {sizes}) changed the logits of "
        f"{named(harness.lm, first)} before it, by up to {error:.3g}. The model sees its future; its perplexity says nothing.",
        error=error,
    )


def _is_rounding(harness: Harness, error: float, ids: Tensor, other: Tensor, sizes: list[int], kept: int) -> bool:
    """The tokens of an expert are multiplied together, so how a token is rounded hangs on how many others there are.

    Rounding is smaller in float64. What is seen of the future is not.
    """
    if harness.reference is None:
        return harness.routes and error <= ROUNDINGS * torch.finfo(harness.lm.dtype).eps
    before, after = (harness.logits(x, sizes, lm=harness.reference).flatten(0, -2)[:kept] for x in (ids, other))
    return largest_difference(before, after) <= error / FINER


def prefix(harness: Harness, case: Case) -> None:
    cut = case.cuts[-1]
    excess = harness.compare("prefix", case.seed, harness.tokens(cut, case.seed), [cut])
    said = f"{cut} tokens (seed {case.seed}) read alone are off by {excess.error:.3g} nats at token {excess.position} from the "
    said += f"same tokens at the beginning of {harness.longest}, allowed {excess.allowed:.2g}. "
    within(case, excess, said + "What a token costs depends on how long the text is.")


def splits(harness: Harness, case: Case) -> None:
    _like_the_whole(harness, case, "splits", case.sizes, str(case))


def steps(harness: Harness, case: Case) -> None:
    what = f"{case.length} tokens (seed {case.seed}), one at a time"
    _like_the_whole(harness, case, "steps", [1] * case.length, what)


def _like_the_whole(harness: Harness, case: Case, law: str, sizes: list[int], what: str) -> None:
    excess = harness.compare(law, case.seed, harness.tokens(case.length, case.seed), sizes)
    said = f"{what}: log-probabilities off by {excess.error:.3g} nats at token {excess.position}, allowed {excess.allowed:.2g}."
    within(case, excess, said, sizes=sizes)


def rows(harness: Harness, case: Case) -> None:
    padding = max(0, min(case.padding, harness.longest - case.length))
    *sizes, last = sizes_for(harness, case)
    sizes += [last] + [1] * padding if last == 1 else [last + padding]
    own = harness.tokens(case.length + padding, case.seed)
    batch = [harness.tokens(own.shape[-1], case.seed + 1000 + other) for other in range(max(2, case.rows))]
    batch[case.row] = torch.nn.functional.pad(own[..., : case.length], (0, padding))
    alone = harness.run(own, sizes)[: case.length]  # in the same pieces, but with real tokens in place of the padding
    try:
        excess = harness.compare("rows", case.seed, torch.cat(batch), sizes, row=case.row, other=(own, alone))
    except Raised as raised:
        if harness.reads_rows:
            raise
        raise NotPossible(f"it does not read {len(batch)} rows at once (it {raised})") from raised
    said = (
        f"{case}: off by {excess.error:.3g} nats at token {excess.position} from the row alone, allowed {excess.allowed:.2g}. "
    )
    within(case, excess, said + "A row depends on its neighbours, their order, or the padding after it.")


def sizes_for(harness: Harness, case: Case) -> list[int]:
    """Pieces in which the model can read the case, right or wrong: the law is about something else."""
    if harness.goes_on is None:
        return case.sizes
    singles = min(8, case.length - 1) * harness.goes_on
    return [case.length - singles, *[1] * singles]


def _why_not_again(lm: Model) -> str:
    parts = (
        [part for own in vars(lm.source).values() if isinstance(own, nn.Module) for part in own.modules() if part.training]
        if lm.module is None and hasattr(lm.source, "__dict__")
        else []
    )
    training = f" A module that it holds is in train mode ({type(parts[0]).__name__}): call its eval()." if parts else ""
    return f"It is not deterministic (dropout? sampling?), or keeps something from one reading to the next.{training}"


@dataclass(frozen=True)
class Law:
    """A law, what of a case it looks at, and whether it needs a model that carries a state."""

    check: Callable[[Harness, Case], None]
    uses: frozenset[str]
    needs_state: bool = False

    def of(self, case: Case) -> Case:
        """The case as this law sees it: what it does not look at is the simplest."""
        return Case(case.length, **{name: value for name, value in vars(case).items() if name in self.uses})


def _law(check: Callable[[Harness, Case], None], uses: str, *, needs_state: bool = False) -> Law:
    return Law(check, frozenset(uses.split()), needs_state)


LAWS: dict[str, Law] = {
    "repeat": _law(repeat, "cuts seed"),
    "isolation": _law(isolation, "cuts seed rows before"),
    "causality": _law(causality, "cuts seed"),
    "prefix": _law(prefix, "cuts seed"),
    "splits": _law(splits, "cuts seed", needs_state=True),
    "steps": _law(steps, "seed", needs_state=True),
    "fork": _law(fork_, "cuts seed", needs_state=True),
    "resume": _law(resume, "cuts seed", needs_state=True),
    "rows": _law(rows, "cuts seed rows row padding"),
    "size": _law(size, "seed", needs_state=True),
    "sums": _law(sums, "cuts seed"),
}


def check(law: str, harness: Harness, case: Case) -> None:
    """Try a law on a case. Raises LawBroken where it is broken, also where the model raises although it read the sequence
    in one piece, NotPossible where the law cannot be tried, and ArgumentError for a law or a case that there is not."""
    if law not in LAWS:
        raise ArgumentError(no_such("law", law, LAWS))
    case = LAWS[law].of(case)
    if case.length < 2:
        raise ArgumentError(f"a law needs two tokens at least; got a sequence of {case.length}.")
    if "cuts" in LAWS[law].uses and not case.cuts:
        case = replace(case, cuts=(case.length // 2,))
    device = harness.lm.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        reseed(device, case.seed)  # a model that draws random numbers does so alike whenever a case is tried again
        try:
            LAWS[law].check(harness, case)
        except Raised as raised:
            raise broken(case, f"{case}: it {raised}") from raised
        except (LawBroken, NotPossible, NotFiniteError, *MEMORY):
            raise  # no number for a sequence read in one piece: nothing can be said of such a model
        except Exception as error:
            raise broken(case, f"{case}: it raised {in_a_line(error)}") from error
