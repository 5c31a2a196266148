"""Compare metrics with the libraries that define them, check their intervals, and what they refuse."""

import math
import sys
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from msgspec.structs import replace

from pytest_lmeval.errors import ArgumentError, TaskError
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._metric import Metric, judge_of
from pytest_lmeval.scoring import _answer_metrics as answer_metrics, _metrics as metrics
from pytest_lmeval.scoring._answer_metrics import METRICS
from pytest_lmeval.scoring._metrics import LM_EVAL_NAMES, metrics_of

OF_CHOICES = ["accuracy", "greedy_match", "perplexity", "f1", "f1_macro", "matthews", "chance"]
OF_TEXTS = ["exact_match", "squad_f1", "has_answer_exact_match", "has_answer_f1", "no_answer_accuracy"]
OF_TARGETS = ["bleu", "rouge1", "rouge2", "rougeL"]


def chosen(number, loglikelihoods, right, group=None, choices=(" no", " yes", " maybe")):
    """An answered question with choices; the likeliest are greedy."""
    best = max(loglikelihoods)
    choices = choices[: len(loglikelihoods)]
    return Example(
        id=f"{number:016x}",
        number=number,
        prompt="",
        output=choices[list(loglikelihoods).index(best)].strip(),
        group=group,
        choices=choices,
        right=right if isinstance(right, tuple) else (right,),
        loglikelihoods=tuple(loglikelihoods),
        tokens=(1,) * len(loglikelihoods),
        greedy=tuple(value == best for value in loglikelihoods),
    )


def output_of(output, *targets, number=0, group=None, judged=None):
    texts = {"output": output.strip(), "targets": targets, "target": targets[0] if targets else None}
    return Example(id=f"{number:016x}", number=number, prompt="", group=group, judged=judged, **texts)


def compute(names, examples, **options):
    """Metrics by their names, of examples without scores."""
    asked = metrics_of(names, "this call")
    scored = [replace(example, scores=metrics.scored(example, asked)) for example in examples]
    return metrics.compute(asked, scored, **options)


def many(pairs, k=2, groups=None):
    """An example for each pair of label and prediction."""
    return [
        chosen(number, [-1.0 if index == prediction else -2.0 for index in range(k)], label, groups and groups[number])
        for number, (label, prediction) in enumerate(pairs)
    ]


def drawn(n=60, k=2, seed=0):
    return [tuple(pair) for pair in np.random.default_rng(seed).integers(0, k, (n, 2)).tolist()]


def value_of(name, examples):
    return float(compute([name], examples)[name])


def test_choices_are_compared_by_their_log_likelihood_over_a_length():
    example = replace(chosen(0, [-3.0, -4.0], 1, choices=(" no", " Übung")), tokens=(1, 3))
    shares = {norm: value_of(f"accuracy{norm}", [example]) for norm in ("", "_per_character", "_per_byte", "_per_token")}
    assert shares == {"": 0, "_per_character": 1, "_per_byte": 1, "_per_token": 1}  # -3 > -4, but -3/2 < -4/5, -4/6, and -4/3
    bytes_decide = replace(example, choices=(" abcde", " Übun"), loglikelihoods=(-5.0, -4.4), tokens=(1, 1))
    assert value_of("accuracy_per_character", [bytes_decide]) == 0
    assert value_of("accuracy_per_byte", [bytes_decide]) == 1
    tied = [chosen(0, [-1.0, -1.0], 1), chosen(1, [-1.0, -2.0], 0), chosen(2, [-1.0], 0), output_of("")]
    assert [example.tied for example in tied] == [True, False, False, False]
    assert value_of("accuracy", tied[:2]) == 0.75


# Log-likelihoods of choices that often tie, the indices of right ones, and an order of the choices.
TIES = st.integers(2, 3).flatmap(
    lambda k: st.tuples(
        st.lists(st.sampled_from([-3.0, -2.0, -1.0]), min_size=k, max_size=k),
        st.sets(st.integers(0, k - 1), min_size=1),
        st.permutations(range(k)),
    )
)
NORMS = {"accuracy": "sum", "accuracy_per_character": "character", "accuracy_per_byte": "byte", "accuracy_per_token": "token"}


