"""The laws, each a function of a trial and a case that raises `LawBroken` with what it saw: use them in a test of your own.

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

import functools
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pytest_lmeval.equivalence.diagnosis import likely_fault
from pytest_lmeval.equivalence.strategies import Case
from pytest_lmeval.equivalence.tolerance import ROUNDINGS, Excess, log_probabilities
from pytest_lmeval.equivalence.trial import MEMORY, Raised, Trial
from pytest_lmeval.lm import Model, ModelError, State, fork, state_bytes, state_types
from pytest_lmeval.scoring.reading import NATS, TOKENS, Reading, rows_of
from pytest_lmeval.scoring.resume import safe_load
from pytest_lmeval.stream import Chunk, NotFiniteError, stream, stream_in_windows

FINER = 30  # times smaller in float64, and a difference is rounding
FEW = 24  # tokens that are read one by one


class LawBroken(AssertionError):
    """A case on which a model breaks a law. `share` is the error over what was allowed.

    What is raised is one of its children, a class for each decade of `share`: hypothesis shrinks each class apart, so
    that a gross fault does not hide a subtle one, nor the other way round.
    """

    case: Case
    share: float = math.inf
    error: float = math.inf
    likely: str = ""  # the kind of fault that it looks like

    @property
    def decade(self) -> int:
        return decade_of(self.share)

    def __str__(self) -> str:
        return f"{super().__str__()} {self.likely}".rstrip()


def decade_of(share: float) -> int:
    """0 for up to ten times too much, 1 for up to a hundred, ... 9 for everything above."""
    return 9 if not math.isfinite(share) else min(9, max(0, math.floor(math.log10(max(share, 1.0)))))


@functools.cache
def _class_of(decade: int) -> type[LawBroken]:
    return type(f"LawBrokenBy1e{decade}", (LawBroken,), {"__module__": __name__})


def broken(case: Case, message: str, *, share: float = math.inf, error: float = math.inf, likely: str = "") -> LawBroken:
    """The exception for a law that this case breaks."""
    found = _class_of(decade_of(share))(message)
    found.case, found.share, found.error, found.likely = case, share, error, likely
    return found


class NotPossible(Exception):
    """A law that cannot be tried on this model."""


def repeat(trial: Trial, case: Case) -> None:
    ids, sizes = trial.tokens(case.length, case.seed), _sizes(trial, case)
    first, again = trial.logits(ids, sizes), trial.logits(ids, sizes)
    _bit_equal(trial, case, first, again, "read twice in a row, gave two results", _why_not_again(trial.lm))


def isolation(trial: Trial, case: Case) -> None:
    ids, sizes = trial.tokens(case.length, case.seed), _sizes(trial, case)
    others = trial.tokens(max(1, case.before), case.seed + 1000)
    first = trial.logits(ids, sizes)
    try:
        trial.logits(others.expand(case.rows, -1), [others.shape[-1]])
    except Raised:
        trial.logits(others, [others.shape[-1]])  # a model of single rows
    again = trial.logits(ids, sizes)
    why = "Something is left over from one sequence to the next."
    _bit_equal(trial, case, first, again, "gave other logits after another sequence was read in between", why)
    if (fresh := trial.fresh()) is not None:
        never = trial.logits(ids, sizes, lm=fresh)
        _near(trial, case, never, again, "gave other logits than in a copy of the model that had read nothing before", why)


def causality(trial: Trial, case: Case) -> None:
    _blind_to_the_future(trial, case, [case.length], case.cuts[0])
    *cuts, change = case.cuts
    if cuts and trial.goes_on is None:  # a piece that goes on has another mask than the first one
        _blind_to_the_future(trial, case, Case(case.length, tuple(cuts)).sizes, change)


def _blind_to_the_future(trial: Trial, case: Case, sizes: list[int], change: int) -> None:
    ids = trial.tokens(case.length, case.seed)
    other = ids.clone()
    other[:, change:] = (ids[:, change:] + 1) % trial.lm.vocab_size
    before, after = (trial.logits(x, sizes)[:change] for x in (ids, other))
    if same(before, after):
        return
    first, error = _first_difference(before, after)
    if _is_rounding(trial, error, ids, other, sizes, change):
        return
    raise broken(
        case,
        f"changing the tokens from position {change} on (of {case.length}, seed {case.seed}, in pieces of {sizes}) changed "
        f"the logits of position {first} before it, by up to {error:.3g}. The model sees its future; its perplexity "
        "says nothing.",
        error=error,
    )


def _is_rounding(trial: Trial, error: float, ids: Tensor, other: Tensor, sizes: list[int], change: int) -> bool:
    """The tokens of an expert are multiplied together, so how a token is rounded hangs on how many others there are.

    Rounding is smaller in float64. What is seen of the future is not.
    """
    if trial.reference is None:
        return trial.routes and error <= ROUNDINGS * torch.finfo(trial.lm.dtype).eps
    before, after = (trial.logits(x, sizes, lm=trial.reference)[:change] for x in (ids, other))
    return float((before - after).abs().max()) <= error / FINER


def prefix(trial: Trial, case: Case) -> None:
    cut = case.cuts[-1]
    excess = trial.compare("prefix", case.seed, trial.tokens(cut, case.seed), [cut])
    if not excess.share <= 1:
        raise broken(
            case,
            f"{cut} tokens (seed {case.seed}) read alone are off by {excess.error:.3g} nats at token {excess.position} "
            f"from the same tokens at the beginning of {trial.longest}, allowed {excess.allowed:.2g}. What a token costs "
            "depends on how long the text is.",
            share=excess.share,
            error=excess.error,
        )


def splits(trial: Trial, case: Case) -> None:
    ids = trial.tokens(case.length, case.seed)
    _within(case, case.sizes, trial.compare("splits", case.seed, ids, case.sizes), str(case))


def steps(trial: Trial, case: Case) -> None:
    ids, sizes = trial.tokens(case.length, case.seed), [1] * case.length
    excess = trial.compare("steps", case.seed, ids, sizes)
    _within(case, sizes, excess, f"{case.length} tokens (seed {case.seed}), one at a time")


def fork_(trial: Trial, case: Case) -> None:
    ids, cut = trial.tokens(case.length, case.seed), case.cuts[0]
    other = (ids[:, cut:] + 1) % trial.lm.vocab_size
    state = _read(trial.lm, ids[:, :cut])
    try:
        branch, first = fork(state), fork(state)
        (straight,) = _take_turns(trial.lm, (ids[:, cut:], first))
        after, _ = _take_turns(trial.lm, (ids[:, cut:], branch), (other, state))
    except MEMORY:
        raise
    except Exception as error:
        raise NotPossible(f"its state cannot be forked ({_in_a_line(error)})") from error
    trial.calls += 1 + 3 * len(after)
    said = f"two continuations of one state after {cut} of its tokens saw each other"
    _bit_equal(trial, case, straight, after, said, "A copy of the state shares something with it.", after=cut)


def resume(trial: Trial, case: Case) -> None:
    ids, cut = trial.tokens(case.length, case.seed), case.cuts[0]
    state, file = _read(trial.lm, ids[:, :cut]), io.BytesIO()
    try:
        torch.save({"state": state}, file)
        (straight,) = _take_turns(trial.lm, (ids[:, cut:], state))
        saved = safe_load(file.getvalue(), trial.lm)["state"]
        (resumed,) = _take_turns(trial.fresh() or trial.lm, (ids[:, cut:], saved))
    except MEMORY:
        raise
    except Exception as error:
        raise NotPossible(f"its state cannot be saved ({_in_a_line(error)})") from error
    trial.calls += 1 + 2 * len(resumed)
    said = f"saved after {cut} tokens and continued by a fresh copy of the model, came out otherwise than without the stop"
    why = "A part of its state is not in the state."
    _near(trial, case, straight, resumed, said, why, after=cut)


def _read(lm: Model, ids: Tensor) -> State:
    with torch.no_grad():
        return lm.step(ids)[1]


def _take_turns(lm: Model, *continuations: tuple[Tensor, State]) -> list[Tensor]:
    """[t, v] logits of each continuation (ids, state): at most eight more tokens, one at a time, which every model that carries
    a state can do, and in turns."""
    states = [state for _, state in continuations]
    found: list[list[Tensor]] = [[] for _ in continuations]
    for place in range(min(8, continuations[0][0].shape[-1])):
        for number, (ids, _) in enumerate(continuations):
            with torch.no_grad():
                logits, states[number] = lm.step(ids[:, place : place + 1], states[number])
            found[number].append(logits[0, -1])
    return [torch.stack(logits) for logits in found]


def rows(trial: Trial, case: Case) -> None:
    padding = max(0, min(case.padding, trial.longest - case.length))
    *sizes, last = _sizes(trial, case)
    sizes += [last] + [1] * padding if last == 1 else [last + padding]
    own = trial.tokens(case.length + padding, case.seed)
    batch = [trial.tokens(own.shape[-1], case.seed + 1000 + other) for other in range(max(2, case.rows))]
    batch[case.row] = torch.nn.functional.pad(own[:, : case.length], (0, padding))
    alone = trial.run(own, sizes)[: case.length]  # in the same pieces, but with real tokens in place of the padding
    try:
        excess = trial.compare("rows", case.seed, torch.cat(batch), sizes, row=case.row, other=(own, alone))
    except Raised as raised:
        raise NotPossible(f"it does not read {len(batch)} rows at once (it {raised})") from raised
    if not excess.share <= 1:
        raise broken(
            case,
            f"{case}: off by {excess.error:.3g} nats at token {excess.position} from the row alone, allowed "
            f"{excess.allowed:.2g}. A row depends on its neighbours, their order, or the padding after it.",
            share=excess.share,
            error=excess.error,
        )


def size(trial: Trial, case: Case) -> None:
    case = replace(case, length=trial.longest)
    held = state_sizes(trial, case)
    middle, end = held[2 * len(held) // 3], held[-1]
    if not trial.lm.constant_state or end[1] <= middle[1]:
        return
    if waiting := [border for border in trial.lm.borders if border >= middle[0]]:
        raise NotPossible(f"its state may grow until it has read {max(waiting)} tokens, and it was read only {end[0]}")
    raise broken(
        case,
        f"its state is declared constant, and grew from {middle[1]:,} bytes after {middle[0]} tokens to {end[1]:,} after "
        f"{end[0]}. A long text would need memory without end.",
        share=end[1] / middle[1],
    )


def state_sizes(trial: Trial, case: Case) -> list[tuple[int, int]]:
    """(tokens read, bytes of the state) while a sequence is read in even pieces."""
    length = min(case.length, FEW) if trial.goes_on is not None else case.length
    ids, state = trial.tokens(length, case.seed), None
    held: list[tuple[int, int]] = []
    for piece in torch.split(ids, 1 if trial.goes_on is not None else max(1, case.length // 12), dim=-1):
        with torch.no_grad():
            _, state = trial.lm.step(piece, state)
        trial.calls += 1
        held.append(((held[-1][0] if held else 0) + piece.shape[-1], state_bytes(state)))
    if not held[-1][1]:
        raise NotPossible(f"its state ({_kinds(state)}) holds no tensor that could be weighed")
    return held


def sums(trial: Trial, case: Case) -> None:
    """The harness's reading against losses taken by hand from logits of the same pieces, so that it is about the harness (and
    what a model makes of `keep`) alone."""
    chunk = max(case.sizes[0], -(-case.length // 12))
    if trial.goes_on is not None:
        case, chunk = replace(case, length=min(case.length, FEW)), 1
    ids = trial.tokens(case.length, case.seed)
    window, overlap = max(2, chunk), chunk // 2
    begins = range(0, max(1, case.length - 1 - overlap), window - overlap)
    windows = [(begin, min(begin + window + 1, case.length), overlap if begin else 0) for begin in begins]
    if trial.lm.stateful:
        whole = [(0, case.length, 0)]
        _add_up(trial, case, ids, stream(trial.lm, ids[0], chunk_size=chunk), f"chunks of {chunk}", whole, chunk)
    scored = stream_in_windows(trial.lm, ids[0], window=window, overlap=overlap)
    _add_up(trial, case, ids, scored, f"windows of {window}, {overlap} of them read again", windows, window)


def _add_up(
    trial: Trial, case: Case, ids: Tensor, scored: Iterator[Chunk], how: str, spans: list[tuple[int, int, int]], piece: int
) -> None:
    """Hold what was `scored` to the losses of `spans`: (first token, last but one, targets that were scored before)."""
    reading = Reading()
    targets: list[int] = []
    try:
        for part in scored:
            reading.add(part.start, rows_of(part.nll, part.rank, part.rank * 0), seconds=0, state_bytes=0)
            targets += range(part.start, part.end)
    except NotFiniteError as error:
        raise broken(case, f"{case.length} tokens in {how}: {error}") from error
    if targets != list(range(1, case.length)):
        due = f"each of 1 to {case.length - 1} was due once"
        raise broken(case, f"{case.length} tokens in {how}: the targets {targets} were scored, {due}.")
    want = sum(float(_losses(trial, ids[:, begin:end], piece)[known:].sum()) for begin, end, known in spans)
    allowed = 1e-5 * max(1.0, abs(want)) * (2**13 if trial.lm.dtype in (torch.float16, torch.bfloat16) else 1)
    for name, total in (("", reading.total), (", merged from blocks", np.sum(reading.units, axis=0))):
        off = abs(total[NATS] - want)
        if int(total[TOKENS]) != len(targets) or not off <= allowed:
            raise broken(
                case,
                f"{case.length} tokens (seed {case.seed}), scored in {how}{name}: {total[NATS]:.6g} nats over "
                f"{int(total[TOKENS])} targets; their logits, taken one by one, give {want:.6g} over {len(targets)}. A token "
                "is counted twice, left out, or scored with another's logits.",
                share=off / allowed,
                error=off,
            )


def _losses(trial: Trial, ids: Tensor, piece: int) -> Tensor:
    """[t - 1] losses of the tokens after the first, from logits of the same pieces as the harness reads."""
    logits = trial.logits(ids[:, :-1], [len(part) for part in torch.split(ids[0, :-1], piece)])
    return torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:].to(logits.device), reduction="none").cpu()


@dataclass(frozen=True)
class Law:
    """A law, what of a case it looks at, and whether it needs a model that carries a state."""

    check: Callable[[Trial, Case], None]
    uses: frozenset[str]
    needs_state: bool = False

    def of(self, case: Case) -> Case:
        """The case as this law sees it: what it does not look at is the simplest."""
        return Case(case.length, **{name: value for name, value in vars(case).items() if name in self.uses})


def _law(check: Callable[[Trial, Case], None], uses: str, *, needs_state: bool = False) -> Law:
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


def check(law: str, trial: Trial, case: Case) -> None:
    """Try a law on a case. Raises LawBroken where it is broken, also where the model raises although it read the sequence
    in one piece, and NotPossible where the law cannot be tried."""
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}; the laws are {', '.join(LAWS)}.")
    case = LAWS[law].of(case)
    device = trial.lm.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(case.seed)  # a model that draws random numbers does so alike whenever a case is tried again
        try:
            LAWS[law].check(trial, case)
        except Raised as raised:
            raise broken(case, f"{case}: it {raised}") from raised
        except NotFiniteError:
            raise  # of the whole sequence read in one piece: nothing can be said of such a model
        except ModelError as error:
            raise broken(case, f"{case}: {error}") from error


def same(one: Tensor, other: Tensor) -> bool:
    """Bit-equal, where a place that is no number in both is equal too."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _bit_equal(trial: Trial, case: Case, one: Tensor, other: Tensor, what: str, why: str, *, after: int = 0) -> None:
    if trial.lm.device.type != "cpu":  # atomic additions and chosen kernels may round otherwise from call to call there
        _near(trial, case, one, other, what, why, after=after)
    elif not same(one, other):
        first, error = _first_difference(one, other)
        raise broken(case, f"{case}, {what}: off by {error:.3g} at token {after + first}. {why}", error=error)


