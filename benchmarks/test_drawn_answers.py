"""Count the false alarms of gates where answers are drawn at random, and the losses that they find, beside a fixed bar.

    LMEVAL_REAL_MODEL=FOLDER LMEVAL_REAL_DATA=MIRROR pytest benchmarks/test_drawn_answers.py

Simulated: questions of unequal difficulty, answered several times by a baseline and by a run, in equal or other numbers. Real:
a model answers questions at temperature 0.8, often; runs are drawn from its answers, so nothing changed between two of them;
and from its answers at temperature 1.6, as if the default of a server had changed.

    gate        verdicts of this package: `worse`, or `same`
    fixed bar   the number fell below that of the baseline by more than the margin
"""

import os

import numpy as np
import pytest

from pytest_lmeval import Generate, Task, Value, equivalence, policy_for
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.statistics._drawn import between_runs, drawn_difference
from pytest_lmeval.statistics._verdict import LEVEL, judge_all
from pytest_lmeval.tasks import find

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

PAIRS, MARGIN = 1000, 0.01
MOST = LEVEL + 2.33 * (LEVEL / PAIRS) ** 0.5  # of a rate of 1 %, with a probability of 99 %
NUMBERS = [(1, 1), (4, 4), (8, 8), (8, 2), (8, 1), (1, 8)]  # answers to a question, of the baseline and of the run
RATES = {"most are sure": (0.3, 0.2), "most are not": (2.0, 2.0), "hard": (0.3, 1.2)}  # of right answers: beta distributions


def drawn(generator, rates, answers):
    return (generator.random((len(rates), answers)) < rates[:, None]).astype(int).tolist()


def verdicts(pairs, margin=MARGIN):
    """The fractions of pairs of runs that the gate calls `worse` and `same`, and that a fixed bar calls worse."""
    found = [drawn_difference(base, new) for base, new in pairs]
    names = [judge_all([one], [margin], [True])[0].name for one in found]
    bar = np.mean([one.value < -margin for one in found])
    return {"worse": names.count("worse") / len(names), "same": names.count("same") / len(names), "fixed_bar": bar}


def recorded(lmeval, title, rates):
    lmeval.record("demo", title, **{name: Value(rate, n=PAIRS) for name, rate in rates.items()})
    print(f"{title:62} " + "  ".join(f"{name} {100 * rate:5.1f} %" for name, rate in rates.items()))