@given(TIES, st.sampled_from(sorted(NORMS)))
def test_a_tie_counts_what_a_guess_among_the_likeliest_would_whatever_the_order_of_choices(question, name):
    losses, right, order = question
    example = chosen(0, losses, tuple(right), choices=(" no", " up", " on"))  # of one length
    best = {index for index, loss in enumerate(losses) if loss == max(losses)}
    found = compute([name], [example])[name]
    assert found == pytest.approx(len(best & right) / len(best))
    assert found.ties == (len(best) > 1)
    turned = chosen(0, [losses[index] for index in order], tuple(order.index(index) for index in right))
    assert value_of("accuracy", [turned]) == value_of("accuracy", [example])


def test_lm_evals_rule_takes_the_first_of_a_tie_and_its_interval_holds_what_the_other_rule_gives():
    ties = [chosen(number, [-1.0, -1.0], 0) for number in range(30)]
    asked = ["accuracy", "f1_macro", "matthews"]
    shared, first = (compute(asked, [replace(one, tie_rule=rule) for one in ties]) for rule in ("shared", "first"))
    assert (float(shared["accuracy"]), float(first["accuracy"])) == (0.5, 1.0)
    assert (shared["accuracy"].ties, first["accuracy"].ties) == (30, 30)
    assert (first["accuracy"].low, first["accuracy"].high) == (shared["accuracy"].low, 1.0)
    assert (float(first["f1_macro"]), first["f1_macro"].low) == (1.0, shared["f1_macro"].low)
    last = [replace(one, tie_rule="first", right=(1,)) for one in ties]
    assert value_of("accuracy", last) == 0.0  # the order of the choices decides
    untied = [replace(one, tie_rule="first") for one in many(drawn())]
    assert compute(asked, untied)["accuracy"].to_json() == compute(asked, many(drawn()))["accuracy"].to_json()


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 3), st.sampled_from([2.0**-4, 2.0**-20]))
def test_choices_are_tied_that_rounding_alone_tells_apart(one, other, distance, rounding):
    """The log-likelihood of n tokens is known to the root of n roundings; divided by a length, to that part of it."""
    known = rounding * math.sqrt(max(one, other))
    example = replace(chosen(0, [-8.0, -8.0 - distance * known], 1), tokens=(one, other), rounding=rounding)
    assert example.tied == (distance * known <= max(known, 8e-12)) or distance == pytest.approx(1)
    per_token = replace(example, tokens=(4, 4), loglikelihoods=(-8.0, -8.0 - distance * rounding * 2))
    assert (len(per_token.likeliest("token")) == 2) == per_token.tied or distance == pytest.approx(1)
    assert replace(example, loglikelihoods=(-8.0, -8.0)).tied


@given(
    st.lists(st.tuples(st.integers(-40, 0), st.integers(1, 12)), min_size=2, max_size=5),
    st.sampled_from([0.0, 2.0**-20, 0.5, 1.0]), st.sampled_from(["sum", "token", "byte", "character"]),
)  # fmt: skip
def test_the_likeliest_choices_are_all_that_rounding_does_not_tell_from_the_first(choices, rounding, norm):
    texts = tuple(f" {'e' * length}" for _, length in choices)
    example = chosen(0, [total / 4 for total, _ in choices], 0, choices=texts)
    example = replace(example, tokens=tuple(length for _, length in choices), rounding=rounding)
    lengths = [1 if norm == "sum" else length for _, length in choices]
    scores = [total / length for total, length in zip(example.loglikelihoods, lengths, strict=True)]
    known = [rounding * math.sqrt(count) / length for count, length in zip(example.tokens, lengths, strict=True)]
    best = scores.index(max(scores))
    reach = [max(known[best], known[index], 1e-12 * abs(scores[best])) for index in range(len(scores))]
    assert example.likeliest(norm) == tuple(
        index for index in range(len(scores)) if scores[best] - scores[index] <= reach[index]
    )


def test_quotients_that_differ_by_rounding_of_the_division_are_a_tie():
    """-5.545177444 nats a token, of 3 and of 7 tokens: a model that gives all tokens the same probability."""
    loss = -math.log(255)
    example = replace(chosen(0, [3 * loss, 7 * loss, 9 * loss], 2), tokens=(3, 7, 9))
    assert len({total / count for total, count in zip(example.loglikelihoods, example.tokens, strict=True)}) > 1
    assert example.likeliest("token") == (0, 1, 2)
    assert example.likeliest("sum") == (0,)


