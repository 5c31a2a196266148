"""What a reading found, by name: a view of its record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytest_lmeval.records.record import Record, Series
from pytest_lmeval.records.value import Metric
from pytest_lmeval.scoring.fast_weights import FastWeights, found_in
from pytest_lmeval.scoring.positions import name_of
from pytest_lmeval.scoring.reading import HITS


@dataclass(frozen=True, repr=False)
class PerplexityResult:
    """What a reading found. Numbers carry `.low` and `.high`, their 95 % interval (bootstrap over documents, or over
    blocks of one stream; None where the text is too short for one)."""

    record: Record
    resumed_at: int = 0  # tokens that an interrupted run had already scored

    def __repr__(self) -> str:
        return repr(self.record)

    @property
    def perplexity(self) -> Metric:
        """exp of the mean loss a token."""
        return self.record.metrics["perplexity"]

    @property
    def nll(self) -> Metric:
        """Mean negative log-likelihood, nats a token."""
        return self.record.metrics["nll"]

    @property
    def bits_per_byte(self) -> Metric:
        """Bits a byte of the original text; only for corpora of text."""
        if "bits_per_byte" not in self.record.metrics:
            raise AttributeError(f"{self.record.subject} holds token ids, no text: there are no bytes to divide by.")
        return self.record.metrics["bits_per_byte"]

    @property
    def token_accuracy(self) -> dict[int, Metric]:
        """Share of targets among the model's first k choices, by k."""
        return {k: self.record.metrics[f"token_accuracy_top{k}"] for k in HITS}

    @property
    def tokens(self) -> int:
        """Target tokens scored, each exactly once."""
        return int(self.record.cost["tokens"])

    @property
    def tokens_per_second(self) -> Metric:
        return self.record.metrics["tokens_per_second"]

    @property
    def seconds(self) -> float:
        return float(self.record.cost["seconds"])

    @property
    def state_bytes(self) -> int:
        """The most memory that the carried state took."""
        return int(self.record.cost["state_bytes"])

    @property
    def chunks(self) -> int:
        return int(self.record.settings["chunks"])

    @property
    def chunk_loss(self) -> Series:
        """Mean loss of each chunk (of groups of chunks, in a very long reading), nats a token, by tokens read."""
        return self.record.series["chunk_loss"]

    @property
    def chunk_seconds(self) -> Series:
        return self.record.series["chunk_seconds"]

    @property
    def loss_by_position(self) -> Series:
        """Mean loss by the number of tokens before the target, in half octaves."""
        return self.record.series["loss_by_position"]

    @property
    def loss_at(self) -> dict[int, Metric]:
        """Mean loss of the thousand tokens up to each chosen position that was reached, with its interval, nats a token."""
        series = self.record.series.get("loss_at")
        return {} if series is None else {int(at): self.record.metrics[name_of(int(at))] for at in series.x}

    @property
    def loss_slope(self) -> Metric:
        """Least-squares slope of `loss_at`, nats a token per 1000 positions: negative where context goes on helping.

        Raises AttributeError where fewer than two of the chosen positions were reached.
        """
        if "loss_slope" not in self.record.metrics:
            asked, missing = (self.record.settings.get(name, []) for name in ("positions", "not_reached"))
            raise AttributeError(
                f"a slope takes two positions at least. Asked for were {asked or 'none'}; of those, {self.record.subject} did "
                f"not go on to {missing or 'none'}. Give positions that the text reaches: positions=(1000, 2000, 4000)."
            )
        return self.record.metrics["loss_slope"]

    @property
    def fast_weights(self) -> FastWeights | None:
        """What became of the model's fast weights while it read; None if it has none."""
        return found_in(self.record)

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The verdict that the reading stands on."""
        return self.record.certificate
