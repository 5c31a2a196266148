"""The audit: a twentieth of what is measured is read again, whole and alone, and what the probe missed is found on the data."""

import contextlib
import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clean_models import CLEAN, Attention, GetSet
from probing import certificate
from reading import Killed, assert_equal_but_for_time, ids_of, losses_of, saving_every_chunk, texts
from test_codebooks import Frames, frames_of
from tiny_models import CARRYING, Fragile, Functional, Neighbourly, Stateless, Streaming

import pytest_lmeval
from pytest_lmeval import Choices, Generate, Suite, Task, as_model, policy_for
from pytest_lmeval._session import Session, TestLog as Log
from pytest_lmeval.engine._policy import CALL
from pytest_lmeval.errors import LawBroken, Refused
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._audit import SHARE
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.records._certificate import CONSISTENT, EXACT
from pytest_lmeval.records._journal import Checkpoints

LM, BYTE_LM = as_model(Functional()), as_model(Functional(vocab=256))
CHUNK = 64


CERTIFIED = certificate()


def read(model, text, *, chunk_size=CHUNK, certificate=CERTIFIED, invariant=False, window="unlimited", **options):
    lm = as_model(model)
    policy = policy_for(lm, certificate, chunk_size=chunk_size, window=window, invariant=invariant)
    return measure_perplexity(lm, text, policy=policy, **options)


def audit_of(result):
    return result.record.certificate.audit


class Clamped(Attention):
    """Positions stop growing when a state of 512 tokens is continued."""

    def positions(self, seen, t, layer):
        return super().positions(min(seen, 512), t, layer)


class FourthCall(Functional):
    """Drops its state in every fourth call of a sequence."""

    def forward(self, input_ids, state=None):
        hidden, calls = state or (None, 0)
        logits, hidden = super().forward(input_ids, None if calls % 4 == 3 else hidden)
        return logits, (hidden, calls + 1)