@pytest.mark.parametrize("name", ["f1", "f1_macro", "matthews"])
def test_a_tie_is_in_the_confusion_matrix_what_guesses_are_on_average(name):
    """Half of a tie is predicted as each class: as if the question were asked twice, and answered once so, once so."""
    pairs = drawn(40)
    tied = [chosen(100 + number, [-1.0, -1.0], number % 2) for number in range(20)]
    guesses = [(number % 2, guess) for number in range(20) for guess in (0, 1)]
    assert value_of(name, many(pairs) + tied) == pytest.approx(value_of(name, many([*pairs, *pairs, *guesses])), rel=1e-12)


def test_a_metric_of_texts_counts_each_of_the_tied_choices():
    tie = replace(chosen(0, [-1.0, -1.0, -2.0], 1), targets=("yes",))
    names = ["exact_match", "squad_f1", "rouge1", "greedy_match", "perplexity"]
    found = compute(names, [tie])
    untied = compute(names, [replace(tie, loglikelihoods=(-2.0, -1.0, -2.0))])
    assert [float(found[name]) for name in names[:3]] == [0.5, 0.5, 0.5]
    assert [float(untied[name]) for name in names[:3]] == [1, 1, 1]
    assert [float(found[name]) for name in names[3:]] == [float(untied[name]) for name in names[3:]]  # compare no choices
    assert compute(names, [replace(tie, tie_rule="first")])["exact_match"] == 0


def test_a_score_of_ones_own_sees_each_tied_choice_and_may_still_not_be_a_fraction():
    says_no = Metric("says_no", score=lambda example: float(example.output == "no"), interval="proportion")
    half = Metric("half", score=lambda example: 0.5, interval="proportion")
    tie = chosen(0, [-1.0, -1.0, -2.0], 1)
    assert metrics.scored(tie, [says_no]) == {"says_no": 0.5}
    with pytest.raises(TaskError, match=r"the score of half .* is 0\.5\. Return 1 or 0"):
        metrics.scored(tie, [half])


def test_any_of_several_right_choices_is_right_and_chance_has_no_interval():
    examples = [chosen(0, [-1.0, -2.0, -3.0], (0, 2)), chosen(1, [-2.0, -1.0, -3.0], (0, 2))]
    assert value_of("accuracy", examples) == 0.5
    chance = compute(["chance"], examples * 8)["chance"]
    assert (float(chance), chance.interval, chance.higher_is_better) == (pytest.approx(2 / 3), None, None)


def test_greedy_match_and_perplexity_are_those_of_the_right_choice():
    examples = [replace(chosen(number, [loss], 0), greedy=(loss > -2,)) for number, loss in enumerate((-1.0, -3.0))]
    assert value_of("greedy_match", examples) == 0.5
    assert value_of("perplexity", examples) == pytest.approx(math.exp(2))


@pytest.mark.parametrize(("name", "k"), [("f1", 2), ("f1_macro", 2), ("f1_macro", 3), ("matthews", 2), ("matthews", 3)])
def test_labels_are_scored_as_scikit_learn_scores_them(name, k):
    from sklearn.metrics import f1_score, matthews_corrcoef

    theirs = {"f1": f1_score, "f1_macro": partial(f1_score, average="macro"), "matthews": matthews_corrcoef}[name]
    pairs = drawn(k=k)
    one_group = many(pairs, k, groups=["g"] * len(pairs))  # no interval, which takes 500 draws
    assert value_of(name, one_group) == pytest.approx(theirs(*zip(*pairs, strict=True)), rel=1e-12)


def test_the_interval_of_f1_is_that_of_drawing_the_questions_themselves():
    from sklearn.metrics import f1_score

    pairs = np.array(drawn(n=200))
    f1 = compute(["f1"], many(pairs.tolist()))["f1"]
    generator = np.random.default_rng(1)
    draws = [f1_score(*pairs[generator.integers(0, 200, 200)].T) for _ in range(300)]
    assert (f1.low, f1.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.025)


@pytest.mark.parametrize(
    ("name", "pair"), [("matthews", (0, 1)), ("matthews", (1, 1)), ("f1", (0, 0)), ("f1_macro", (1, 0)), ("f1", (1, 0))]
)
def test_a_metric_of_labels_is_zero_without_a_warning_if_all_are_of_one_class(name, pair):
    assert value_of(name, many([pair] * 7)) == 0


