"""Ranks of a run: how processes agree, what they say of one that fails or is lost, and that their numbers are those of one.

Ranks are threads here, with the store that processes have; torchrun starts real ones in `test_torchrun.py`.
"""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from shared_out import CHOICES, LM, PROBED, VERBS, close, lines_of, measured, numbers_of

from pytest_lmeval import TaskError, _ranks as ranks_module
from pytest_lmeval._ranked import RankHooks
from pytest_lmeval._ranks import Ranks
from pytest_lmeval._session import Session, TestLog as Log
from pytest_lmeval.errors import RankError
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext, running_in, verb
from pytest_lmeval.models._model import Model


@pytest.fixture
def in_ranks(monkeypatch):
    """A function that calls another in each of `count` ranks, and returns what it returned or raised in each."""
    monkeypatch.setattr(ranks_module, "PULSE", 0.1)
    monkeypatch.setattr(ranks_module, "LOST", 20.0)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def called(count, work):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        left = threading.Barrier(count)

        def one(rank):
            ranks = Ranks(rank, count, rank)
            ranks._connect()
            try:
                return work(ranks)
            except Exception as error:  # noqa: BLE001 - it is what the rank returns
                return error
            finally:
                left.wait()  # the store lies in the first
                ranks._stopped.set()

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))

    return called


def test_every_rank_hears_what_every_rank_says_in_their_order(in_ranks):
    def work(ranks):
        large = b"x" * (ranks_module.PIECE + 7)
        return [ranks.together(f"round {number}", (ranks.rank, number, large[: number * len(large)])) for number in range(2)]

    found = in_ranks(3, work)
    assert found[0] == found[1] == found[2]
    assert [said[:2] for said in found[0][1]] == [(0, 1), (1, 1), (2, 1)]
    assert len(found[0][1][2][2]) == ranks_module.PIECE + 7


def test_an_error_of_one_rank_is_its_own_and_named_in_the_others(in_ranks):
    def work(ranks):
        def fails():
            if ranks.rank == 1:
                raise TaskError("row 7 cannot be asked")
            return ranks.rank

        with pytest.raises((TaskError, RankError)) as raised:
            ranks.of_all("a task", fails)
        return type(raised.value), str(raised.value), ranks.together("after it", ranks.rank)

    first, second = in_ranks(2, work)
    assert second[:2] == (TaskError, "row 7 cannot be asked")
    assert first[:2] == (RankError, "rank 1 failed: row 7 cannot be asked")
    assert first[2] == [0, 1]


def test_a_rank_that_ended_the_test_is_met_at_its_end(in_ranks):
    def work(ranks):
        if ranks.rank == 1:
            return ranks.end("the end of test_it", "failed: assert 1 > 2")
        for _ in range(2):  # a test that swallows errors
            with pytest.raises(RankError, match="rank 1 is not at a task, but at the end of test_it: failed: assert 1 > 2"):
                ranks.together("a task", 3)
        return ranks.end("the end of test_it", None)

    assert in_ranks(2, work) == [[None, "failed: assert 1 > 2"]] * 2


def test_a_rank_that_is_lost_or_has_left_is_named_in_bounded_time(in_ranks, monkeypatch):
    monkeypatch.setattr(ranks_module, "LOST", 1.0)

    def lost(ranks):
        ranks.together("a beginning", None)
        if ranks.rank == 1:
            ranks._stopped.set()  # as if it were killed
            return time.sleep(0)
        return ranks.together("a task", None)

    began = time.monotonic()
    error, _ = in_ranks(2, lost)
    assert "a task: rank 1 (on " in str(error)
    assert "is lost: no sign of life for 1 s" in str(error)
    assert time.monotonic() - began < 30

    def left(ranks):
        return ranks._store.set("left 1", "") if ranks.rank == 1 else ranks.together("a task", None)

    assert "rank 1 has ended its run" in str(in_ranks(2, left)[0])


def test_a_store_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(ranks_module, "LOST", 0.5)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(RankError, match=r"rank 1 of 2 cannot reach the store of this run at 127.0.0.1:1"):
        Ranks(1, 2, 1)._connect()


def context_in(folder, ranks):
    return VerbContext(Session(folder, budget=1000, verdicts=PROBED.verdicts, ranks=ranks), Log("t.py::test"))