class LongCalls(Functional):
    """Reads only the first 500 tokens of a call."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids[:, :500], state)
        missing = input_ids.shape[1] - logits.shape[1]
        return torch.cat([logits, logits[:, -1:].expand(-1, missing, -1)], 1), state


LATE = {
    "reset every 1,024 tokens": (lambda: Fragile(lambda seen, t: seen and seen % 1024 == 0), CHUNK),
    "positions clamped at 512": (Clamped, CHUNK),
    "wrong past 340": (lambda: Fragile(lambda seen, t: seen > 340), CHUNK),
    "wrong after the fourth call": (FourthCall, CHUNK),
    "chunks of one length": (lambda: Fragile(lambda seen, t: t == CHUNK), CHUNK),
    "calls of more than 500 tokens": (LongCalls, 1024),
}


@pytest.mark.parametrize("fault", LATE)
def test_a_fault_that_begins_past_the_probe_is_found_on_the_text_and_nothing_is_reported(fault):
    (model, chunk_size), seen = LATE[fault], []
    model, ids = model(), ids_of(400 * chunk_size)
    with pytest.raises(Refused) as refused:
        read(model, ids, chunk_size=chunk_size, progress=lambda done, nats, whole: seen.append(done))
    message = str(refused.value)
    assert "is exact-any-chunk, 11 of 11 laws, up to 320 tokens, and ids[test] contradicts it: its first " in message
    assert "nothing is reported" in message
    assert max(seen) < len(ids) / 10
    (replay,) = re.findall(r"pytest_lmeval\.replay\(.*\)", message)
    with pytest.raises(LawBroken):
        eval(replay, {"pytest_lmeval": pytest_lmeval, "lm": as_model(model)})
    unaudited = read(
        model, ids[:2000], chunk_size=chunk_size, certificate=None
    )  # the test can fail: without a claim nothing is audited
    assert abs(float(unaudited.nll) - losses_of(ids[:2000], as_model(model)).mean()) > 1e-5 or chunk_size > 500


@pytest.mark.parametrize("name", CLEAN)
def test_a_right_model_is_audited_for_a_twentieth_of_the_work_and_not_accused(name):
    result = read(CLEAN[name](), ids_of(4000), chunk_size=32)
    audit = audit_of(result)
    assert 65 < audit.tokens < 0.06 * 4000 * (1 + CALL / 32)
    assert audit.share <= SHARE
    assert audit.difference < 1e-4
    assert str(audit) == f"audited to {audit.tokens} tokens"
    assert result.record.certificate.coverage == f"11 of 11 laws, up to 320 tokens, {audit}"


@pytest.mark.parametrize(
    ("length", "audited"), [(CHUNK, None), (CHUNK + 1, None), (CHUNK + 2, CHUNK + 1), (2 * CHUNK, 127), (500, 137), (900, 137)]
)
def test_the_first_two_boundaries_are_read_again_whatever_it_costs_and_there_is_none_in_one_chunk(length, audited):
    audit = audit_of(read(LM, ids_of(length)))
    assert (audit and audit.tokens) == audited


def test_what_is_read_again_counts_as_work_and_is_no_part_of_the_numbers():
    calls = []

    class Counted(Functional):
        def forward(self, input_ids, state=None):
            calls.append(input_ids.shape[1])
            return super().forward(input_ids, state)

    lm, ids = as_model(Counted()), ids_of(25_000)
    calls.clear()
    plain = read(lm, ids, certificate=None)
    chunks = list(calls)
    calls.clear()
    audited = read(lm, ids)
    assert_equal_but_for_time(audited, plain)
    again = [tokens for tokens in calls if tokens != CHUNK and tokens != chunks[-1]]
    assert sum(again) == 137 + audit_of(audited).tokens
    work, extra = (sum(part) + CALL * len(part) for part in (chunks, again))
    assert audit_of(audited).share == pytest.approx(extra / work) == pytest.approx(SHARE, rel=0.02)


def test_of_a_text_of_unknown_length_twice_as_much_is_read_again_each_time():
    audit = audit_of(read(LM, iter(np.split(ids_of(60_000), 60))))
    assert audit.tokens >= 8 * 137
    assert SHARE / 3 < audit.share <= SHARE


def test_documents_are_read_again_each_from_its_own_beginning():
    faulty = Fragile(lambda seen, t: seen > 150)
    faulty.embed, faulty.head = (Functional(vocab=256).get_submodule(part) for part in ("embed", "head"))
    short, long = "a short document of no more than a chunk", "a longer one " * 40
    assert audit_of(read(BYTE_LM, texts(*[short] * 9, as_stream=False))) is None
    audit = audit_of(read(BYTE_LM, texts(short, *[long] * 50, as_stream=False)))
    assert (audit.tokens, audit.share <= SHARE) == (519, True)
    with pytest.raises(Refused, match=r"texts\[test\] contradicts it"):
        read(faulty, texts(short, *[long] * 50, as_stream=False))


def test_a_state_that_is_carried_through_windows_is_audited_and_windows_without_one_are_not():
    ids, faulty = ids_of(3000), Fragile(lambda seen, t: seen >= 128)
    assert audit_of(read(LM, ids_of(9000), window=256)).tokens == 256
    with pytest.raises(Refused):
        read(faulty, ids, window=256)
    assert audit_of(read(LM, ids, window=256, chunk_size=256)) is None
    assert audit_of(read(Stateless(), ids, window=256, certificate=certificate("stateless"))) is None


def test_frames_of_codes_are_audited():
    class Late(Frames):
        def forward(self, codes, state=None):
            recent, hidden = state or (None, None)
            seen = 0 if hidden is None else hidden[1]
            logits, (recent, new) = super().forward(codes, state and (recent, None if seen > 150 else hidden[0]))
            return logits, (recent, (new, seen + codes.shape[2]))

    audit = audit_of(read(Frames(), frames_of(2000, gaps=0.2)))
    assert (audit.tokens, audit.difference < 1e-4) == (137, True)
    with pytest.raises(Refused, match="contradicts it"):
        read(Late(), frames_of(4000))


@pytest.mark.parametrize("kind", [*CARRYING, GetSet], ids=lambda kind: kind.__name__)
def test_reading_again_does_not_disturb_a_state_however_the_model_holds_it(kind):
    ids, cannot = ids_of(2000), ("fork", "resume") if kind is Streaming else ()
    audited = read(kind(), ids, certificate=certificate(unavailable=cannot))
    assert audit_of(audited).tokens > 2 * CHUNK
    assert_equal_but_for_time(audited, read(kind(), ids, certificate=None))


def kill_at(tokens):
    def progress(done, nats, whole):
        if done >= tokens:
            raise Killed

    return progress


@pytest.mark.parametrize("known", [True, False], ids=["known length", "unknown length"])
def test_a_run_that_is_killed_and_resumed_is_audited_as_one_that_was_not(tmp_path, known):
    ids = ids_of(9000)

    def text():
        return ids if known else iter(np.split(ids, 90))

    whole = read(LM, text())
    options = {"checkpoints": Checkpoints(tmp_path), "key": "k"}
    for tokens in (100, 300, 1000, 5000):
        with pytest.raises(Killed), saving_every_chunk():
            read(LM, text(), **options, progress=kill_at(tokens))
    resumed = read(LM, text(), **options)
    assert resumed.resumed_at > 4000
    assert_equal_but_for_time(resumed, whole)
    assert audit_of(resumed) == audit_of(whole)


def test_a_checkpoint_holds_the_beginning_of_a_text_only_until_it_was_read_again(tmp_path):
    held = []
    for tokens in (1000, 5000):
        with pytest.raises(Killed), saving_every_chunk():
            read(LM, ids_of(25_000), checkpoints=Checkpoints(tmp_path), key="k", progress=kill_at(tokens))
        beginning = json.loads(torch.load(tmp_path / "k.pt")["sums"])["beginning"]
        held.append((len(beginning["ids"]), len(beginning["nll"])))
    assert 900 < held[0][1] < held[0][0] <= 1000
    assert held[1] == (0, 0)


@pytest.mark.parametrize("killed_at", [200, 600])
def test_a_resumed_run_does_not_get_past_a_fault_and_keeps_nothing_of_it(tmp_path, killed_at):
    ids, losses, options = ids_of(25_000), tmp_path / "losses.npy", {"checkpoints": Checkpoints(tmp_path), "key": "k"}

    def faulty():
        return Fragile(lambda seen, t: seen >= 512)

    with pytest.raises(Killed), saving_every_chunk():
        read(faulty(), ids, losses=losses, **options, progress=kill_at(killed_at))
    for _ in range(2):
        with pytest.raises(Refused, match="contradicts it"), saving_every_chunk():
            read(faulty(), ids, losses=losses, **options)
        assert not list(tmp_path.iterdir())


def test_numbers_that_change_from_reading_to_reading_are_refused():
    class Tired(Functional):
        calls = 0

        def forward(self, input_ids, state=None):
            self.calls += 1
            logits, state = super().forward(input_ids, state)
            return logits * (1.2 if self.calls < 5 else 1.0), state

    with pytest.raises(Refused, match=r"repeat: read in the same chunks once more, it was off by 0\.\d+ nats"):
        read(Tired(), ids_of(3000))


class Rounded(Functional):
    """Rounds otherwise in calls of another shape, as kernels for matrices do in sixteen bits."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits * (1 + 2**-8 * (input_ids.numel() % 7)), state


