"""The law about the harness itself: what it scores in chunks and windows adds up to the whole, every token once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pytest_lmeval.engine import Chunk, Engine, Policy, Windows
from pytest_lmeval.errors import NotFiniteError
from pytest_lmeval.laws._assertions import broken
from pytest_lmeval.laws._harness import FEW, Harness
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.scoring._loss_accumulator import NATS, TOKENS, LossAccumulator


def sums(harness: Harness, case: Case) -> None:
    """Compare the losses that the harness sums with losses recomputed from raw logits of the same pieces, which isolates bugs
    of the harness, and of a model's `keep`."""
    chunk = max(case.sizes[0], -(-case.length // 12))
    if harness.goes_on is not None:
        case, chunk = replace(case, length=min(case.length, FEW)), 1
    ids = harness.tokens(case.length, case.seed)
    window, overlap = max(2, chunk), chunk // 2
    begins = range(0, max(1, case.length - 1 - overlap), window - overlap)
    windows = [(begin, min(begin + window + 1, case.length), overlap if begin else 0) for begin in begins]
    if harness.lm.stateful:
        whole = [(0, case.length, 0)]
        read = ids[0].T if harness.lm.codebooks else ids[0]
        _add_up(
            harness, case, ids, Engine(harness.lm, Policy(chunk_size=chunk)).stream(read), f"chunks of {chunk}", whole, chunk
        )
    if harness.lm.codebooks:
        return  # frames are never read in windows
    scored = Engine(harness.lm, Policy(windows=Windows(window, overlap), chunk_size=window)).stream(ids[0])
    _add_up(harness, case, ids, scored, f"windows of {window}, {overlap} of them read again", windows, window)


def _add_up(
    harness: Harness, case: Case, ids: Tensor, scored: Iterator[Chunk], how: str, spans: list[tuple[int, int, int]], piece: int
) -> None:
    """Hold what was `scored` to the losses of `spans`: (first token, last but one, targets that were scored before)."""
    due = torch.cat([_losses(harness, ids[..., begin:end], piece)[known:] for begin, end, known in spans])
    want = float(due.sum())
    if not math.isfinite(want):
        return  # a token that the model rules out cannot be scored, in one way or the other
    reading = LossAccumulator()
    targets: list[int] = []
    try:
        for part in scored:
            reading.add(part)
            targets += range(part.start, part.end)
    except NotFiniteError as error:
        raise broken(case, f"{case.length} tokens in {how}: {error}") from error
    last = case.length if harness.lm.codebooks else case.length - 1
    if targets != list(range(1, last + 1)):
        due_once = f"each of 1 to {last} was due once"
        raise broken(case, f"{case.length} tokens in {how}: the targets {targets} were scored, {due_once}.")
    allowed = 1e-5 * max(1.0, abs(want)) * (2**13 if harness.lm.dtype in (torch.float16, torch.bfloat16) else 1)
    for name, total in (("", reading.total), (", merged from blocks", np.sum(reading.units, axis=0))):
        off = abs(total[NATS] - want)
        if int(total[TOKENS]) != len(due) or not off <= allowed:
            raise broken(
                case,
                f"{case.length} tokens (seed {case.seed}), scored in {how}{name}: {total[NATS]:.6g} nats over "
                f"{int(total[TOKENS])} targets; their logits, taken one by one, give {want:.6g} over {len(due)}. A token "
                "is counted twice, left out, or scored with another's logits.",
                share=off / allowed,
                error=off,
            )


def _losses(harness: Harness, ids: Tensor, piece: int) -> Tensor:
    """Losses of the tokens after the first, or of all codes that are predicted while frames are read, from logits of the same
    pieces as the harness reads."""
    books = harness.lm.codebooks
    read = ids if books else ids[:, :-1]
    logits = harness.logits(read, [part.shape[-1] for part in torch.split(read, piece, dim=-1)]).double()
    ids = ids.to(logits.device)
    if not books:
        return F.cross_entropy(logits, ids[0, 1:], reduction="none").cpu()
    spoken = enumerate(zip(books.scored, books.delays, strict=True))
    said = [(logits[delay:, column], ids[0, book, : len(logits) - delay]) for column, (book, delay) in spoken]
    return torch.cat([F.cross_entropy(x[codes >= 0], codes[codes >= 0], reduction="none") for x, codes in said]).cpu()
