"""A counterexample is shrunk, explained, replayed by a line, and tried first the next time."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from probing import failure, probed
from tiny_models import VOCAB, Dropped, Drowned, Fragile, Functional, Learning

import pytest_lmeval
from pytest_lmeval.errors import LawBroken, LmevalError
from pytest_lmeval.laws import Case, Harness, cases, check, compositions, probe, replay
from pytest_lmeval.laws._counterexample_store import CounterexampleStore, case_of
from pytest_lmeval.laws._diagnosis import likely_fault
from pytest_lmeval.laws._search import shrink
from pytest_lmeval.laws._strategies import chunk_cuts
from pytest_lmeval.laws._tolerance import Excess
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._journal import JournalWarning


def replayed(line, lm):
    eval(line, {"pytest_lmeval": pytest_lmeval, "lm": lm})


def test_a_gross_fault_and_a_subtle_one_are_both_reported():
    class TwoFaults(Functional):
        """Wrong twice: grossly if a chunk of 40 or more tokens continues, and hardly if another one does."""

        def forward(self, input_ids, state=None):
            if state is not None and input_ids.shape[1] > 1:
                state = state * (0.0 if input_ids.shape[1] >= 40 else 1 - 1e-3)
            return super().forward(input_ids, state)

    gross, subtle = probed(TwoFaults()).laws["splits"].counterexamples
    assert gross.error > 100 * subtle.error
    assert gross.case["length"] >= 41
    assert subtle.case["length"] < 20


def test_a_counterexample_is_replayed_by_its_line_and_stored_once(tmp_path):
    file = tmp_path / "deep" / "counterexamples.jsonl"
    for _ in range(2):
        result = probed(Dropped(), counterexamples=file)
    line = result.laws["splits"].counterexamples[0].replay
    assert line in str(result)
    assert line.startswith('pytest_lmeval.replay(lm, "splits", length=')
    with pytest.raises(LawBroken, match="log-probabilities off by"):
        replayed(line, Dropped())
    replayed(line, Functional())
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(line["lm"], line["law"]) for line in lines} == {("tiny_models:Dropped", "splits")}
    assert len(lines) == len({json.dumps(line) for line in lines})
    assert CounterexampleStore(file).cases("another") == {}


class LearningFromChunks(Learning):
    """Changes the weight only when a chunk of three or more tokens continues a sequence."""

    def forward(self, input_ids, state=None):
        read = super().forward if state is not None and input_ids.shape[1] >= 3 else super(Learning, self).forward
        return read(input_ids.clamp(max=VOCAB - 2), state)


@pytest.mark.parametrize(("kind", "smallest"), [(Learning, {"length": 2}), (LearningFromChunks, {"length": 4, "cuts": (1,)})])
def test_a_change_of_the_weights_is_shrunk_replayed_and_put_back(kind, smallest):
    lm = as_model(kind())
    before = lm.module.embed.weight.clone()
    result = probed(lm)
    (example,) = result.laws["isolation"].counterexamples
    assert example.case.items() >= smallest.items()
    assert "reading changed the model's parameters or buffers (embed.weight)" in str(result)
    with pytest.raises(LawBroken, match="parameters or buffers"):
        replayed(example.replay, lm)
    assert torch.equal(before, lm.module.embed.weight)


def test_a_change_of_the_weights_that_takes_the_whole_probe_is_shown_by_another_probe():
    class Later(Learning):
        calls = 0

        def forward(self, input_ids, state=None):
            self.calls += 1
            read = super().forward if self.calls == 5 else super(Learning, self).forward
            return read(input_ids.clamp(max=VOCAB - 2), state)

    for _ in range(2):
        (example,) = probe(as_model(Later()), budget=1000).laws["isolation"].counterexamples
        assert "(embed.weight). It took the whole probe" in example.message
        assert example.replay == "pytest_lmeval.laws.probe(lm)"


def test_a_fault_of_the_float32_copy_is_replayed_on_one():
    lm = as_model(Drowned().bfloat16())
    line = probed(lm).laws["splits"].counterexamples[0].replay
    assert "float32=True" in line
    with pytest.raises(LawBroken):
        replayed(line, lm)


@pytest.mark.parametrize(
    ("law", "case", "message"),
    [
        ("nonsense", {"length": 8}, "there is no law 'nonsense'"),
        ("splitz", {"length": 8}, r"no law 'splitz'\. Did you mean splits\?"),
        ("splits", {"length": 8, "cuts": (9,)}, "cannot be cut at"),
        ("splits", {"length": 8, "cuts": (4, 4)}, "cannot be cut at"),
        ("splits", {"length": 0}, "cannot be cut"),
        ("rows", {"length": 8, "rows": 2, "row": 1}, r"a case has no 'row'\. Did you mean rows\?"),
        ("splits", {"length": "8"}, "made of numbers"),
        ("splits", {"length": 8, "cut": 3}, r"a case has no 'cut'\. Did you mean cuts\?"),
        ("splits", {"cuts": 3}, "a case needs its length"),
        ("sums", {"length": 1}, "needs two tokens"),
    ],
)
def test_an_impossible_case_is_refused_with_its_fault(law, case, message):
    with pytest.raises(LmevalError, match=message) as refused:
        replay(Functional(), law, **case)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize("law", ["causality", "prefix", "fork", "resume", "splits"])
def test_a_replay_without_cuts_cuts_in_the_middle(law):
    replay(Functional(), law, length=8)
    replay(Functional(), law, length=8, cuts=3)


def test_stored_counterexamples_are_tried_without_any_budget(tmp_path):
    lm = as_model(Fragile(lambda seen, t: seen == 70 and t == 3))
    file = tmp_path / "counterexamples.jsonl"
    assert probe(lm, budget=1000, counterexamples=file).laws["splits"].kept
    CounterexampleStore(file).add(lm.spec, "splits", Case(90, (70, 73)).choices())
    assert not probe(lm, budget=1000, counterexamples=file).laws["splits"].kept


def test_a_stored_case_that_is_longer_than_usual_is_tried_at_its_length(tmp_path):
    lm = as_model(Fragile(lambda seen, t: seen >= 350))
    file = tmp_path / "counterexamples.jsonl"
    assert probe(lm, budget=1000, counterexamples=file).verdict == "exact-any-chunk"
    CounterexampleStore(file).add(lm.spec, "splits", Case(400, (360,)).choices())
    assert not probe(lm, budget=1000, counterexamples=file).laws["splits"].kept


def test_a_damaged_file_of_counterexamples_loses_only_its_damaged_lines(tmp_path):
    file = tmp_path / "counterexamples.jsonl"
    good = {"lm": "m", "law": "splits", "case": {"length": 9, "cuts": [4]}}
    file.write_bytes(b'{"lm": "m"\n\xff\n[]\n' + json.dumps({**good, "case": {"length": -1}}).encode() + b"\n")
    with file.open("a") as appended:
        appended.write(json.dumps(good) + "\n")
    assert CounterexampleStore(file).cases("m") == {"splits": [Case(9, (4,))]}


def test_a_folder_that_cannot_be_written_costs_no_verdict(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(JournalWarning, match="the counterexample is not kept"):
        result = probe(as_model(Dropped()), budget=1000, counterexamples=tmp_path / "file" / "counterexamples.jsonl")
    assert result.verdict == "exact-step-only"


@settings(max_examples=300)
@given(cases(200, boundaries=(16,)))
def test_a_case_is_rebuilt_from_its_choices(case):
    assert case_of(json.loads(json.dumps(case.choices()))) == case


@settings(max_examples=200)
@given(cases(120), st.integers(2, 60), st.integers(1, 20))
def test_shrinking_ends_at_a_small_case_that_fails(case, shortest, nearest):
    def fails(other):
        return other.length >= shortest and any(cut >= nearest for cut in other.cuts)

    if fails(case):
        small = shrink(case, fails, lambda: True)
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
    assert 0 < cuts[0] <= cuts[-1] < length


def test_compositions_are_often_of_single_tokens():
    sizes = []

    @settings(max_examples=200, database=None, derandomize=True)
    @given(compositions(60))
    def gather(cuts):
        sizes.append(Case(60, cuts).sizes)

    gather()
    assert sum(some.count(1) >= 3 for some in sizes) > 20
    assert sum(1 not in some for some in sizes) > 20


def test_chunks_repeat_their_last_size():
    assert chunk_cuts(10, 4, 1, 2) == (4, 5, 7, 9)
    assert Case(10, chunk_cuts(10, 3)).sizes == [3, 3, 3, 1]


HARNESS = Harness(as_model(Functional()), longest=60)


@settings(max_examples=20)
@given(case=cases(60, boundaries=(16,)))
@pytest.mark.parametrize("law", ["splits", "rows", "causality"])
def test_the_laws_are_asserts_for_hypothesis_tests_of_the_user(law, case):
    check(law, HARNESS, case)


def test_hypothesis_finds_and_shrinks_a_fault_in_a_test_of_the_user():
    harness = Harness(as_model(Dropped()), longest=60)

    @settings(max_examples=50, database=None, derandomize=True, report_multiple_bugs=False)
    @given(case=cases(60))
    def test(case):
        check("splits", harness, case)

    with pytest.raises(LawBroken) as caught:
        test()
    assert type(caught.value).__name__.startswith("LawBrokenBy1e")
    assert caught.value.case.length <= 8


def test_a_failure_has_its_case_its_error_and_its_tolerance_ratio():
    case = Case(8, (4,))
    found = failure("splits", Harness(as_model(Dropped())), case)
    assert (found.case, found.error > 0.1, found.tolerance_ratio > 100) == (case, True, True)


def diagnosed(sizes, wrong, course=lambda token: 100.0, error=1.0):
    profile = torch.zeros(sum(sizes))
    for token in wrong:
        profile[token] = course(token)
    return likely_fault(sizes, Excess(1.0, 100.0, error, 0.01, 0, profile))


@pytest.mark.parametrize(
    ("message", "sizes", "wrong", "course"),
    [
        ("wrong in the first chunk already", [10, 50], range(3, 60), lambda t: 100.0),
        ("at the boundary after token 19, and fades out", [20, 80], range(20, 60), lambda t: 1000 * 0.8 ** (t - 20)),
        ("and stays wrong: positions", [20, 80], range(20, 100), lambda t: 100.0),
        ("and is right again 3 token(s) later: a convolution's tail", [20, 80], range(20, 23), lambda t: 100.0),
        ("It goes wrong 8 tokens after the boundary before token 20", [20, 80], range(28, 100), lambda t: 100.0),
        ("only in chunks of one token", [20, 1, 39, 1, 39], [20, 60], lambda t: 100.0),
        ("Longer chunks are right", [20, 20, 1, 39], range(40, 80), lambda t: 100.0),
        ("Read one token at a time, it goes wrong at token 9", [1] * 40, range(9, 40), lambda t: 100.0),
        ("grows with the text", [20, 80], range(20, 100), lambda t: 1.1 * 1.1 ** (t - 20)),
        ("Every token is off by a little", [20, 80], [], lambda t: 0.0),
    ],
)
def test_the_course_of_an_error_names_the_likely_fault(message, sizes, wrong, course):
    assert message in diagnosed(sizes, wrong, course)


def test_a_small_error_is_called_small():
    assert "It is small (0.001 nats)" in diagnosed([20, 80], range(20, 100), error=0.001)
    assert "It is small" not in diagnosed([20, 80], range(20, 100))