def low(model):
    return as_model(model.to(torch.bfloat16))


SIXTEEN = certificate(CONSISTENT, "bfloat16", rounding=0.05)


def test_of_sixteen_bits_the_spread_is_said_where_the_number_is_and_nobody_is_accused():
    result = read(low(Rounded()), ids_of(3000), certificate=SIXTEEN)
    audit = audit_of(result)
    assert 0 < audit.difference < 0.5
    assert result.record.notes == [
        f"up to {audit.difference:.2g} nats a token in bfloat16 depend on batch, neighbours and chunks (audited to "
        f"{audit.tokens} tokens); invariant=True fixes all shapes"
    ]
    assert read(LM, ids_of(3000)).record.notes == []


# Tasks

ROWS = [{"n": n, "text": "x" * (n * 7 % 13)} for n in range(48)]


def ask(row):
    return Choices(f"The number {row['n']} {row['text']} is", (" even", " odd", " something else"), row["n"] % 2)


def say(row):
    return Generate(f"{row['text']} {row['n']} is", ("x",), max_tokens=6)


CHOOSES, GENERATES = Task("parity", ROWS, ask), Task("generates", ROWS, say, ("exact_match",), most_cut_off=1)


def answer(model, task=CHOOSES, *, certificate=CERTIFIED, batch_size=8, invariant=False, **options):
    lm = as_model(model)
    policy = policy_for(lm, certificate, batch_size=batch_size, invariant=invariant)
    return measure_task(lm, task, policy=policy, **options)