TEXTS = [
    output_of("The cat!", "a cat", "dogs", number=0),
    output_of("a big cat", "cat", number=1),
    output_of("horses", "cat", number=2),
    output_of("", "cat", number=3),
]


def test_texts_are_compared_as_torchmetrics_compares_them():
    from torchmetrics.functional.text import squad

    theirs = squad(
        [{"id": example.id, "prediction_text": example.output} for example in TEXTS],
        [{"id": example.id, "answers": {"text": list(example.targets)}} for example in TEXTS],
    )
    assert value_of("exact_match", TEXTS) == pytest.approx(float(theirs["exact_match"]) / 100)
    assert value_of("squad_f1", TEXTS) == pytest.approx(float(theirs["f1"]) / 100)
    assert value_of("squad_f1", TEXTS) == pytest.approx((1 + 2 / 3) / 4)


@pytest.mark.parametrize(("output", "right"), [("", 1), (" Unanswerable.", 1), ("it is unanswerable", 0), ("horse", 0)])
def test_an_output_without_an_answer_is_right_if_the_text_tells_none(output, right):
    for targets in (("unanswerable", ""), ("",)):
        found = compute(OF_TEXTS, [output_of(output, *targets)])
        assert found == {"exact_match": right, "squad_f1": right, "no_answer_accuracy": right}
    found = compute(OF_TEXTS, [output_of(output, "cat")])
    assert found == dict.fromkeys(OF_TEXTS[:4], 0)


def test_metrics_of_some_questions_count_those_and_are_left_out_if_there_are_none():
    found = compute(OF_TEXTS, [*TEXTS, output_of("", "unanswerable", "", number=9)])
    assert [found[name].n for name in OF_TEXTS] == [5, 5, 4, 4, 1]
    assert found["has_answer_f1"] == compute(["squad_f1"], TEXTS)["squad_f1"]
    assert list(compute(OF_TEXTS, TEXTS)) == OF_TEXTS[:4]


WRITTEN = [
    ("the cat sat on the mat today", "the cat sat on a mat today"),
    ("it rains in the north", "it is raining in the north", "it rains in the cold north of it"),
    ("nobody knows, of course.", "nobody knows that, of course."),
    ("", "something was expected here"),
]
SENTENCES = [output_of(*texts, number=number) for number, texts in enumerate(WRITTEN * 3)]


def test_bleu_is_that_of_sacrebleu_for_the_corpus_and_no_mean_of_sentences():
    from sacrebleu import BLEU

    references = [[example.targets[0] for example in SENTENCES], [(*example.targets, None)[1] for example in SENTENCES]]
    theirs = BLEU().corpus_score([example.output for example in SENTENCES], references)
    bleu = compute(["bleu"], SENTENCES)["bleu"]
    assert bleu == pytest.approx(theirs.score, rel=1e-12)
    assert (bleu.unit, bleu.n) == ("BLEU", 12)
    assert 0 < bleu.low < bleu < bleu.high < 100
    single = [BLEU().corpus_score([example.output], [[text] for text in example.targets]).score for example in SENTENCES]
    assert abs(np.mean(single) - bleu) > 1

    smoothed = BLEU().corpus_score(["the cat sat on it"], [["the cat lay on it"]])
    assert smoothed.counts[2:] == [0, 0]
    assert smoothed.score > 0
    assert value_of("bleu", [output_of("the cat sat on it", "the cat lay on it")]) == pytest.approx(smoothed.score)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_best_f_measure_over_the_targets(name):
    from rouge_score.rouge_scorer import RougeScorer

    theirs = [
        max(RougeScorer([name]).score(target, example.output)[name].fmeasure for target in example.targets)
        for example in SENTENCES
    ]
    assert value_of(name, SENTENCES) == pytest.approx(np.mean(theirs))


def test_a_rate_is_the_fraction_judged_true_with_a_wider_interval_if_asking_ended_when_it_was_certain():
    examples = [output_of("", number=number, judged=True if number > 1 else (None, False)[number]) for number in range(20)]
    fixed, stopped = (compute(["rate"], examples, threshold=threshold)["rate"] for threshold in (None, 0.5))
    assert (fixed, fixed.n, fixed.higher_is_better) == (0.9, 20, None)
    assert fixed == stopped
    assert stopped.low < fixed.low < fixed.high < stopped.high


