"""Compare what two models say of the same targets, and add it up.

Of a served model only the most likely tokens are known. The KL is then bounded from below: the tokens that both models tell are
compared one by one, and all others together as one (Kullback and Leibler 1951: joining outcomes never adds to it).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.engine._losses import LOGITS_AT_ONCE
from pytest_lmeval.errors import NotFiniteError
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._measured import Series
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.scoring._loss_accumulator import BLOCK, add_to_blocks, merge_blocks
from pytest_lmeval.scoring._loss_metrics import exponential
from pytest_lmeval.statistics._estimate import ratio_intervals
from pytest_lmeval.statistics._proportion import wilson_of_sums

TOKENS, SAME, KL, DIFFERENCE, EXP = range(5)  # columns of a row of sums
COLUMNS = 5
MOST_NATS = 50.0  # of a difference whose exponential is added up
NOTHING = 1e-9  # probability of all other tokens below which they say nothing


@dataclass(frozen=True)
class Piece:
    """What one model says of targets `start`, `start` + 1, ... of a document.

    ids      [n] the targets
    nll      [n] losses
    logits   [n, v]; None of a served model
    top      of a served model: id -> log-probability of the most likely tokens at each target
    offsets  [n] tokens that were read before each target
    """

    document: int
    start: int
    ids: np.ndarray
    nll: np.ndarray
    logits: Tensor | None
    top: tuple[dict[int, float], ...]
    offsets: np.ndarray

    def part(self, begin: int, end: int | None = None) -> Piece:
        return replace(
            self,
            start=self.start + begin,
            ids=self.ids[begin:end],
            nll=self.nll[begin:end],
            logits=None if self.logits is None else self.logits[begin:end],
            top=self.top[begin:end],
            offsets=self.offsets[begin:end],
        )

    def told(self) -> list[dict[int, float]]:
        """Of a served model, the log-probabilities known of each position: of its most likely tokens and the target."""
        return [{**most, int(target): -float(loss)} for most, target, loss in zip(self.top, self.ids, self.nll, strict=True)]

    def choices(self, wanted: list[list[int]]) -> tuple[np.ndarray, list[dict[int, float]]]:
        """The most likely token [n] of each position, the first of equally likely ones, and the log-probabilities that are
        known; of a model that tells all, those of the tokens `wanted` of each."""
        if self.logits is None:
            told = self.told()
            return np.array([min(known, key=lambda token: (-known[token], token)) for known in told]), told
        totals = self.logits.double().logsumexp(-1, keepdim=True)
        found = [
            dict(zip(tokens, (row[tokens].double() - total).tolist(), strict=True))
            for row, total, tokens in zip(self.logits, totals, wanted, strict=True)
        ]
        return self.logits.argmax(-1).cpu().numpy(), found


def rows_of(ours: Piece, theirs: Piece) -> np.ndarray:
    """Rows [n, COLUMNS] with what the losses alone say."""
    rows = np.ones((len(ours.nll), COLUMNS))
    rows[:, DIFFERENCE] = ours.nll - theirs.nll
    rows[:, EXP] = np.exp(np.minimum(np.abs(rows[:, DIFFERENCE]), MOST_NATS))
    return rows


def compare_top(ours: Piece, theirs: Piece) -> tuple[np.ndarray, float]:
    """The same where one of the models tells only its most likely tokens."""
    rows, largest = rows_of(ours, theirs), 0.0
    wanted = [[*own] for own in (ours if ours.logits is None else theirs).told()]
    first_q, log_q = ours.choices(wanted)
    first_p, log_p = theirs.choices(wanted)
    rows[:, SAME] = first_q == first_p
    for at, (q, p) in enumerate(zip(log_q, log_p, strict=True)):
        tokens = sorted(q.keys() & p.keys())
        ours_at, theirs_at = (np.array([known[token] for token in tokens]) for known in (q, p))
        gap = np.where(np.isneginf(theirs_at), 0.0, theirs_at - ours_at)
        rest_q, rest_p = (1 - float(np.exp(known).sum()) for known in (ours_at, theirs_at))
        rest = rest_p * np.log(rest_p / rest_q) if min(rest_p, rest_q) > NOTHING else 0.0
        rows[at, KL] = max(0.0, float((np.exp(theirs_at) * gap).sum()) + rest)
        largest = max(largest, float(np.abs(gap).max(initial=0.0)))
    return rows, largest


def compare(ours: Piece, theirs: Piece, lm: Model, reference: Any) -> tuple[np.ndarray, float]:
    """Rows [n, COLUMNS] of single targets, and the largest difference of a log-probability, computed in blocks of targets."""
    if ours.logits is None or theirs.logits is None:
        return compare_top(ours, theirs)
    block = max(1, LOGITS_AT_ONCE // lm.vocab_size)
    device = ours.logits.device if ours.logits.device.type == "cuda" else torch.device("cpu")  # not all others have float64
    rows, largest = rows_of(ours, theirs), 0.0
    for begin in range(0, len(rows), block):
        q, p = (logits[begin : begin + block].to(device) for logits in (ours.logits, theirs.logits))
        rows[begin : begin + block, SAME] = (q.argmax(-1) == p.argmax(-1)).cpu().numpy()
        log_q, log_p = q.double().log_softmax(-1), p.double().log_softmax(-1)
        gap = log_p - log_q
        kl = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * gap)
        rows[begin : begin + block, KL] = kl.sum(-1).cpu().numpy()
        if not kl.isfinite().all():
            row, token = (int(index) for index in (~kl.isfinite()).nonzero()[0])
            raise NotFiniteError(
                f"KL is not finite at token {ours.start + begin + row} of document {ours.document}: the log-probability of id "
                f"{token} is {log_p[row, token]:.6g} in {reference.spec} and {log_q[row, token]:.6g} in {lm.spec}. Look "
                "for an overflow, or a masked-out logit."
            )
        largest = max(largest, float(gap[(log_p > -torch.inf) & (log_q > -torch.inf)].abs().max()))
    return rows, largest


@dataclass
class Sums:
    """Sums over all targets, and over documents or blocks of the stream.

    exact  all log-probabilities of both models are known, so that the KL is, and not only a bound
    kl     of each target, for its percentiles
    document  number of the last one
    """

    by_document: bool
    units: list[np.ndarray] = field(default_factory=list)
    total: np.ndarray = field(default_factory=lambda: np.zeros(COLUMNS))
    largest: float = 0.0
    nats: float = 0.0
    block: int = BLOCK
    exact: bool = True
    kl: list[np.ndarray] = field(default_factory=list)
    document: int = -1

    def add(self, piece: Piece, rows: np.ndarray, largest: float) -> None:
        self.total += rows.sum(axis=0)
        self.nats += float(piece.nll.sum())
        self.largest = max(self.largest, largest)
        self.kl.append(rows[:, KL].astype(np.float32))
        if not self.by_document:
            self.block = add_to_blocks(self.units, self.block, piece.start, rows)
            return
        if piece.document != self.document:
            self.document = piece.document
            self.units.append(np.zeros(COLUMNS))
        self.units[-1] += rows.sum(axis=0)

    def to_json(self) -> dict[str, Any]:
        """Everything, exactly."""
        return {**vars(self), "units": np.array(self.units).tolist(), "total": self.total.tolist(), "kl": packed(self.kl)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sums:
        arrays = {"units": list(np.array(data["units"])), "total": np.array(data["total"])}
        return cls(**{**data, **arrays, "kl": [unpacked(data["kl"])]})

    @classmethod
    def merged(cls, parts: Sequence[Sums]) -> Sums:
        """The sums of a text of which each part holds a share of the documents, or of the windows of a stream."""
        whole = cls(parts[0].by_document, exact=parts[0].exact)
        whole.total = sum((part.total for part in parts[1:]), parts[0].total)
        whole.largest, whole.nats = max(part.largest for part in parts), sum(part.nats for part in parts)
        whole.kl = [array for part in parts for array in part.kl]
        if whole.by_document:
            whole.units = [unit for part in parts for unit in part.units]
        else:
            whole.units, whole.block = merge_blocks([(part.units, part.block) for part in parts])
        return whole


def packed(arrays: Sequence[np.ndarray]) -> str:
    """Arrays of 32-bit numbers, joined, as a text that keeps every bit."""
    return base64.b64encode(np.concatenate([np.empty(0), *arrays]).astype("<f4").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def metrics_of(sums: Sums) -> dict[str, Value]:
    units, n = np.array(sums.units), int(sums.total[TOKENS])
    units = units[units[:, TOKENS] > 0]  # a share of a stream has none in some blocks
    same = wilson_of_sums(units[:, [SAME, TOKENS]], consecutive=not sums.by_document)
    ratios = [(KL, TOKENS), (DIFFERENCE, TOKENS), (EXP, TOKENS)]
    around_kl, around_difference, around_exp = ratio_intervals(units, ratios, consecutive=not sums.by_document)
    kl = "kl" if sums.exact else "kl_at_least"
    difference = value_of("nll_difference", sums.total[DIFFERENCE] / n, around_difference, n=n)
    tail = {f"{kl}_{name}": value_of(f"{kl}_{name}", value, n=n) for name, value in _tail(sums).items()}
    return {
        "agreement": value_of("agreement", sums.total[SAME] / n, same, n=n),
        kl: value_of(kl, sums.total[KL] / n, around_kl, n=n),
        "nll_difference": difference,
        "perplexity_ratio": exponential(difference, "perplexity_ratio"),
        "mean_exp_difference": value_of("mean_exp_difference", sums.total[EXP] / n, around_exp, n=n),
        "largest_difference": value_of("largest_difference", sums.largest, n=n),
        **tail,
    }


def _tail(sums: Sums) -> dict[str, float]:
    """The percentiles of the KL that so many targets tell, and the largest."""
    kl = np.concatenate(sums.kl)
    told = {f"p{percent}": percent for percent in (90, 95, 99) if len(kl) >= round(1000 / (100 - percent))}
    return {name: float(np.percentile(kl, percent)) for name, percent in told.items()} | {"max": float(kl.max())}


def series_of(sums: Sums) -> dict[str, Series]:
    """The distribution of the KL over the targets."""
    percents = [50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0]
    values = np.percentile(np.concatenate(sums.kl), percents).tolist()
    return {"kl_percentiles": Series(percents, values, "%", "nats", "KL of a token, by percentile")}