@pytest.mark.parametrize("shape", RATES)
@pytest.mark.parametrize("answers", NUMBERS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("questions", [60, 200])
def test_nothing_changed(lmeval, questions, answers, shape):
    generator = np.random.default_rng(questions + answers[0])
    pairs = []
    for _ in range(PAIRS):
        rates = generator.beta(*RATES[shape], size=questions)
        pairs.append((drawn(generator, rates, answers[0]), drawn(generator, rates, answers[1])))
    found = verdicts(pairs)
    recorded(lmeval, f"no change, {questions} questions, {answers[0]} and {answers[1]} answers, {shape}", found)
    assert found["worse"] <= MOST


@pytest.mark.parametrize("shape", RATES)
@pytest.mark.parametrize("answers", [(4, 4), (16, 16), (16, 4)], ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_a_loss_of_the_whole_margin_is_hardly_ever_called_same(lmeval, answers, shape):
    """Each right answer is lost with the same probability, so that the mean over all questions falls by the margin."""
    generator, margin, pairs = np.random.default_rng(answers[0]), 0.03, []
    mean = RATES[shape][0] / sum(RATES[shape])
    for _ in range(PAIRS):
        rates = generator.beta(*RATES[shape], size=200)
        pairs.append((drawn(generator, rates, answers[0]), drawn(generator, rates * (1 - margin / mean), answers[1])))
    found = verdicts(pairs, margin)
    recorded(lmeval, f"the margin of {margin} lost, {answers[0]} and {answers[1]} answers, {shape}", found)
    assert found["same"] <= 0.025 + 2.33 * (0.025 / PAIRS) ** 0.5


@pytest.mark.parametrize("answers", [1, 4, 16])
def test_more_answers_find_a_smaller_loss(lmeval, answers):
    generator = np.random.default_rng(answers)
    for loss in (0.03, 0.06, 0.1):
        pairs = []
        for _ in range(PAIRS):
            rates = generator.beta(2, 2, size=200)
            pairs.append((drawn(generator, rates, answers), drawn(generator, rates * (1 - 2 * loss), answers)))
        found = verdicts(pairs)
        recorded(lmeval, f"{loss} lost, 200 questions, {answers} answers", found)
    assert found["worse"] > {1: 0.3, 4: 0.95, 16: 0.99}[answers]


REAL = {name: os.environ.get(f"LMEVAL_REAL_{name.upper()}") for name in ("model", "data")}
QUESTIONS, ANSWERS, SHOWN = 40, 16, 3


@pytest.fixture(scope="module")
def answered(load_lm):
    """Temperature -> [questions, answers] whether the answer holds the right choice."""
    if not all(REAL.values()):
        pytest.skip("LMEVAL_REAL_MODEL and LMEVAL_REAL_DATA name a real model and real rows")
    arc = find("arc_easy")
    rows = [row for row, _ in zip(arc.rows.read(REAL["data"]), range(QUESTIONS + SHOWN), strict=False)]

    def right(row):
        return row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]

    def prompt(row):
        return f"Question: {row['question']}\nChoices: {', '.join(row['choices']['text'])}\nAnswer:"

    shown = "".join(f"{prompt(row)} {right(row)}\n\n" for row in rows[QUESTIONS:])

    def ask(row):
        return Generate(shown + prompt(row), (right(row),), max_tokens=8, stop=("\n",), temperature=temperature[0])

    def says_it(row, output):
        return right(row).lower() in output.lower()

    temperature, found = [0.0], {}
    lm = load_lm(f"hf:{REAL['model']}")
    certificate = equivalence(lm).certificate
    for temperature[0] in (0.8, 1.6):
        task = Task("arc", rows[:QUESTIONS], ask, score=says_it, repeats=ANSWERS, most_cut_off=1)
        result = measure_task(lm, task, policy=policy_for(lm, certificate, batch_size=16))
        scores = np.array([example.scores["score"] for example in result.examples], dtype=int)
        found[temperature[0]] = scores.reshape(QUESTIONS, ANSWERS)
        print(f"at {temperature[0]}: {scores.mean():.3f}, {result.record.details['calls']} calls")
    return found


def runs(generator, scores, answers):
    """A run of so many answers to each question, drawn from all that there are."""
    return [generator.choice(row, answers, replace=False).tolist() for row in scores]


def two_runs(generator, scores, answers):
    """Two runs, which have no answer in common: nothing changed between them."""
    mixed = [generator.permutation(row) for row in scores]
    return [row[: answers[0]].tolist() for row in mixed], [row[-answers[1] :].tolist() for row in mixed]


@pytest.mark.parametrize("answers", NUMBERS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_a_real_model_that_did_not_change(lmeval, answered, answers):
    generator, scores = np.random.default_rng(0), answered[0.8]
    found = verdicts([two_runs(generator, scores, answers) for _ in range(PAIRS)])
    recorded(lmeval, f"SmolLM2 at 0.8, no change, {answers[0]} and {answers[1]} answers", found)
    assert found["worse"] <= MOST


def test_the_spread_of_one_run_tells_that_of_all(lmeval, answered):
    generator, scores = np.random.default_rng(1), answered[0.8]
    told = between_runs(runs(generator, scores, 8))
    seen = np.std([np.mean(runs(generator, scores, 8)) for _ in range(PAIRS)]) / np.sqrt(1 - 8 / ANSWERS)  # of finite answers
    recorded(lmeval, "SmolLM2 at 0.8, 8 answers", {"told": told, "seen": seen})
    assert 0.8 < told / seen < 1.25


@pytest.mark.parametrize("answers", NUMBERS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_a_real_model_that_got_worse(lmeval, answered, answers):
    generator = np.random.default_rng(2)
    base, new = answered[0.8], answered[1.6]
    pairs = [(runs(generator, base, answers[0]), runs(generator, new, answers[1])) for _ in range(PAIRS)]
    loss = f"{new.mean() - base.mean():+.3f}"
    recorded(lmeval, f"SmolLM2 at 1.6 ({loss}), {answers[0]} and {answers[1]} answers", verdicts(pairs))
