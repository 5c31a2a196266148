"""Trainings, probes and second readings that run out of memory go on with less at once, say so, and give the same numbers."""

from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import ids_of
from running_out import ERRORS, Layered, running_out
from test_audit import CERTIFIED, CHOOSES, GENERATES
from tiny_models import Fragile, Functional, Stateless

from pytest_lmeval.engine import policy_for
from pytest_lmeval.errors import ModelError, OutOfMemory, Refused
from pytest_lmeval.laws import Case, Harness, check, probe, replay
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.measures._task_audit import TaskAudit
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._journal import Saver
from pytest_lmeval.training import Protocol, run_training

VOCAB = 32
SMALL = Protocol(steps=4, batch_size=4, seq_len=8, eval_every=2, eval_tokens=32, lr=1e-2)
BEFORE = 2  # calls before the first step: the count of operations, and the first evaluation
STEPS = (3, 4, 6, 7)  # calls that are steps
kinds = st.sampled_from(sorted(ERRORS))


def text(seed=0, length=200):
    generator = np.random.default_rng(seed)
    return np.cumsum(np.where(generator.random(length) < 0.9, 1, generator.integers(VOCAB, size=length))) % VOCAB


def trained(module, **options):
    return run_training(as_model(module), text(0), **{"held_out": text(1), "protocol": SMALL, **options})


def layered(**options):
    return Layered(layers=2, **options).double()


def numbers(result):
    curves = [result.record.series[name].y for name in ("learning_curve", "gradient_norm", "held_out_loss")]
    weights = [tensor.flatten().tolist() for tensor in result.lm.module.state_dict().values()]
    return np.concatenate([*curves, *weights])


def assert_as_undisturbed(result):
    np.testing.assert_allclose(numbers(result), undisturbed()[0], rtol=1e-9, atol=1e-12)


@cache
def undisturbed():
    """(numbers, calls) of a training that has memory enough."""
    lm = as_model(module := layered())
    with running_out(module) as memory:
        return numbers(run_training(lm, text(0), held_out=text(1), protocol=SMALL)), memory.calls


# ------------------------------------------------------------------------------------------------- training


@settings(max_examples=15)
@given(st.data(), kinds, st.booleans())
def test_a_training_that_runs_out_at_any_call_goes_on_in_smaller_batches_with_the_same_numbers(data, kind, backward):
    _, calls = undisturbed()
    at, lm = data.draw(st.integers(1, calls)), as_model(module := layered())
    with running_out(module, at=at, error=kind, backward=backward, in_place=True) as memory:
        result = run_training(lm, text(0), held_out=text(1), protocol=SMALL)
    assert_as_undisturbed(result)
    assert memory.calls > calls or backward  # evaluations have no backward pass
    assert result.record.details.get("micro_batch") == (2 if at in STEPS else None)


@pytest.mark.parametrize(("above", "rows", "tried"), [(16, 2, 1), (8, 1, 2)])
def test_later_steps_read_as_many_rows_as_fitted_and_the_record_says_so_once(above, rows, tried):
    with running_out(module := layered(), above=above) as memory:
        result = trained(module)
    assert_as_undisturbed(result)
    assert result.record.details["micro_batch"] == rows
    (said,) = result.record.details["warnings"]
    assert f"memory ran out, so its batches of 4 rows were read {rows} at a time" in said
    assert len(memory.raised) == tried * (BEFORE + 1 + 2)  # of the four steps only the first; and two more evaluations


def test_a_row_that_does_not_fit_is_an_error_with_what_was_tried():
    said = r"memory ran out \(an allocation of 4,294,967,296 bytes failed\) with 4 and then 2 and then 1 rows.*smaller seq_len"
    lm = as_model(module := layered())
    with running_out(module, above=7, error="cpu") as memory, pytest.raises(OutOfMemory, match=said):
        run_training(lm, text(0), held_out=text(1), protocol=SMALL)
    assert memory.calls == 3
    with running_out(module, at=range(BEFORE + 1, 1000)) as memory, pytest.raises(OutOfMemory, match="step 1: memory ran out"):
        run_training(lm, text(0), held_out=text(1), protocol=SMALL)
    assert memory.calls < 20


@contextmanager
def update_that_runs_out(at, error):
    """AdamW that runs out at its update of this number, after it has changed the first of the weights."""
    updates, step = [], torch.optim.AdamW.step

    def halfway(self, *args):
        updates.append(1)
        if len(updates) == at:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise ERRORS[error]()
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", halfway)
        patch.setattr(Saver, "PAUSE", 0.0)
        patch.setattr(Saver, "SHARE", 0.0)
        yield updates