class LateLeak(Neighbourly):
    """Leaks between the rows of batches of more than six."""

    def forward(self, input_ids, state=None):
        leaky = super() if len(input_ids) > 6 else super(Neighbourly, self)
        return leaky.forward(input_ids, state)


class LosesItsPlace(Functional):
    """Drops its state when a call of more than two tokens continues one."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, None if input_ids.shape[1] > 2 else state)


class WearsOut(Functional):
    """Drops its state at single tokens after 16 of a sequence."""

    def forward(self, input_ids, state=None):
        hidden, seen = state or (None, 0)
        logits, hidden = super().forward(input_ids, None if seen > 16 and input_ids.shape[1] == 1 else hidden)
        return logits, (hidden, seen + input_ids.shape[1])


@pytest.mark.parametrize(("kind", "law"), [(LateLeak, "rows"), (LosesItsPlace, "splits")])
def test_an_answer_that_depends_on_others_is_refused_with_its_question_and_both_values(tmp_path, kind, law):
    with pytest.raises(Refused) as refused:
        answer(kind(vocab=256), kept=tmp_path / "kept.jsonl", examples=tmp_path / "examples.jsonl")
    message = str(refused.value)
    for part in (
        "is exact-any-chunk, 11 of 11 laws, up to 320 tokens, and parity contradicts it: row ",
        "whole and alone. In batches of up to 8, with prefix sharing: on, the choice ' ",
        f"\n  {law}: ",
        "nothing is reported",
    ):
        assert part in message
    assert not list(tmp_path.iterdir())
    scores = answer(kind(vocab=256), certificate=None).examples  # the test can fail: they are wrong
    alone = answer(kind(vocab=256), certificate=None, invariant=True).examples
    differences = [np.abs(np.subtract(a.loglikelihoods, b.loglikelihoods)).max() for a, b in zip(scores, alone, strict=True)]
    assert max(differences) > 1e-3


@pytest.mark.parametrize("task", [CHOOSES, GENERATES], ids=lambda task: task.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_right_model_answers_and_a_twentieth_of_the_work_is_done_again(task, seed):
    many = dataclasses.replace(task, rows=[{**row, "n": n} for n, row in enumerate(ROWS * 4)])
    result = answer(Functional(vocab=256, seed=seed), many)
    audit = audit_of(result)
    again = [example for example in result.examples if example.audited is not None]
    assert (audit.questions, audit.answers) == ((len(again), 0) if task is CHOOSES else (0, len(again)))
    assert audit.difference == max(example.audited for example in again) < 1e-4
    assert 0.02 < audit.share <= SHARE
    assert result.record.certificate.coverage.endswith(" audited")


def test_a_model_with_a_context_limit_is_audited_too():
    limited = dataclasses.replace(as_model(BYTE_LM), context_length=4096)
    assert audit_of(answer(limited)).questions >= 1


def test_one_question_or_two_answers_are_read_again_whatever_that_costs():
    audit = audit_of(answer(BYTE_LM, limit=3))
    assert (audit.questions, audit.share > SHARE) == (1, True)
    assert audit_of(answer(BYTE_LM, GENERATES, limit=3)).answers == 2


class LastRowWins(Functional):
    """In a batch of more than three, each row has the logits of the last one, which is right for that one."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits[-1:].expand_as(logits) if len(logits) > 3 else logits, state


def test_a_fault_that_spares_a_row_of_each_batch_is_found(monkeypatch):
    def alike(row):  # of one length, so that they are one batch
        return Generate(f"The number {row['n']} is", ("x",), max_tokens=3)

    tasks = [Task("alike", [{"n": n + row} for row in (10, 30, 50, 70)], alike, ("exact_match",)) for n in range(9)]

    def refused(task):
        with contextlib.suppress(Refused):
            return not answer(LastRowWins(vocab=256), task, batch_size=8)
        return True

    assert all(map(refused, tasks))
    monkeypatch.setattr("pytest_lmeval.measures._task_audit.LEAST", 1)
    assert not all(map(refused, tasks))


def test_where_nothing_is_shared_batched_or_carried_nothing_is_read_again():
    alone = certificate(unavailable=("rows", "fork"))
    assert audit_of(answer(BYTE_LM, certificate=alone)) is None
    assert audit_of(answer(BYTE_LM, invariant=True)) is None
    assert audit_of(answer(Stateless(vocab=256), batch_size=1, certificate=certificate("stateless"))) is None
    assert audit_of(answer(Stateless(vocab=256), certificate=certificate("stateless"))).questions >= 1


