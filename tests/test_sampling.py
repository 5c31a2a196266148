"""Sampled answers: which tokens are drawn, that a row draws the same alone, and what several answers to a question say."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings, strategies as st
from msgspec import structs
from reading import measure_task
from tiny_models import Functional

from pytest_lmeval import Generate, Task, as_model
from pytest_lmeval.engine import Prompt
from pytest_lmeval.engine._generation import _generator, _sample, warped
from pytest_lmeval.errors import TaskError
from pytest_lmeval.gates._compare import Side, compare
from pytest_lmeval.gates._entry import entry_of
from pytest_lmeval.gates._margins import Margins
from pytest_lmeval.gates._scores import scores_of
from pytest_lmeval.scoring._several import majority, pass_all, pass_at
from pytest_lmeval.tasks import Extracted

LM = as_model(Functional(vocab=256))
ROWS = [{"n": n} for n in range(10)]


def prompt(**options):
    return Prompt([1], "row", 1, **{"temperature": 1.0, **options})


def theirs(logits, temperature, top_k, top_p, min_p):
    """The logits as `generate` of transformers has them, in its order."""
    processors = [transformers.TemperatureLogitsWarper(temperature)]
    processors += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    processors += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [transformers.MinPLogitsWarper(min_p)] if min_p else []
    scores = logits[None].double()
    for processor in processors:
        scores = processor(None, scores)
    return scores[0]


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([-3.0, -1.5, 0.0, 0.25, 1.0, 2.0, 4.5]) | st.floats(-8, 8), min_size=2, max_size=12),
    st.floats(0.2, 3),
    st.integers(0, 14),
    st.floats(0.05, 1),
    st.floats(0, 0.95),
)
@example([1.0, 1.0, 1.0, 0.0], 1.0, 2, 1.0, 0.0)  # ties at the border
@example([5.0, 0.0, 0.0], 1.0, 0, 0.01, 0.9)  # one token is always left
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(logits, temperature, top_k, top_p, min_p):
    scores = torch.tensor(logits, dtype=torch.float64)
    ours = warped(scores, prompt(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    assert torch.equal(ours, theirs(scores, temperature, top_k, top_p, min_p))
    assert torch.isfinite(ours).any()


def test_another_order_of_top_k_and_top_p_gives_others():
    """The broken twin: the order counts."""
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64))
    ours = torch.isfinite(warped(logits, prompt(top_k=2, top_p=0.5)))
    first_p = warped(logits, prompt(top_p=0.5))
    assert ours.tolist() == [True, False, False, False]
    assert torch.isfinite(warped(first_p, prompt(top_k=2))).tolist() == [True, True, False, False]


def test_a_token_is_drawn_as_often_as_it_is_likely():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = np.random.default_rng(0)
    counts = np.bincount([_sample(logits, prompt(top_k=3), generator) for _ in range(4000)], minlength=4) / 4000
    assert counts == pytest.approx(np.array([0.5, 0.3, 0.15, 0]) / 0.95, abs=0.03)
    assert counts[3] == 0


def test_each_answer_to_a_row_has_random_numbers_of_its_own():
    def drawn(**options):
        return _generator(prompt(**options)).random()

    assert len({drawn(repeat=repeat, seed=seed) for repeat in range(4) for seed in range(2)}) == 8
    assert drawn(repeat=3) == drawn(repeat=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"min_p": 1}, "min_p is 1"),
        ({"min_p": "0.1"}, r"min_p is '0\.1'"),
        ({"top_k": 5, "temperature": 0}, "top_k is given with temperature 0"),
    ],
)
def test_what_no_token_can_be_drawn_by_is_refused(options, message):
    with pytest.raises(TaskError, match=message):
        Generate("x", (), **{"temperature": 1.0, **options})


def ask(row):
    return Generate(f"{row['n']} is", (), (), max_tokens=5, temperature=0.8, top_p=0.9, min_p=0.01)


def sampled(rows=ROWS, ask=ask, repeats=4, score=lambda row, answer: len(answer) > 3, **options):
    metrics = options.pop("metrics", None)
    return measure_task(LM, Task("t", rows, ask, metrics, score=score, repeats=repeats), **options)


def test_a_row_alone_in_any_batch_and_order_gives_the_same_texts():
    whole = sampled()
    texts = {(one.id, one.repeat): one.output for one in whole.examples}
    assert len(texts) == 40
    assert len(set(texts.values())) > 20
    ways = [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 40}, {"rows": ROWS[::-1]}, {"rows": ROWS[6:7]}, {"limit": 2}]
    for way in ways:
        for one in sampled(**way).examples:
            assert texts[one.id, one.repeat] == one.output, way
    assert [one.place for one in whole.examples] == [(number, repeat) for number in range(10) for repeat in range(4)]


def test_the_first_answer_is_that_of_one_and_more_answers_read_only_the_new_ones(tmp_path):
    kept = tmp_path / "kept.jsonl"
    one, four = (sampled(repeats=repeats, kept=kept) for repeats in (1, 4))
    assert [example.output for example in four.examples if not example.repeat] == [example.output for example in one.examples]
    assert len({example.key for example in four.examples}) == 40
    again = sampled(kept=kept)
    assert (again.resumed, again.examples) == (40, four.examples)


def test_how_tokens_are_drawn_decides_the_key_and_is_recorded():
    keys = {
        sampled(ROWS[:1], lambda row, options=options: replace(ask(row), **options), 1).examples[0].key
        for options in ({}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.0})
    }
    assert len(keys) == 4
    settings = sampled().record.settings
    assert settings["generation"] == ["at most 5 tokens, temperature 0.8, top_p 0.9, min_p 0.01, until []"]
    assert settings["repeats"] == 4
    assert "repeats" not in sampled(repeats=1).record.settings


ANSWERS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abc")), min_size=1, max_size=7)


@given(ANSWERS, st.data())
def test_pass_at_k_and_pass_all_k_are_means_over_all_choices_of_k_answers(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    chosen = list(itertools.combinations([score for score, _ in answers], k))
    assert pass_at(answers, k) == pytest.approx(sum(map(max, chosen)) / len(chosen))
    assert pass_all(answers, k) == pytest.approx(sum(map(min, chosen)) / len(chosen))


@given(ANSWERS)
def test_a_majority_of_all_is_what_is_said_most_often(answers):
    counts = {text: sum(said == text for _, said in answers) for _, text in answers}
    most = [text for text, count in counts.items() if count == max(counts.values())]
    expected = [score for score, said in answers if said in most]
    assert majority(answers, len(answers)) == pytest.approx(sum(expected) / len(expected))


def test_a_majority_takes_the_mean_over_groups_and_no_vote_of_an_answer_that_says_nothing():
    assert majority([(1, "a"), (1, "a"), (0, "b"), (0, "b"), (1, "a")], 2) == 0.5
    assert majority([(0, None), (0, None), (1, "a")], 3) == 1
    assert majority([(0, None)] * 3, 3) == 0


def test_metrics_of_several_answers_stand_with_the_first_of_each_question():
    names = ("pass@1", "pass@4", "pass^2", "maj@3")
    result = sampled(metrics=names, score=lambda row, answer: Extracted(answer[:1], len(answer.encode()) % 2 == 0))
    assert list(result.record.metrics) == ["score", *names, "cut_off"]
    assert (result.score.n, result["pass@4"].n) == (40, 10)
    assert result["pass@1"] == pytest.approx(result.score)  # as many answers to each question
    assert result["pass^2"] < result["pass@1"] < result["pass@4"]
    rights = [sum(one.scores["score"] for one in result.examples if one.number == number) for number in range(10)]
    assert result["pass@4"] == sum(map(bool, rights)) / 10
    assert [one.scores["pass@4"] is None for one in result.examples] == [False, True, True, True] * 10
    assert result.record.details["questions"] == 10
    assert result.record.details["answers"] == 40
    assert result.record.example == "answer"


def test_intervals_are_clustered_by_row():
    """Answers that are the same four times are no more than ten: the broken twin counts each as a row of its own."""
    same = sampled(score=lambda row, answer: row["n"] < 5)
    once = sampled(score=lambda row, answer: row["n"] < 5, repeats=1)
    assert (same.score, same.score.n) == (once.score, 40)
    assert same.score.interval == pytest.approx(once.score.interval, abs=0.05)
    apart = sampled(
        [{"n": n, "copy": copy} for n in range(10) for copy in range(4)], score=lambda row, a: row["n"] < 5, repeats=1
    )
    assert apart.score.high - apart.score.low < 0.7 * (same.score.high - same.score.low)


def test_greedy_answers_are_read_once_and_the_record_says_so():
    def greedy(row):
        return Generate(f"{row['n']} is", ("x",), (), max_tokens=5)

    names = ("pass@1", "pass@3", "maj@2")
    result = sampled(ask=greedy, metrics=names, repeats=3, score=lambda row, answer: row["n"] < 4)
    assert len(result.examples) == 10
    assert [float(result[name]) for name in ("score", *names)] == [0.4] * 4
    assert "temperature 0: each question is answered once, since its 3 answers would be the same" in result.record.notes


def test_without_a_scorer_the_default_metric_says_what_is_right():
    result = measure_task(LM, Task("t", ROWS, lambda row: replace(ask(row), answers=("x",)), ("pass@2", "maj@2"), repeats=2))
    assert list(result.record.metrics) == ["exact_match", "pass@2", "maj@2", "cut_off"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats is 0"),
        ({"repeats": 1.5}, r"repeats is 1\.5"),
        ({"repeats": 2, "metrics": ("pass@3",)}, "pass@3 is a metric of 3 answers to each question, and repeats=2"),
        ({"repeats": 2, "metrics": ("pass@0",)}, "pass@0 is a metric of 0 answers"),
        ({"repeats": 2, "metrics": ("maj@x",)}, "maj@x is a metric of x answers"),
        ({"repeats": 2, "judge": bool, "threshold": 0.5}, "a threshold is for independent answers"),
    ],
)
def test_repeats_that_make_no_sense_are_refused(options, message):
    with pytest.raises(TaskError, match=message.replace("^", r"\^")):
        Task("t", ROWS, ask, **options)


def test_a_score_between_right_and_wrong_is_no_pass():
    with pytest.raises(TaskError, match=r"t, row 0 \(\w+\): pass@2: an answer scores 0\.5, and answers are counted"):
        sampled(metrics=("pass@2",), score=lambda row, answer: 0.5)
    assert sampled(metrics=("maj@2",), score=lambda row, answer: 0.5)["maj@2"] == 0.5
    with pytest.raises(TaskError, match="pass@2 is of right answers, and no metric says which are"):
        measure_task(LM, Task("t", ROWS, ask, ("pass@2", "cut_off"), repeats=2))


def test_a_gate_pairs_the_answers_of_a_row_and_takes_them_as_one_group(tmp_path):
    def side(name, score):
        record = sampled(score=score, metrics=("pass@4",), examples=tmp_path / name).record
        return Side(entry_of(record), scores_of(structs.replace(record, examples=name), tmp_path))

    base, new = side("a.jsonl", lambda row, answer: True), side("b.jsonl", lambda row, answer: row["n"] > 0)
    assert len(set(new.scores.groups)) == 10
    assert new.scores.columns["pass@4"].count(None) == 30
    base, new = (replace_headline(one) for one in (base, new))
    (rows,) = compare([(base, new)], Margins(), 1)
    row = rows["score"]
    assert (row.n, row.units, row.lost, row.answers) == (10, 10, 1, [4, 4])


def replace_headline(side):
    return side._replace(entry=structs.replace(side.entry, headline="score"))