@pytest.mark.parametrize("verb", VERBS)
def test_ranks_have_the_record_of_one_process(tmp_path, in_ranks, verb):
    alone, _ = measured(tmp_path / "one", VERBS[verb])

    def work(ranks):
        context = context_in(tmp_path / "ranks", ranks)
        return VERBS[verb](Lmeval(context)), context.log.records

    for result, (record,) in (found := in_ranks(2, work)):
        own, whole = numbers_of(record), numbers_of(alone.record)
        own.pop("series"), whole.pop("series")
        assert close(own, whole)
        assert close(numbers_of(result.record)["metrics"], whole["metrics"])
    if record.units or record.examples:
        assert len(lines_of(tmp_path / "ranks", record)) == len(lines_of(tmp_path / "one", alone.record))
    assert numbers_of(found[0][0].record) == numbers_of(found[1][0].record)


def test_what_ranks_answered_is_not_asked_again_by_another_number_of_ranks(tmp_path, in_ranks):
    def work(ranks):
        return Lmeval(context_in(tmp_path, ranks)).task(LM, CHOICES, invariant=True).resumed

    assert in_ranks(3, work) == [0] * 3
    assert in_ranks(2, work) == [len(CHOICES.rows)] * 2
    assert measured(tmp_path, lambda lmeval: lmeval.task(LM, CHOICES, invariant=True))[0].resumed == len(CHOICES.rows)


def test_what_is_not_shared_is_measured_in_the_first_rank_and_known_to_all(tmp_path, in_ranks):
    def work(ranks):
        context = context_in(tmp_path, ranks)
        timed = Lmeval(context).latency(LM, seq_len=4, new_tokens=2, runs=2)
        return float(timed.ttft), len(context.log.records), Lmeval(context).equivalence(LM).verdict

    first, second = in_ranks(2, work)
    assert first[0] == second[0]
    assert (first[1], second[1]) == (1, 0)
    assert first[2] == second[2]


def test_ranks_with_different_models_are_refused(tmp_path, in_ranks):
    from shared_out import OTHER

    def work(ranks):
        return VERBS["choices"](Lmeval(VerbContext(Session(tmp_path, budget=0, ranks=ranks), Log("t"))))

    def other(ranks):
        lm = LM if ranks.rank == 0 else OTHER
        return Lmeval(VerbContext(Session(tmp_path, budget=0, ranks=ranks), Log("t"))).task(lm, CHOICES)

    assert all(not isinstance(found, Exception) for found in in_ranks(2, work))
    for found in in_ranks(2, other):
        assert isinstance(found, RankError)
        assert "do not hold the same model" in str(found)


def test_the_first_rank_trains_and_the_others_find_what_it_trained(tmp_path, in_ranks):
    def work(ranks):
        context = context_in(tmp_path, ranks)
        trained = Lmeval(context).train(LM, list(range(200)) * 2, held_out=list(range(90)), steps=2, seq_len=8, batch_size=2)
        return trained.cached, trained.lm, float(trained.nll)

    first, second = in_ranks(2, work)
    assert (first[0], second[0]) == (False, True)
    assert first[2] == second[2]
    assert first[1].module is not second[1].module


def test_an_error_of_the_first_rank_is_known_to_those_that_would_find_its_model(in_ranks):
    def work(ranks):
        def fails():
            raise TaskError("row 7 has no label")

        with pytest.raises((TaskError, RankError)) as raised:
            ranks.in_each("a training", fails, first_alone=True)
        return str(raised.value), ranks.together("after it", None)

    assert [said for said, _ in in_ranks(2, work)] == ["row 7 has no label", "rank 0 failed: row 7 has no label"]


def test_a_model_that_spans_the_ranks_is_measured_by_all_at_once(tmp_path, in_ranks, monkeypatch):
    """By one alone, it would wait for the others in its first step, and they for its result."""
    together = threading.Barrier(2, timeout=20)

    @verb
    def measured_by_all(lm):
        together.wait()
        return 3

    monkeypatch.setattr(Model, "spans_ranks", property(lambda lm: True))
    monkeypatch.setattr(VerbContext, "certified", lambda context, lm: None)

    def work(ranks):
        with running_in(context_in(tmp_path, ranks)):
            return measured_by_all(LM)

    assert in_ranks(2, work) == [3, 3]


def test_what_one_rank_could_not_collect_is_said(in_ranks):
    def work(ranks):
        hooks = RankHooks.__new__(RankHooks)
        hooks.ranks, hooks.not_collected = ranks, ["test_own.py: no module named x"] * ranks.rank
        with pytest.raises(pytest.UsageError) as raised:
            hooks.pytest_collection_finish(SimpleNamespace(items=[SimpleNamespace(nodeid="a")] * (2 - ranks.rank)))
        return str(raised.value)

    for said in in_ranks(2, work):
        assert "All run the same tests" in said
        assert "Not collected: test_own.py: no module named x" in said
