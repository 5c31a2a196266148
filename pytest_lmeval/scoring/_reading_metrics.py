"""The metrics of reading a text, of training on one, and of two models that read the same one."""

from __future__ import annotations

import math

from pytest_lmeval.records._metric import Metric

LOSS = "0.5%"  # of the baseline: what may be lost of a mean loss

METRICS = {
    metric.name: metric
    for metric in (
        # perplexity, which tasks have too, stands in `scoring._answer_metrics`
        Metric(
            "bits_per_byte",
            "bits/byte",
            higher_is_better=False,
            about="nats / ln 2 / bytes of the original text: comparable between tokenizers",
            sums=("nats", "bytes"),
            scale=1 / math.log(2),
            margin=LOSS,
        ),
        Metric(
            "nll",
            "nats/token",
            higher_is_better=False,
            about="mean negative log-likelihood of a token",
            headline=False,
            sums=("nats", "tokens"),
            stands_for="bits_per_byte",
            margin=LOSS,
        ),
        Metric("token_accuracy_top1", about="share of targets that are the model's first choice", sums=("top1", "tokens")),
        Metric("token_accuracy_top5", about="share of targets among the model's first five choices", sums=("top5", "tokens")),
        Metric(
            "excess_nats",
            "nats/byte",
            higher_is_better=False,
            about="loss above the entropy of the text, which is what the best model pays",
        ),
        Metric(
            "entropy_floor",
            "nats/byte",
            higher_is_better=None,
            headline=False,
            about="entropy of a text of known source: what the best model pays on average",
        ),
        Metric(
            "loss_at_*",
            "nats/token",
            higher_is_better=False,
            about="mean loss of the thousand tokens up to a position",
            margin=LOSS,
        ),
        Metric("loss_slope", "nats/1k tokens", higher_is_better=False, about="least-squares slope of the losses at positions"),
        Metric(
            "fast_weight_change", higher_is_better=None, about="mean relative change of the fast weights between two chunks"
        ),
        Metric(
            "fast_weight_distance",
            higher_is_better=None,
            headline=False,
            about="mean relative distance of the fast weights from their initial values at the end",
        ),
        Metric("fast_weights_moving", about="fast weights that changed while the text was read"),
        Metric(
            "perplexity_last",
            higher_is_better=False,
            headline=False,
            about="perplexity on the held-out text with the last weights",
            margin=LOSS,
        ),
        Metric(
            "nll_last",
            "nats/token",
            higher_is_better=False,
            headline=False,
            about="mean loss on the held-out text with the last weights",
            margin=LOSS,
        ),
        Metric(
            "train_loss",
            "nats/token",
            higher_is_better=False,
            headline=False,
            about="mean training loss since the last evaluation but one",
        ),
        Metric("agreement", about="share of places where both models have the same likeliest token"),
        Metric("kl", "nats/token", higher_is_better=False, about="mean of KL(reference || lm) over all places"),
        Metric(
            "nll_difference",
            "nats/token",
            higher_is_better=False,
            about="mean loss less that of the reference",
            margin=LOSS,
        ),
        Metric("perplexity_ratio", higher_is_better=False, about="perplexity over that of the reference", margin=LOSS),
        Metric(
            "largest_difference",
            "nats",
            higher_is_better=False,
            about="of the log-probability of any token at any place, where both hold it possible",
        ),
        Metric("laws_kept", about="laws of streaming that no case broke"),
        Metric("cases", higher_is_better=None, about="cases that the laws were tried on"),
        Metric(
            "worst_ratio",
            higher_is_better=False,
            about="largest error of a chunked run over that of the full run, against float64",
        ),
    )
}