SLOW = [pytest.param(name, marks=pytest.mark.thorough) for name in ("matthews", "f1", "f1_macro")]


@pytest.mark.parametrize("name", ["accuracy", "perplexity", *SLOW, "squad_f1", *OF_TARGETS])
def test_questions_that_share_a_passage_widen_the_interval(name):
    """Ten neighbours have the same answer."""
    if name in OF_CHOICES:
        examples = many([(n % 2, n % 2 if (n // 10) % 3 else 1 - n % 2) for n in range(120)])
    else:
        words = ["one", "two", "three", "four", "five"]
        examples = [output_of(" ".join(words[: 1 + n // 10 % 5]), " ".join(words), number=n) for n in range(120)]
    grouped = [replace(example, group=f"passage {example.number // 10}") for example in examples]
    alone, together = (compute([name], some)[name] for some in (examples, grouped))
    assert alone == pytest.approx(together)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_below_eight_units_only_independent_answers_have_an_interval():
    pairs = drawn(n=7)
    found = compute(["accuracy", "perplexity", "f1"], many(pairs))
    assert [name for name, value in found.items() if value.interval is not None] == ["accuracy"]
    assert compute(["accuracy"], many(pairs * 2, groups=list("abcdefg") * 2))["accuracy"].interval is None


@st.composite
def questions(draw):
    """Up to 30 questions with two choices, some in groups."""
    likelihoods = st.floats(-30, -0.01)
    rows = draw(st.lists(st.tuples(likelihoods, likelihoods, st.integers(0, 1), st.integers(0, 20)), min_size=1, max_size=30))
    return [
        replace(chosen(number, losses, right, f"passage {group}" if group else None), targets=("yes", "no")[: right + 1])
        for number, (*losses, right, group) in enumerate(rows)
    ]


@settings(max_examples=15)
@given(questions(), st.randoms(use_true_random=False))
def test_intervals_contain_the_value_and_the_order_of_questions_changes_nothing(examples, random):
    asked = [*OF_CHOICES, *OF_TARGETS, "exact_match", "squad_f1"]
    with patch.object(answer_metrics, "REPLICATES", 40):
        found = compute(asked, examples)
        random.shuffle(examples)
        shuffled = compute(asked, examples)
    for name, metric in found.items():
        assert metric.to_json() == shuffled[name].to_json()
        assert metric.n == len(examples)
        assert metric.interval is None or metric.low <= metric <= metric.high, name


def test_what_was_right_ten_times_in_ten_is_not_right_for_sure():
    right = [chosen(number, [-0.5, -1.0] if number % 2 else [-1.0, -0.5], 1 - number % 2) for number in range(10)]
    found = compute(["accuracy", "f1", "f1_macro", "matthews"], right)
    assert all(metric == metric.high == 1 and 0.3 < metric.low < 0.95 for metric in found.values()), found


@pytest.mark.parametrize("n", range(36, 48))
def test_rounding_leaves_no_mean_outside_its_interval(n):
    perplexity = compute(["perplexity"], [chosen(number, [-0.7], 0) for number in range(n)])["perplexity"]
    assert perplexity.low <= perplexity <= perplexity.high


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", r"boolq asks for the metric 'acuracy': .*Did you mean accuracy\?"),
        ("mcc", "lm_eval's 'mcc' is matthews here"),
        ("ttft", "asks for the metric 'ttft', which is none of answers"),
    ],
)
def test_a_name_of_no_metric_of_answers_is_refused(name, message):
    with pytest.raises(TaskError, match=message):
        metrics_of(["accuracy", name], "boolq")
    assert set(LM_EVAL_NAMES.values()) <= set(METRICS)


def test_the_first_metric_that_judges_says_whether_an_answer_is_right():
    """Neither a count nor a proportion of which less is better does."""
    asked = metrics_of(["perplexity", "bleu", "chance", "matthews", "accuracy"], "own")
    assert [metric.name for metric in asked if metric.judges] == ["matthews", "accuracy"]
    assert judge_of(asked).name == "matthews"
    length = Metric("words", score=lambda example: len(example.output.split()), interval="mean")
    toxic = Metric("toxic", score=lambda example: 1.0, interval="proportion", higher_is_better=False)
    assert judge_of([length, toxic, METRICS["squad_f1"]]) is METRICS["squad_f1"]
    assert judge_of([length, toxic]) is None
    with pytest.raises(ArgumentError, match="is to judge answers, and has a score of which less is better"):
        Metric("toxic", score=lambda example: 1.0, judges=True, higher_is_better=False)
    with pytest.raises(ArgumentError, match="is to judge answers, and has no score of one"):
        Metric("toxic", judges=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": lambda example: math.nan}, "the score of own of question 3 .id 0+3. is nan. Return a finite number"),
        ({"score": lambda example: 2.0, "interval": "proportion"}, "is 2.0. Return 1 or 0, as interval='proportion' needs"),
        ({"score": lambda example: example.right[7]}, "question 3 .id 0+3. failed with IndexError"),
        ({"score": lambda example: "good"}, "failed with ValueError: could not convert string to float: 'good'"),
    ],
)
def test_a_wrong_score_is_refused_with_its_metric_and_question(options, message):
    with pytest.raises(TaskError, match=message):
        metrics.scored(chosen(3, [-2.0, -1.0], 1), [Metric("own", **options)])


@pytest.mark.parametrize("estimate", [lambda: 1 / 0, lambda: 3.0, lambda: (math.nan, None)])
def test_a_statistic_that_fails_is_refused_with_its_metric(estimate):
    with pytest.raises(TaskError, match="the statistic of own failed on 4 answers with"):
        metrics.compute([Metric("own", statistic=lambda examples, seed: estimate())], many([(0, 1)] * 4))


@pytest.mark.parametrize(
    ("name", "package", "pip"),
    [("f1", "sklearn", "scikit-learn"), ("bleu", "sacrebleu", "sacrebleu"), ("rouge1", "rouge_score", "rouge-score"),
     ("squad_f1", "torchmetrics", "torchmetrics")],
)  # fmt: skip
def test_a_missing_library_is_refused_before_anything_is_scored(monkeypatch, name, package, pip):
    monkeypatch.setitem(sys.modules, package, None)
    metrics_of(["accuracy"], "own")
    with pytest.raises(TaskError, match=rf"computed by {pip}\. .*pip install 'pytest-lmeval\[tasks\]'"):
        metrics_of(["accuracy", name], "own")


WITHOUT_RIGHT = replace(chosen(0, [-1.0, -2.0], 0), right=())


@pytest.mark.parametrize(
    ("name", "example", "message"),
    [
        ("accuracy", output_of("yes", "yes"), "accuracy is computed from choices, and question 0"),
        ("f1", chosen(0, [-1.0, -2.0, -3.0], 0), "two choices, one of them right, .* has 3 choices"),
        ("matthews", chosen(0, [-1.0, -2.0], (0, 1)), r"one right choice, .* right are \[0, 1\]"),
        ("bleu", output_of("yes"), "bleu is computed from targets to compare with"),
        ("exact_match", output_of("yes"), "exact_match is computed from targets to compare with"),
        ("squad_f1", output_of(""), "squad_f1 is computed from targets to compare with"),
        ("rate", chosen(0, [-1.0, -2.0], 0), "rate is computed from an output to be judged"),
        ("perplexity", chosen(0, [-1000.0], 0), "the mean of perplexity is 1000: no float holds its exponential"),
        *((name, WITHOUT_RIGHT, f"{name} is computed from a right choice") for name in ("greedy_match", "perplexity")),
        ("accuracy", None, "no question was answered"),
    ],
)
def test_an_example_from_which_a_metric_cannot_be_computed_is_refused(name, example, message):
    with pytest.raises(TaskError, match=message):
        compute([name], [] if example is None else [example])


WRONG = {"needs": "choises", "aspect": "qualty", "interval": "shre", "norm": "word", "higher_is_better": "yes", "margin": "x"}


@pytest.mark.parametrize(("field", "given"), [*WRONG.items(), ("margin", math.nan)])
def test_a_wrong_declaration_of_a_metric_is_refused_with_the_field(field, given):
    with pytest.raises(ArgumentError, match=f"the metric 'own' has {field}={given!r}"):
        Metric("own", **{field: given})
