"""Declare the metrics of perplexity, agreement, training, hidden states and equivalence."""

from __future__ import annotations

import math
from functools import partial

from pytest_lmeval.records._metric import Metric

LOSS = "0.5%"  # default margin of a mean loss, of its baseline

lower = partial(Metric, higher_is_better=False)
neither = partial(Metric, higher_is_better=None)
per_token = partial(lower, unit="nats/token")

DECLARED = (  # perplexity, which tasks have too, is declared in `scoring._answer_metrics`
    lower(
        "bits_per_byte",
        "bits/byte",
        about="nats / ln 2 / bytes of the original text: comparable between tokenizers",
        sums=("nats", "bytes"),
        scale=1 / math.log(2),
        margin=LOSS,
    ),
    per_token(
        "nll",
        about="mean negative log-likelihood of a token",
        headline=False,
        sums=("nats", "tokens"),
        stands_for="bits_per_byte",
        margin=LOSS,
    ),
    Metric("token_accuracy_top1", about="fraction of targets that are the model's first choice", sums=("top1", "tokens")),
    Metric("token_accuracy_top5", about="fraction of targets among its first five choices", sums=("top5", "tokens")),
    lower("excess_nats", "nats/byte", about="loss above the entropy of the text, which is the loss of the best model"),
    neither("entropy_floor", "nats/byte", headline=False, about="entropy of a text of known source: loss of the best model"),
    per_token("loss_at_*", about="mean loss of the thousand targets up to a position", margin=LOSS),
    lower("loss_slope", "nats/1k tokens", about="least-squares slope of the losses at positions"),
    neither("fast_weight_change", about="mean relative change of the fast weights between two chunks"),
    neither("fast_weight_distance", headline=False, about="mean relative distance of the final fast weights from the initial"),
    Metric("fast_weights_changed", about="number of fast weights that changed while the text was read"),
    lower("perplexity_last", headline=False, about="perplexity on the held-out text with the last weights", margin=LOSS),
    per_token("nll_last", headline=False, about="mean loss on the held-out text with the last weights", margin=LOSS),
    per_token("train_loss", headline=False, about="mean training loss since the last evaluation but one"),
    Metric("agreement", about="fraction of positions where both models have the same most likely token"),
    per_token("kl", about="mean of KL(reference || lm) over all positions"),
    per_token("kl_at_least", about="lower bound of that mean, where a served model tells only its most likely tokens"),
    lower("mean_exp_difference", about="mean of exp |difference of a target's log-probability|; more than 1.05 is an alarm"),
    per_token("nll_difference", about="mean loss minus that of the reference", margin=LOSS),
    lower("perplexity_ratio", about="perplexity over that of the reference", margin=LOSS),
    lower("largest_difference", "nats", about="of the log-probability of any token that both models find possible"),
    neither("first_direction", about="fraction of the variance of hidden states along their first direction, mean of layers"),
    neither("first_direction_at_*", headline=False, about="fraction of the variance of a layer along its first direction"),
    neither("separation", "sd", about="standard deviations between the means of two sets of hidden states, mean of layers"),
    neither("separation_at_*", "sd", headline=False, about="the same at one layer, along the direction found in other texts"),
    Metric("laws_kept", about="number of laws that no case broke"),
    neither("cases", about="number of cases that the laws were tested on"),
    lower("worst_ratio", about="largest error of a chunked run over that of the full run, against float64"),
)
METRICS = {metric.name: metric for metric in DECLARED}
