"""Show how often intervals cover the truth and how often gates raise a false alarm, from arrays without a model.

    pytest benchmarks/test_coverage.py

Documents have lognormal lengths (sigma 1.2, mean 400 tokens) or equal ones; their losses are normal (sd 0.4 nats), Student's t
with 3 degrees of freedom, or easier the longer they are (-0.25 nats for each e-fold of length). One text has independent losses
(sd 2 nats) and a slow part, an autoregression of the stated share of the variance. Beside our interval stand the percentile
bootstrap over the same units, which was ours before, and scipy's BCa bootstrap of the documents.

A target is missed where a one-sided 99 % binomial bound excludes it.
"""

import math

import numpy as np
import pytest

from pytest_lmeval.statistics._estimate import ratio_intervals
from pytest_lmeval.statistics._paired import paired_difference
from pytest_lmeval.statistics._proportion import wilson
from pytest_lmeval.statistics._verdict import judge_all

scipy_stats = pytest.importorskip("scipy.stats")
signal = pytest.importorskip("scipy.signal")

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

DRAWS, PAIRS, PEERS = 2000, 4000, 100  # of intervals, of gates, and of the peers, which are slow
SIGMA, TOKENS, BLOCK = 1.2, 400, 64
EASIER = 0.25  # nats for each e-fold of length
KINDS = [("lognormal", "normal"), ("lognormal", "t3"), ("lognormal", "longer is easier"), ("equal", "normal"), ("equal", "t3")]
DOCUMENTS = [(n, *kind) for n in (8, 15, 30, 100) for kind in KINDS]
SLOW = [(0, 0.0), (30, 0.05), (100, 0.05), (300, 0.05), (300, 0.2)]  # correlation length in tokens, share of the variance
STREAMS = [(tokens, *slow) for tokens in (2000, 10_000) for slow in SLOW]


def beyond(rate, n):
    """How far a frequency of n draws may lie from its rate: one-sided, at 99 %."""
    return 2.326 * math.sqrt(rate * (1 - rate) / n)


def documents(generator, n, lengths, losses):
    """Tokens and nats per token of n documents."""
    size = np.full(n, float(TOKENS))
    if lengths == "lognormal":
        size = np.maximum(1, np.round(np.exp(generator.normal(math.log(TOKENS) - SIGMA**2 / 2, SIGMA, n))))
    noise = generator.standard_t(3, n) / math.sqrt(3) if losses == "t3" else generator.normal(size=n)
    return size, 3 + 0.4 * noise - (EASIER * np.log(size) if losses == "longer is easier" else 0)


def truth_of(losses):
    """The mean over all tokens: long documents have most of them."""
    return 3 - (EASIER * (math.log(TOKENS) + SIGMA**2 / 2) if losses == "longer is easier" else 0)


def stream(generator, tokens, tau, share):
    """Sums of the losses over blocks, and their tokens; the mean loss is 0."""
    nats = generator.normal(0, 2, tokens)
    if share:
        rho, variance = math.exp(-1 / tau), 4 * share / (1 - share)
        steps = generator.normal(0, math.sqrt(variance * (1 - rho**2)), tokens)
        steps[0] = generator.normal(0, math.sqrt(variance))
        nats += signal.lfilter([1], [1, -rho], steps)
    begins = np.arange(0, tokens, BLOCK)
    return np.column_stack([np.add.reduceat(nats, begins), np.diff(np.append(begins, tokens))])


def bootstrap(generator, sums):
    """The percentile bootstrap of the ratio of both columns: what was used before."""
    drawn = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=1000) @ sums
    return np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])


def bca(generator, sums):
    found = scipy_stats.bootstrap(
        (sums[:, 0], sums[:, 1]), lambda above, below, axis: above.sum(axis) / below.sum(axis), paired=True, n_resamples=500,
        rng=generator,
    )  # fmt: skip
    return found.confidence_interval


def coverage(intervals, truth):
    """The fraction of intervals that hold the truth, and their median width."""
    ends = np.array(intervals, dtype=float)
    return float(np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))), float(np.median(ends[:, 1] - ends[:, 0]))


@pytest.mark.parametrize(("n", "lengths", "losses"), DOCUMENTS)
def test_intervals_over_documents(capsys, n, lengths, losses):
    generator, ours, before, peers, truth = np.random.default_rng(0), [], [], [], truth_of(losses)
    for number in range(DRAWS):
        size, loss = documents(generator, n, lengths, losses)
        sums = np.column_stack([size * loss, size])
        ours += ratio_intervals(sums, [(0, 1)])
        if number < PEERS:
            before.append(bootstrap(generator, sums))
            peers.append(bca(generator, sums))
    found, width = coverage(ours, truth)
    was, width_before = coverage(before, truth)
    peer, _ = coverage(peers, truth)
    with capsys.disabled():
        peer_says = f"bootstrap {was:.1%} {width_before:.2f}; BCa {peer:.1%}"
        print(f"\n{n:4} {lengths:10} {losses:17} {found:6.1%} width {width:.2f}; {peer_says}", end="")
    target = 0.92 if n >= 30 else 0.90
    assert found >= target - beyond(target, DRAWS)


