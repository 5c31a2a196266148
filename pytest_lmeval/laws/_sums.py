"""The scores-once law: the engine's chunks and windows score every token once, and add up to the whole."""

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
from pytest_lmeval.laws._diagnosis import broken
from pytest_lmeval.laws._harness import FEW, Harness
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.scoring._loss_accumulator import NATS, TOKENS, LossAccumulator


def sums(harness: Harness, case: Case) -> None:
    """Recompute the engine's losses from raw logits of the same chunks, to isolate bugs of the engine and a model's `keep`."""
    lm, chunk = harness.lm, max(case.sizes[0], -(-case.length // 12))
    if harness.largest_continuation is not None:
        case, chunk = replace(case, length=min(case.length, FEW)), 1
    chunk = min(chunk, harness.most or chunk)
    ids = harness.tokens(case.length, case.seed)
    if lm.stateful:
        scored = Engine(lm, Policy(chunk_size=chunk)).stream(ids[0].T if lm.codebooks else ids[0])
        _compare(harness, case, ids, scored, f"chunks of {chunk}", [(0, case.length, 0)], chunk)
    if lm.codebooks:
        return  # frames are never read in windows
    window, overlap = max(2, chunk), chunk // 2
    begins = range(0, max(1, case.length - 1 - overlap), window - overlap)
    spans = [(begin, min(begin + window + 1, case.length), overlap if begin else 0) for begin in begins]
    scored = Engine(lm, Policy(windows=Windows(window, overlap), chunk_size=window)).stream(ids[0])
    _compare(harness, case, ids, scored, f"windows of {window}, {overlap} of them read again", spans, window)


def _compare(
    harness: Harness, case: Case, ids: Tensor, scored: Iterator[Chunk], how: str, spans: list[tuple[int, int, int]], chunk: int
) -> None:
    """Compare what was `scored` with the losses of `spans`: (first token, end, targets that were scored before)."""
    losses = torch.cat([_losses(harness, ids[..., begin:end], chunk)[known:] for begin, end, known in spans])
    expected = float(losses.sum())
    if not math.isfinite(expected):
        return  # a token that the model rules out cannot be scored in any way
    accumulator = LossAccumulator()
    targets: list[int] = []
    try:
        for part in scored:
            accumulator.add(part)
            targets += range(part.start, part.end)
    except NotFiniteError as error:
        raise broken(case, f"{case.length} tokens in {how}: {error}") from error
    last = case.length if harness.lm.codebooks else case.length - 1
    if targets != list(range(1, last + 1)):
        raise broken(
            case, f"{case.length} tokens in {how}: targets {targets} were scored, and 1 to {last} expected, once each."
        )
    allowed = 1e-5 * max(1.0, abs(expected)) * (2**13 if harness.lm.dtype in (torch.float16, torch.bfloat16) else 1)
    for name, total in (("", accumulator.total), (", merged from blocks", np.sum(accumulator.units, axis=0))):
        off = abs(total[NATS] - expected)
        if int(total[TOKENS]) != len(losses) or not off <= allowed:
            raise broken(
                case,
                f"{case.length} tokens (seed {case.seed}), scored in {how}{name}: {total[NATS]:.6g} nats over "
                f"{int(total[TOKENS])} targets; recomputed from raw logits, {expected:.6g} over {len(losses)}. A token is "
                "counted twice, left out, or scored with another's logits.",
                tolerance_ratio=off / allowed,
                error=off,
            )


def _losses(harness: Harness, ids: Tensor, chunk: int) -> Tensor:
    """Losses of the tokens after the first, or of all codes that are predicted while frames are read, from raw logits."""
    books = harness.lm.codebooks
    read = ids if books else ids[:, :-1]
    logits = harness.logits(read, [part.shape[-1] for part in torch.split(read, chunk, dim=-1)]).double()
    ids = ids.to(logits.device)
    if not books:
        return F.cross_entropy(logits, ids[0, 1:], reduction="none").cpu()
    columns = enumerate(zip(books.scored, books.delays, strict=True))
    pairs = [(logits[delay:, column], ids[0, book, : len(logits) - delay]) for column, (book, delay) in columns]
    return torch.cat([F.cross_entropy(x[codes >= 0], codes[codes >= 0], reduction="none") for x, codes in pairs]).cpu()