def test_a_generated_answer_is_read_back_in_one_piece_and_its_log_probabilities_compared():
    def worn(row):  # every prompt is longer than what it wears out after, so whichever answers are read again are wrong
        return dataclasses.replace(say(row), prompt=f"It is known that {say(row).prompt}")

    with pytest.raises(Refused, match=r"generates contradicts it: row .* the answer .* had a log-likelihood of"):
        answer(WearsOut(vocab=256), dataclasses.replace(GENERATES, ask=worn))
    sampled = dataclasses.replace(GENERATES, ask=lambda row: dataclasses.replace(say(row), temperature=0.7))
    assert audit_of(answer(BYTE_LM, sampled)).answers > 1


@pytest.mark.parametrize("name", CLEAN)
def test_no_right_architecture_is_accused_by_its_answers(name, monkeypatch):
    monkeypatch.setattr("clean_models.VOCAB", 256)
    for task in (CHOOSES, GENERATES):
        assert audit_of(answer(CLEAN[name](), task)).difference < 1e-3
    lm = low(CLEAN[name]())
    assert audit_of(answer(lm, certificate=SIXTEEN)).questions >= 1


# Verbs


@pytest.fixture
def lmeval(tmp_path, monkeypatch):
    """The fixture, in a run whose probes have found nothing wrong."""
    monkeypatch.setattr(Session, "verdict", lambda session, lm: SimpleNamespace(certificate=CERTIFIED))
    return Lmeval(VerbContext(Session(tmp_path), Log("t.py::test_it")))


def test_a_refused_measurement_leaves_no_record_and_no_file_and_a_later_one_is_refused_again(lmeval, tmp_path):
    late, leaky = as_model(LATE["wrong past 340"][0]()), as_model(LateLeak(vocab=256))
    for _ in range(2):
        with pytest.raises(Refused, match="nothing is reported"):
            lmeval.perplexity(late, ids_of(25_000), chunk_size=CHUNK, losses=True)
        with pytest.raises(Refused, match="nothing is reported"):
            lmeval.task(leaky, CHOOSES)
    assert lmeval._context.log.records == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert lmeval.task(leaky, CHOOSES, invariant=True).record.settings["invariant"] is True


def test_the_audit_is_in_the_certificate_of_the_record_and_a_suite_passes_invariant_on(lmeval):
    assert lmeval.perplexity(LM, ids_of(3000), chunk_size=CHUNK).certificate.audit.tokens >= 137
    whole, fixed = (lmeval.suite(BYTE_LM, Suite("both", (CHOOSES, GENERATES)), invariant=fixed) for fixed in (False, True))
    assert audit_of(whole["parity"]).questions
    assert audit_of(whole["generates"]).answers
    assert [result.record.settings.get("invariant") for result in fixed.tasks.values()] == [True, True]


# Sixteen bits, and shapes that depend on nothing else


def bits(result):
    return {example.id: example.loglikelihoods for example in result.examples}


@pytest.fixture
def sixteen():
    return low(Rounded(vocab=256))


def test_invariant_answers_are_the_same_bits_for_any_batch_size_order_and_limit(sixteen):
    shuffled = dataclasses.replace(CHOOSES, rows=[ROWS[index] for index in np.random.default_rng(0).permutation(len(ROWS))])
    ways = [(CHOOSES, {}), (CHOOSES, {"batch_size": 1}), (shuffled, {}), (shuffled, {"limit": 13, "batch_size": 4})]
    found, plain = (
        [bits(answer(sixteen, task, certificate=SIXTEEN, invariant=invariant, **way)) for task, way in ways]
        for invariant in (True, False)
    )
    assert all(part[name] == found[0][name] for part in found for name in part)
    assert len(found[-1]) == 13
    assert any(part[name] != plain[0][name] for part in plain for name in part)  # the test can fail


def test_invariant_answers_that_are_generated_are_the_same_too(sixteen):
    together, alone = (answer(sixteen, GENERATES, certificate=SIXTEEN, invariant=True, batch_size=n) for n in (8, 1))
    assert [e.output for e in together.examples] == [e.output for e in alone.examples]
    assert together.record.details["tokens_read"] < 60 * len(ROWS)  # token by token, not the whole text for each


