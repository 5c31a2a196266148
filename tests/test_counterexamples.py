"""What breaks a law comes back small, explained, with a line that tries it again, and is tried first the next time."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import Aligned, Dropped, Drowned, Functional, Learning

import pytest_lmeval
from pytest_lmeval.errors import LawBroken, LmevalError
from pytest_lmeval.laws import Case, Harness, cases, check, compositions, probe, replay
from pytest_lmeval.laws._counterexample_store import Known, case_of
from pytest_lmeval.laws._diagnosis import likely_fault
from pytest_lmeval.laws._shrink import smallest
from pytest_lmeval.laws._strategies import pieces
from pytest_lmeval.laws._tolerance import Excess
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._journal import JournalWarning


class TwoFaults(Functional):
    """Wrong twice: grossly when a chunk of 40 or more tokens continues, and hardly when another one does."""

    def forward(self, input_ids, state=None):
        if state is not None and input_ids.shape[1] > 1:
            state = state * (0.0 if input_ids.shape[1] >= 40 else 1 - 1e-3)
        return super().forward(input_ids, state)


def test_the_gross_fault_and_the_subtle_one_both_come_back():
    gross, subtle = probe(as_model(TwoFaults()), budget=20.0).laws["splits"].counterexamples
    assert gross.error > 100 * subtle.error
    assert gross.case["length"] >= 41
    assert subtle.case["length"] < 20


def test_a_counterexample_says_how_to_try_it_again():
    result = probe(as_model(Dropped()))
    line = result.laws["splits"].counterexamples[0].replay
    assert line in str(result)
    assert line.startswith('pytest_lmeval.replay(lm, "splits", length=')
    with pytest.raises(LawBroken, match="log-probabilities off by"):
        eval(line, {"pytest_lmeval": pytest_lmeval, "lm": Dropped()})
    eval(line, {"pytest_lmeval": pytest_lmeval, "lm": Functional()})


@pytest.mark.parametrize(
    ("law", "case", "said"),
    [
        ("nonsense", {"length": 8}, "there is no law 'nonsense'"),
        ("splits", {"length": 8, "cuts": (9,)}, "cannot be cut at"),
        ("splits", {"length": 8, "cuts": (4, 4)}, "cannot be cut at"),
        ("splits", {"length": 0}, "cannot be cut"),
        ("rows", {"length": 8, "rows": 2, "row": 2}, "row 2 of 2"),
        ("splits", {"length": "8"}, "made of numbers"),
        ("splits", {"length": 8, "cut": 3}, "a case has no 'cut'. Did you mean cuts?"),
        ("splits", {"cuts": 3}, "a case needs its length"),
        ("sums", {"length": 1}, "needs two tokens"),
    ],
)
def test_a_case_that_is_none_is_refused_by_name(law, case, said):
    with pytest.raises(ValueError, match=said):
        replay(Functional(), law, **case)


@pytest.mark.parametrize(
    ("law", "case", "said"),
    [
        ("splitz", {"length": 8}, r"no law 'splitz'\. Did you mean splits\?"),
        ("splits", {"lenght": 6}, r"no 'lenght'\. Did you mean length\?"),
        ("splits", {"length": 0}, "cannot be cut"),
        ("sums", {"length": 1}, "needs two tokens"),
    ],
)
def test_what_is_refused_is_caught_with_every_error_of_this_package(law, case, said):
    with pytest.raises(LmevalError, match=said):
        replay(Functional(), law, **case)


def test_known_counterexamples_run_first_and_are_found_without_any_budget(tmp_path):
    class Rare(Functional):
        """Wrong in one place: the 71st token, read as a chunk of its own with two more."""

        def forward(self, input_ids, state=None):
            hidden, seen = state or (None, 0)
            wrong = seen == 70 and input_ids.shape[1] == 3
            logits, hidden = super().forward(input_ids, None if wrong else hidden)
            return logits, (hidden, seen + input_ids.shape[1])

    file = tmp_path / "counterexamples.jsonl"
    lm = as_model(Rare())
    assert probe(lm, budget=0.0, known=file).laws["splits"].kept
    Known(file).add(lm.spec, "splits", Case(90, (70, 73)).choices())
    assert not probe(lm, budget=0.0, known=file).laws["splits"].kept


def test_counterexamples_are_kept_once_for_the_model_of_that_name(tmp_path):
    file = tmp_path / "deep" / "counterexamples.jsonl"
    for _ in range(2):
        probe(as_model(Dropped()), known=file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(line["lm"], line["law"]) for line in lines} == {("tiny_models:Dropped", "splits")}
    assert len(lines) == len({json.dumps(line) for line in lines})
    assert Known(file).cases("another") == []


def test_a_damaged_file_of_counterexamples_costs_only_its_damaged_lines(tmp_path):
    file = tmp_path / "counterexamples.jsonl"
    good = {"lm": "m", "law": "splits", "case": {"length": 9, "cuts": [4]}}
    file.write_bytes(b'{"lm": "m"\n\xff\n[]\n' + json.dumps({**good, "case": {"length": -1}}).encode() + b"\n")
    with file.open("a") as appended:
        appended.write(json.dumps(good) + "\n")
    assert Known(file).cases("m") == [("splits", Case(9, (4,)))]


def test_a_folder_that_cannot_be_written_costs_no_verdict(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(JournalWarning, match="the counterexample is not kept"):
        result = probe(as_model(Dropped()), known=tmp_path / "file" / "counterexamples.jsonl")
    assert result.verdict == "exact-step-only"


@settings(max_examples=300)
@given(cases(200, boundaries=(16,)))
def test_a_case_survives_its_own_description(case):
    assert case_of(json.loads(json.dumps(case.choices()))) == case


@settings(max_examples=200)
@given(cases(120), st.integers(2, 60), st.integers(1, 20))
def test_shrinking_ends_at_a_case_that_fails_and_is_no_larger(case, shortest, nearest):
    def fails(other):
        return other.length >= shortest and any(cut >= nearest for cut in other.cuts)

    if fails(case):
        small = smallest(case, fails, lambda: True)
        assert fails(small)
        assert small.length <= case.length
        assert len(small.cuts) == 1
        assert small.length <= max(shortest, nearest + 1) + 1


@settings(max_examples=200)
@given(st.integers(2, 150).flatmap(lambda n: st.tuples(st.just(n), compositions(n, (16,)))))
def test_a_composition_cuts_inside_its_length(drawn):
    length, cuts = drawn
    assert cuts
    assert list(cuts) == sorted(set(cuts))
    assert cuts[0] > 0
    assert cuts[-1] < length


def test_compositions_are_often_of_single_tokens():
    sizes = []

    @settings(max_examples=200, database=None, derandomize=True)
    @given(compositions(60))
    def gather(cuts):
        sizes.append(Case(60, cuts).sizes)

    gather()
    assert sum(some.count(1) >= 3 for some in sizes) > 20
    assert sum(1 not in some for some in sizes) > 20


harness = Harness(as_model(Functional()), longest=60)
wrong = Harness(as_model(Aligned()), longest=60)


@settings(max_examples=25)
@given(case=cases(60, boundaries=(16,)))
@pytest.mark.parametrize("law", ["splits", "rows", "causality"])
def test_the_laws_are_asserts_for_tests_of_ones_own(law, case):
    check(law, harness, case)


def test_in_a_test_of_ones_own_hypothesis_finds_and_shrinks_the_fault():
    @settings(max_examples=50, database=None, derandomize=True, report_multiple_bugs=False)
    @given(case=cases(60))
    def test(case):
        check("splits", wrong, case)

    with pytest.raises(LawBroken) as caught:
        test()
    assert type(caught.value).__name__.startswith("LawBrokenBy1e")
    assert caught.value.case.length <= 8


def profiled(sizes, wrong_at, size=lambda place: 100.0, error=1.0):
    profile = torch.zeros(sum(sizes))
    for place in wrong_at:
        profile[place] = size(place)
    return likely_fault(sizes, Excess(1.0, 100.0, error, 0.01, 0, profile))


@pytest.mark.parametrize(
    ("said", "sizes", "wrong_at", "size"),
    [
        ("wrong in the first piece already", [10, 50], range(3, 60), lambda p: 100.0),
        ("at the boundary after token 19, and fades out", [20, 80], range(20, 60), lambda p: 1000 * 0.8 ** (p - 20)),
        ("and stays wrong: positions", [20, 80], range(20, 100), lambda p: 100.0),
        ("and is right again 3 token(s) later: a convolution's tail", [20, 80], range(20, 23), lambda p: 100.0),
        ("It goes wrong 8 tokens after the boundary before token 20", [20, 80], range(28, 100), lambda p: 100.0),
        ("only in pieces of one token", [20, 1, 39, 1, 39], [20, 60], lambda p: 100.0),
        ("grows with the text", [20, 80], range(20, 100), lambda p: 1.1 * 1.1 ** (p - 20)),
    ],
)
def test_the_course_of_an_error_tells_what_is_likely_the_matter(said, sizes, wrong_at, size):
    assert said in profiled(sizes, wrong_at, size)


def test_a_small_error_is_said_to_be_small():
    assert "It is small (0.001 nats)" in profiled([20, 80], range(20, 100), error=0.001)
    assert "It is small" not in profiled([20, 80], range(20, 100))


def test_pieces_repeat_their_last_size():
    assert pieces(10, 4, 1, 2) == (4, 5, 7, 9)
    assert Case(10, pieces(10, 3)).sizes == [3, 3, 3, 1]


@pytest.mark.parametrize("law", ["causality", "prefix", "fork", "resume", "splits"])
def test_a_replay_without_cuts_cuts_in_the_middle(law):
    replay(Functional(), law, length=8)
    replay(Functional(), law, length=8, cuts=3)


def test_a_fault_of_the_weights_is_replayed_and_put_back():
    lm = as_model(Learning())
    before = {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}
    line = probe(lm).laws["isolation"].counterexamples[-1].replay
    with pytest.raises(LawBroken, match="parameters or buffers"):
        eval(line, {"pytest_lmeval": pytest_lmeval, "lm": lm})
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.module.state_dict().items())


def test_a_fault_of_the_copy_in_float32_is_replayed_on_one():
    lm = as_model(Drowned().bfloat16())
    result = probe(lm)
    (example, *_) = result.laws["splits"].counterexamples
    assert "float32=True" in example.replay
    with pytest.raises(LawBroken):
        eval(example.replay, {"pytest_lmeval": pytest_lmeval, "lm": lm})


def test_a_known_case_that_is_longer_than_usual_is_tried_at_its_length(tmp_path):
    class Late(Functional):
        def forward(self, input_ids, state=None):
            hidden, seen = state or (None, 0)
            logits, hidden = super().forward(input_ids, hidden if seen < 300 else None)
            return logits, (hidden, seen + input_ids.shape[1])

    lm, file = as_model(Late()), tmp_path / "counterexamples.jsonl"
    assert probe(lm, known=file).verdict == "exact-any-chunk"
    assert not probe(lm, known=file, longest=400, budget=60.0).laws["splits"].kept
    assert not probe(lm, known=file).laws["splits"].kept
