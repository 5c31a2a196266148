"""The law about the harness itself: what it scores in chunks and windows adds up to the whole, every token once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.equivalence.evidence import broken
from pytest_lmeval.equivalence.strategies import Case
from pytest_lmeval.equivalence.trial import FEW, Trial
from pytest_lmeval.scoring.reading import NATS, TOKENS, Reading, rows_of
from pytest_lmeval.stream import Chunk, NotFiniteError, stream, stream_in_windows


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
    want = sum(float(_losses(trial, ids[:, begin:end], piece)[known:].sum()) for begin, end, known in spans)
    if not math.isfinite(want):
        return  # a token that the model rules out cannot be scored, in one way or the other
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