def _near(trial: Trial, case: Case, one: Tensor, other: Tensor, what: str, why: str, *, after: int = 0) -> None:
    """As near as rounding brings two runs of the same shape, the one perhaps with weights that lie elsewhere in memory."""
    excess = trial.yardstick(case.seed, case.length).against(log_probabilities(one)).measure(log_probabilities(other))
    if not excess.share <= 1:
        raise broken(
            case,
            f"{case}, {what}: off by {excess.error:.3g} nats at token {after + excess.position}. {why}",
            share=excess.share,
            error=excess.error,
        )


def _first_difference(one: Tensor, other: Tensor) -> tuple[int, float]:
    different = (one != other) & ~(one.isnan() & other.isnan())
    error = (one.double() - other.double()).abs().nan_to_num(nan=math.inf)
    return int(different.any(dim=-1).nonzero()[0]), float(error[different].max())


def _within(case: Case, sizes: list[int], excess: Excess, what: str) -> None:
    if not excess.share <= 1:
        raise broken(
            case,
            f"{what}: log-probabilities off by {excess.error:.3g} nats at token {excess.position}, allowed "
            f"{excess.allowed:.2g}.",
            share=excess.share,
            error=excess.error,
            likely=likely_fault(sizes, excess),
        )


def _why_not_again(lm: Model) -> str:
    parts = (
        [part for own in vars(lm.source).values() if isinstance(own, nn.Module) for part in own.modules() if part.training]
        if lm.module is None and hasattr(lm.source, "__dict__")
        else []
    )
    training = f" A module that it holds is in train mode ({type(parts[0]).__name__}): call its eval()." if parts else ""
    return f"It is not deterministic (dropout? sampling?), or keeps something from one reading to the next.{training}"


def _sizes(trial: Trial, case: Case) -> list[int]:
    """Pieces in which the model can read the case, right or wrong: the law is about something else."""
    if trial.goes_on is None:
        return case.sizes
    singles = min(8, case.length - 1) * trial.goes_on
    return [case.length - singles, *[1] * singles]


def _kinds(state: State) -> str:
    return ", ".join(sorted(kind.__name__ for kind in state_types(state)))


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"