@pytest.mark.parametrize(("tokens", "tau", "share"), STREAMS)
def test_intervals_of_one_text(capsys, tokens, tau, share):
    generator, ours, before = np.random.default_rng(0), [], []
    for _ in range(DRAWS):
        sums = stream(generator, tokens, tau, share)
        ours += ratio_intervals(sums, [(0, 1)], consecutive=True)
        before.append(bootstrap(generator, sums))
    found, width = coverage(ours, 0)
    was, width_before = coverage(before, 0)
    with capsys.disabled():
        print(f"\n{tokens:6,} tokens, {share:4.0%} slow over {tau:3}: {found:6.1%} width {width:.3f}; bootstrap {was:.1%} "
              f"{width_before:.3f}", end="")  # fmt: skip
    target = 0.92 if tokens >= 10_000 else 0.90
    assert found >= target - beyond(target, DRAWS)


@pytest.mark.parametrize("n", [10, 30, 100])
def test_intervals_of_graded_answers(capsys, n):
    generator = np.random.default_rng(0)
    found, width = coverage([wilson(np.where(generator.random(n) < 0.9, 1, generator.random(n))) for _ in range(DRAWS)], 0.95)
    with capsys.disabled():
        print(f"\n{n:4} answers, nine in ten right, others graded: {found:.1%} width {width:.2f}", end="")
    assert found >= 0.92 - beyond(0.92, DRAWS)


SKEWED = {
    "normal": lambda generator, n: generator.normal(size=n),
    "left-skewed": lambda generator, n: 1 - generator.exponential(1, n),
    "right-skewed": lambda generator, n: generator.exponential(1, n) - 1,
}


def correlated(generator, n, rho):
    return signal.lfilter([1], [1, -rho], np.append(generator.normal(), generator.normal(0, math.sqrt(1 - rho**2), n - 1)))


def verdicts_of(changes, margin, *, consecutive=False):
    """The verdicts on changes of documents or blocks in nats, of which more is worse."""
    found = []
    for change in changes:
        base, tokens = np.full(len(change), 1000.0), np.full(len(change), 100)
        difference = paired_difference(base, base + change, tokens, consecutive=consecutive)
        found.append(judge_all([difference], [margin / 100], [False])[0].name)
    return found


@pytest.mark.parametrize("n", [10, 30, 100])
@pytest.mark.parametrize("kind", SKEWED)
def test_false_alarms_and_same_of_documents(capsys, n, kind):
    generator = np.random.default_rng(0)
    alarms = verdicts_of((SKEWED[kind](generator, n) for _ in range(PAIRS)), 0.0).count("worse") / PAIRS
    lost = verdicts_of((SKEWED[kind](generator, n) + 0.5 for _ in range(PAIRS)), 0.5).count("same") / PAIRS
    found = verdicts_of((SKEWED[kind](generator, n) + 0.5 for _ in range(PAIRS // 4)), 0.0).count("worse") / (PAIRS // 4)
    with capsys.disabled():
        print(f"\n{n:4} documents, {kind:12}: false alarms {alarms:.2%}; same at the margin {lost:.2%}; "
              f"a loss of half a standard deviation found {found:.0%}", end="")  # fmt: skip
    assert alarms <= 0.015 + beyond(0.015, PAIRS)
    assert lost <= 0.03 + beyond(0.03, PAIRS)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6])
def test_false_alarms_of_neighbouring_blocks(capsys, rho):
    generator = np.random.default_rng(0)
    alarms = verdicts_of((correlated(generator, 150, rho) for _ in range(PAIRS)), 0.0, consecutive=True).count("worse") / PAIRS
    found = verdicts_of((correlated(generator, 150, rho) + 0.5 for _ in range(500)), 0.0, consecutive=True).count("worse") / 500
    with capsys.disabled():
        print(
            f"\n150 blocks, neighbours correlated {rho}: false alarms {alarms:.2%}; a loss of half an sd found {found:.0%}",
            end="",
        )
    assert alarms <= 0.015 + beyond(0.015, PAIRS)


@pytest.mark.parametrize(("n", "lost", "won"), [(30, 0.11, 0.1), (100, 0.04, 0.03), (1000, 0.03, 0.02), (1000, 0.06, 0.05)])
def test_a_loss_at_the_margin_is_hardly_ever_called_same(capsys, n, lost, won):
    """Also for questions: statsmodels and scipy have no interval of paired proportions to stand beside."""
    generator, names = np.random.default_rng(0), []
    for _ in range(PAIRS):
        changed = generator.choice([-1, 1, 0], n, p=[lost, won, 1 - lost - won])
        found = paired_difference((changed < 0).astype(float), (changed > 0).astype(float))
        names.append(judge_all([found], [lost - won], [True])[0].name)
    same = names.count("same") / PAIRS
    with capsys.disabled():
        print(f"\n{n:5,} questions, {lost:.0%} lost, {won:.0%} won, margin {lost - won:.0%}: same {same:.2%}", end="")
    assert same <= 0.03 + beyond(0.03, PAIRS)