@settings(max_examples=10)
@given(st.integers(1, 4), kinds, st.booleans())
def test_an_update_that_runs_out_goes_back_to_the_last_saved_point(tmp_path_factory, at, kind, saved):
    folder = tmp_path_factory.mktemp("run") if saved else None
    with update_that_runs_out(at, kind) as updates:
        result = trained(layered(), folder=folder)
    assert_as_undisturbed(result)
    assert result.record.details["micro_batch"] == 2
    assert len(updates) == (5 if saved else 4 + at)
    assert result.resumed_at == 0


class Counting(Layered):
    """Counts the rows that it has learned from in a buffer."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))

    def forward(self, input_ids, state=None):
        if self.training:
            self.rows += len(input_ids)
        return super().forward(input_ids, state)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_training_whose_buffers_had_changed_when_memory_ran_out_begins_again(at):
    lm = as_model(module := Counting(layers=2))
    with running_out(module, at=at + 1, in_place=True):  # after the count of operations
        result = run_training(lm, text(0), protocol=SMALL)
    assert int(result.lm.module.rows) == SMALL.steps * SMALL.batch_size
    assert result.record.details["micro_batch"] == 2


@pytest.mark.parametrize("backward", [False, True])
def test_dropout_draws_the_same_wherever_in_the_step_memory_ran_out(backward):
    def losses(**where):
        lm = as_model(module := layered(dropout=0.5))
        with running_out(module, at=BEFORE + 1, **where):
            result = run_training(lm, text(0), held_out=text(1), protocol=SMALL)
        assert result.record.details["micro_batch"] == 2
        return result.record.series["learning_curve"].y

    assert losses(backward=backward, in_place=True) == losses()


def test_a_resumed_training_reads_as_many_rows_as_fitted_before(tmp_path):
    class Stop(Exception):
        pass

    def stop(done, nats, expected):
        if done >= 64:
            raise Stop

    with update_that_runs_out(1, "cuda"), pytest.raises(Stop):
        trained(layered(), folder=tmp_path, progress=stop)
    result = trained(layered(), folder=tmp_path)
    assert result.resumed_at == 2
    assert result.record.details["micro_batch"] == 2
    assert_as_undisturbed(result)


# ---------------------------------------------------------------------------------------------------- probe


def probed(lm, **options):
    return probe(lm, budget=1, **options).certificate


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(
    "place", [0.0, *(pytest.param(place / 40, marks=pytest.mark.thorough) for place in range(1, 40)), 0.99]
)
def test_a_probe_that_runs_out_at_any_call_leaves_one_law_untried_and_breaks_none(place, kind):
    lm, calls = as_model(module := Layered(layers=2)), 119
    at = 1 + round(place * (calls - 1))
    with running_out(module, at=at, error=kind, in_place=True) as memory:
        certificate = probed(lm)
    assert memory.raised == [at]
    rows, tokens = memory.shapes[at - 1]
    full = f"out of memory at {rows} row{'s' * (rows > 1)} of {tokens} token{'s' * (tokens > 1)}"
    untried = certificate.with_status("untried")
    assert not certificate.broken
    assert len(certificate.with_status("kept")) + len(untried) == len(certificate.laws)
    if at == 1:  # the first reading sets how much is read in one call
        assert certificate.limit == f"it reads at most 319 tokens in one call: it ran {full}"
    if at in (1, 2):  # it does without the float64 copy
        assert untried == []
    else:
        assert [certificate.laws[law].missing for law in untried] == [full]
        assert f"untried: {untried[0]} ({full})" in certificate.why_not()
        assert certificate.verdict == "unproven"


def test_rows_that_do_not_fit_are_read_alone_and_long_calls_in_pieces():
    lm = as_model(module := Layered(layers=2))
    with running_out(module, above=450, error="cpu"):
        certificate = probed(lm)
    assert certificate.with_status("untried") == ["rows"]
    assert certificate.laws["rows"].missing == "out of memory at 33 rows of 14 tokens"
    policy = policy_for(lm, certificate, batch_size=16)
    assert (policy.batch_size, policy.carry) == (1, True)
    with running_out(module, above=200):
        certificate = probed(lm)
    assert certificate.limit == "it reads at most 200 tokens in one call: it ran out of memory at 1 row of 201 tokens"
    assert certificate.with_status("untried") == ["rows"]
    assert policy_for(lm, certificate).longest == 200
    with running_out(module, above=200) as memory:
        replay(lm, "splits", length=300, cuts=(100,))
    assert memory.raised


def test_a_case_that_does_not_fit_is_no_counterexample_and_larger_ones_are_not_tried():
    lm = as_model(module := Layered(layers=2))
    harness = Harness(lm, longest=40)
    with running_out(module, at=range(1, 1000)) as memory:
        with pytest.raises(OutOfMemory, match=r"out of memory at 1 row of 40 tokens: nothing is known about the law prefix"):
            check("prefix", harness, Case(40, (20,)))
        assert memory.calls == 1
        with pytest.raises(ModelError, match="cannot be tried: it ran out of memory at 1 row of"):
            probed(lm)
    check("prefix", harness, Case(40, (20,)))


def test_stored_cases_do_not_count_if_the_one_that_is_tried_again_does_not_fit(tmp_path):
    lm = as_model(module := Layered(layers=2))
    assert probed(lm, certificates=tmp_path, profile="dev").runs == 1
    assert probed(lm, certificates=tmp_path, profile="dev").runs == 2
    with running_out(module, above=27, in_place=True):
        certificate = probed(lm, certificates=tmp_path, profile="dev")
    assert certificate.runs == 1
    assert certificate.laws["rows"].status == "untried"


# --------------------------------------------------------------------------------------------------- audits


def read(lm, ids, **options):
    return measure_perplexity(lm, ids, policy=policy_for(lm, CERTIFIED, **{"chunk_size": 64, "window": "unlimited", **options}))


def audit_of(result):
    return result.record.certificate.audit


FULL = "137 tokens did not fit into memory again"


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(
    ("failing", "said"),
    {
        1: "audited to 320 tokens",
        2: "audited to 137 tokens",
        4: f"audited to 68 tokens, {FULL}",
        5: f"not audited, {FULL}",
    }.items(),
)
def test_a_second_reading_that_runs_out_takes_smaller_pieces_then_a_shorter_length_and_says_so(failing, said, kind):
    """The first is of 137 tokens, in one call; a second one of 458 comes later."""
    lm, ids = as_model(module := Functional()), ids_of(8000)
    expected = read(lm, ids)
    with running_out(module, at=range(4, 4 + failing), error=kind) as memory:
        result = read(lm, ids)
    assert memory.shapes[3] == (1, 137)
    assert len(memory.raised) == failing
    assert float(result.nll) == float(expected.nll)
    assert str(audit_of(result)) == said
    assert str(audit_of(expected)) == "audited to 458 tokens"
    assert result.record.certificate.coverage.endswith(said)


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ([2], "not audited, 320 tokens did not fit into memory again"),
        ([3], "audited to 320 tokens, 525 tokens did not fit into memory again"),
    ],
    ids=["the first", "the second"],
)
def test_a_window_that_does_not_fit_again_is_not_read_again_and_nothing_is_lost(failing, said):
    lm, ids = as_model(module := Stateless()), ids_of(20_000)
    expected = read(lm, ids, window=600, chunk_size=None)
    with running_out(module, at=failing) as memory:
        result = read(lm, ids, window=600, chunk_size=None)
    assert memory.shapes[:2] == [(1, 600), (1, 320)]
    assert float(result.nll) == float(expected.nll)
    assert str(audit_of(expected)) == "audited to 525 tokens"
    assert str(audit_of(result)) == said


def test_a_difference_that_is_found_is_refused_though_memory_runs_out_when_it_is_explained():
    lm = as_model(module := Fragile(lambda seen, t: seen > 340))
    with running_out(module) as memory, pytest.raises(Refused, match="splits: "):
        read(lm, ids_of(25_000))
    explained = memory.shapes.index((1, 880)) + 2  # the call after the last of the second reading
    unexplained = pytest.raises(Refused, match="Memory ran out when the laws were tried")
    with running_out(module, at=range(explained, 10_000)), unexplained:
        read(lm, ids_of(25_000))


@pytest.mark.parametrize("failing", [1, 1000])
@pytest.mark.parametrize("task", [CHOOSES, GENERATES], ids=str)
def test_questions_that_do_not_fit_alone_are_not_read_again_and_none_is_lost(task, failing):
    lm = as_model(module := Functional(vocab=256))
    policy, compare, tried = policy_for(lm, CERTIFIED, batch_size=8), TaskAudit._compare, []
    expected = measure_task(lm, task, policy=policy)

    def full(audit, answered):
        tried.append(max(len(request.read) for request, _ in answered.readings))
        with running_out(module, at=range(1, 1000) if len(tried) <= failing else ()):
            return compare(audit, answered)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskAudit, "_compare", full)
        result = measure_task(lm, task, policy=policy)
    assert [example.scores for example in result.examples] == [example.scores for example in expected.examples]
    audit = audit_of(result)
    fitted = tried[failing:]
    assert audit.questions + audit.answers == len(fitted)
    assert (audit.questions + audit.answers > 0) == (failing == 1)
    assert audit.full == min(tried[:failing])
    assert f"{audit.full} tokens did not fit into memory again" in str(audit)
    assert tried[:failing] == sorted(set(tried[:failing]), reverse=True)