def test_an_invariant_loss_does_not_depend_on_where_the_text_ends(tmp_path, sixteen):
    def losses(invariant, tokens, **how):
        path = tmp_path / "losses.npy"
        read(sixteen, ids_of(400), certificate=SIXTEEN, invariant=invariant, tokens=tokens, losses=path, **how)
        return np.load(path)

    for how in ({}, {"window": 100}):
        long, short = (losses(True, tokens, **how) for tokens in (400, 150))
        assert np.array_equal(short, long[:149])
    long, short = (losses(False, tokens) for tokens in (400, 140))
    assert not np.array_equal(short, long[:139])  # the test can fail
    np.testing.assert_allclose(short, long[:139], atol=0.3)


def test_invariant_is_a_setting_of_the_record_and_the_note_is_gone(sixteen):
    for measure, what in ((answer, CHOOSES), (read, ids_of(300))):
        fixed, plain = (measure(sixteen, what, certificate=SIXTEEN, invariant=invariant).record for invariant in (True, False))
        assert fixed.settings.get("invariant") is True
        assert "invariant" not in plain.settings
        assert [len([note for note in record.notes if "bfloat16" in note]) for record in (fixed, plain)] == [0, 1]
    assert json.dumps(fixed.settings)


def seeing(base, start=330):
    """A model whose logits at positions from `start` on see the next token of the same call."""

    class Seeing(base):
        def forward(self, input_ids, *state):
            found = super().forward(input_ids, *state)
            logits = found[0] if isinstance(found, tuple) else found
            following = torch.nn.functional.one_hot(input_ids[:, 1:], logits.shape[-1]) * 30.0
            following[:, :start] = 0.0
            logits = torch.cat([logits[:, :-1] + following, logits[:, -1:]], 1)
            return (logits, *found[1:]) if isinstance(found, tuple) else logits

    return Seeing


def scaled(base, start=400):
    """A model whose logits are too large in calls of more than `start` tokens."""

    class Scaled(base):
        def forward(self, input_ids, *state):
            found = super().forward(input_ids, *state)
            scale = 1.5 if input_ids.shape[1] > start else 1.0
            return (found[0] * scale, *found[1:]) if isinstance(found, tuple) else found * scale

    return Scaled


@pytest.mark.parametrize("fault", [seeing, scaled])
@pytest.mark.parametrize(("base", "verdict"), [(Stateless, "stateless"), (Functional, EXACT)])
def test_a_text_in_windows_of_one_call_is_audited_at_the_lengths_in_use(fault, base, verdict):
    def read_in_windows(model, certificate):
        lm = dataclasses.replace(as_model(model), context_length=1024)
        return measure_perplexity(lm, ids_of(9000), policy=policy_for(lm, certificate))

    found = certificate(verdict)
    with pytest.raises(Refused, match=r"(?s)prefix: .*read calls of a length that was tried: window=320"):
        read_in_windows(fault(base)(), found)
    audit = audit_of(read_in_windows(base(), found))
    assert (audit.tokens, audit.difference < 1e-5) == (896, True)
    right, wrong = (read_in_windows(model(), None) for model in (base, fault(base)))  # the twin: without a claim, no audit
    assert abs(float(right.nll) - float(wrong.nll)) > 0.01


def test_a_window_no_longer_than_what_was_tried_needs_no_audit():
    lm = dataclasses.replace(as_model(Stateless()), context_length=320)
    assert audit_of(measure_perplexity(lm, ids_of(3000), policy=policy_for(lm, certificate("stateless")))) is None


def test_a_long_question_of_a_model_that_sees_its_future_is_refused():
    def choices(row):
        return Choices("a long prompt " * 40 + str(row["n"]), (" is right", " is wrong"), answer=0)

    long = Task("long", [{"n": n} for n in range(12)], choices)
    for model, right in ((seeing(Stateless), False), (Stateless, True)):
        lm = as_model(model(vocab=256))
        policy = policy_for(lm, certificate("stateless"), batch_size=1)
        if right:
            assert measure_task(lm, long, policy=policy).record.certificate.audit.questions >= 1
        else:
            with pytest.raises(Refused, match="contradicts it"):
                measure_task(lm, long, policy=policy)
