"""Compute losses and ranks of targets from logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pytest_lmeval.errors import NotFiniteError
from pytest_lmeval.models._model import Model

ROUNDINGS = 8  # of 1 in the precision of the model: a unit in the last place of a logit between 8 and 16
ROUNDINGS_OF_SUMS = 64  # of 1 in float32, in which every model adds up
LOGITS_AT_ONCE = 1 << 19  # logits scored at once, few enough to stay in the processor's caches
LARGE_VOCABULARY = 1 << 13  # where counting in each row by itself is faster


def score(logits: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood [n] (float64, nats) and rank [n] of `targets` [n] under `logits` [n, v].

    Ties rank in the order of their ids, as argmax does. Computed in float32 at least, a block of rows at a time, by the same
    function as elsewhere: its rounding is systematic, and adds up over a long text.
    """
    if not len(targets):
        return np.empty(0), np.empty(0, dtype=np.int64)
    rows, wide = max(1, LOGITS_AT_ONCE // logits.shape[1]), torch.promote_types(logits.dtype, torch.float32)
    losses, ranks = list[Tensor](), list[Tensor]()
    for block, y in zip(torch.split(logits.detach(), rows), torch.split(targets, rows), strict=True):
        x = block.to(wide)
        losses.append(F.cross_entropy(x, y, reduction="none"))
        ranks.append(_ranks(x, y, x.gather(1, y[:, None])))
    nll, rank = (torch.cat(parts).cpu().numpy() for parts in (losses, ranks))
    return nll.astype(np.float64), rank


def _ranks(logits: Tensor, targets: Tensor, picked: Tensor) -> Tensor:
    """The rank [n] of the targets [n], whose logits are `picked` [n, 1], under `logits` [n, v]."""
    if logits.device.type == "cpu" and logits.shape[1] >= LARGE_VOCABULARY:
        rows = zip(logits.numpy(), targets.tolist(), picked[:, 0].numpy(), strict=True)
        return torch.tensor([np.count_nonzero(x[:y] >= own) + np.count_nonzero(x[y:] > own) for x, y, own in rows])
    rank = (logits > picked).sum(1)
    tied = (logits == picked).sum(1) > 1
    if tied.any():
        ids = torch.arange(logits.shape[1], device=logits.device)
        rank[tied] += ((logits[tied] == picked[tied]) & (ids < targets[tied, None])).sum(1)
    return rank


def token_rounding(dtype: torch.dtype) -> float:
    """What rounding changes in the log-likelihood of a token, compared with that of another: root mean square, nats.

    Measured on SmolLM2-135M, over the two likeliest choices of ARC, PIQA and HellaSwag with 1 to 24 tokens: the error of their
    difference is 0.06 to 0.07 in bfloat16 and 6e-6 in float32, times the root of the number of tokens. The laws allow many
    times more: they tell faults from rounding.
    """
    return max(ROUNDINGS * torch.finfo(dtype).eps, ROUNDINGS_OF_SUMS * torch.finfo(torch.float32).eps)


def check_finite(nll: np.ndarray, ids: np.ndarray, first: int, lm: Model) -> None:
    """Raise NotFiniteError for the first loss that is not finite; `nll` are those of the last `ids`, from token `first` on."""
    if np.isfinite(nll).all():
        return
    wrong = int(np.flatnonzero(~np.isfinite(nll))[0])
    target = len(ids) - len(nll) + wrong
    raise not_finite(nll[wrong], f"token {first + wrong} of the stream (id {ids[target]}, after id {ids[target - 1]})", lm)


def not_finite(loss: float, where: str, lm: Model) -> NotFiniteError:
    return NotFiniteError(
        f"{lm.spec} gave a loss of {loss} for {where}, in {lm.dtype} on {lm.device}. Its mean would be no number, so the "
        "measurement stops here; what was finished is kept. Look for an overflow in low precision, or a masked-out logit."
    )
