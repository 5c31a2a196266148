"""Every law is tried on its floor, whatever a call costs; what was not tried proves nothing, and is not used."""

from dataclasses import replace
from itertools import count
from random import Random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from probing import probed
from tiny_models import Fragile, Functional, Stateless, Stepper

import pytest_lmeval
from pytest_lmeval.engine import Engine, policy_for
from pytest_lmeval.engine._policy import CALL
from pytest_lmeval.errors import ArgumentError, LawBroken, Refused
from pytest_lmeval.laws import LAWS, Case, Harness, _probe, check, probe
from pytest_lmeval.laws._floors import floor_length, floors
from pytest_lmeval.laws._run_probe import PROFILES
from pytest_lmeval.laws._strategies import aligned_cases, every_chunk_length
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._certificate import Certificate, LawResult

FUNCTIONAL = as_model(Functional())


def test_the_floors_are_those_that_the_design_lists():
    floor = floors(320, Random(0))
    assert floor.keys() == LAWS.keys()
    pieces = [case.sizes for case in floor["splits"]]
    assert pieces[:2] == [[160, 160], [30, 290]]
    assert [sizes[0] for sizes in pieces[2:5]] == [23, 64, 100]
    assert len(pieces) == 6
    assert all(sum(sizes) == 320 for sizes in pieces)
    assert floor["steps"] == (Case(8), Case(320, (304,)))
    assert [case.cuts for case in floor["prefix"]] == [(1,), (23,), (160,)]
    assert len(floor["causality"]) == 2
    assert [(case.rows, case.length) for case in floor["rows"]] == [(2, 24), (8, 24), (33, 24)]
    assert [case.cuts for case in floor["fork"]] == [case.cuts for case in floor["resume"]] == [(24,), (160,)]
    assert [(case.length, case.cuts) for case in floor["isolation"]] == [(27, (24,)), (160, ())]


@pytest.mark.parametrize(("boundaries", "context", "length"), [((), None, 320), ((16, 256), None, 513), ((256,), 100, 100)])
def test_the_sequence_passes_the_largest_boundary_twice_within_the_context(boundaries, context, length):
    assert floor_length(boundaries, context) == length


@settings(max_examples=60)
@given(length=st.integers(2, 700), seed=st.integers(0, 9))
def test_the_floors_of_any_length_are_cases_that_every_law_can_be_tried_on(length, seed):
    for cases in floors(length, Random(seed)).values():
        for case in cases:
            assert 2 <= case.length <= length
            assert sum(case.sizes) == case.length
            assert all(size > 0 for size in case.sizes)


@pytest.mark.parametrize("length", [2, 3, 5, 24, 40])
def test_a_short_context_has_floors_too(length):
    model = Functional()
    model.context_length = length
    certificate = probed(model).certificate
    assert (certificate.verdict, certificate.longest) == ("exact-any-chunk", length), certificate.why_not()


class Slow(Functional):
    """Counts what a slow model would be asked."""

    calls = 0

    def forward(self, input_ids, state=None):
        self.calls += 1
        return super().forward(input_ids, state)


def test_every_law_is_tried_at_its_floor_though_nothing_is_left_to_spend():
    result = probe(as_model(Slow()), budget=1)
    assert result.verdict == "exact-any-chunk"
    assert result.certificate.coverage == "11 of 11 laws, up to 320 tokens"
    assert result.record.metrics["laws_kept"].unit == "of 11"
    floor = floors(320, Random(0))
    assert all(law.cases >= len(floor[name]) for name, law in result.laws.items())


def test_the_floors_cost_at_most_sixty_reads_of_160_tokens():
    details = probe(as_model(Functional()), budget=1).record.details
    assert details["reads"] == details["work"] / (160 + CALL) <= 60


def test_the_work_of_a_probe_counts_every_call_and_every_token():
    model = Slow()
    harness = Harness(as_model(model))
    model.calls = 0
    check("splits", harness, Case(40, (10, 20)))
    assert (harness.work.calls, harness.work.tokens) == (2 + 3, 2 * 320 + 40)  # references: full, and in float64
    assert harness.work.cost == (320 + CALL) * (1 + 4) + 40 + 3 * CALL


def test_a_budget_of_nothing_proves_nothing_and_says_so():
    model = Slow()
    lm = as_model(model)
    model.calls = 0
    result = probe(lm, budget=0)
    assert model.calls == 0
    assert result.verdict == "unproven"
    assert {law.status for law in result.laws.values()} == {"untried"}
    assert result.certificate.coverage == "0 of 11 laws"
    assert "untried: repeat, isolation, causality" in str(result)
    assert "without --lmeval-budget every law is tried on its floor" in str(result)


def test_a_shorter_sequence_than_the_floor_leaves_the_laws_unproven():
    result = probed(Functional(), longest=64)
    assert result.verdict == "unproven"
    assert result.laws["splits"].status == "untried"
    assert result.laws["rows"].status == "kept"
    assert "its floor needs sequences of 320 tokens, and longest=64 was asked for" in str(result)


def test_a_law_broken_on_a_short_sequence_is_broken_though_others_are_untried():
    leak = Leaking()
    result = probed(leak, longest=64)
    assert result.verdict == "inexact"
    assert result.certificate.broken == {"rows"}


class Leaking(Functional):
    """Rows of a batch see each other."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits + 0.1 * logits.mean(0, keepdim=True).roll(1, -1) if logits.shape[0] > 1 else logits, state


@pytest.mark.parametrize("budget", [0.5, 2.0, -1, "200k", True])
def test_a_budget_that_is_no_number_of_tokens_is_refused(budget):
    with pytest.raises(ArgumentError, match="expected a number of tokens"):
        probe(FUNCTIONAL, budget=budget)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda seen, t: seen > 24,  # positions as if 24 tokens were cached
        lambda seen, t: seen >= 300,
        lambda seen, t: bool(seen) and t == 23,
        lambda seen, t: bool(seen) and t == 100,
        lambda seen, t: seen == 30,
        lambda seen, t: bool(seen) and t == 64,
    ],
)
def test_a_fault_inside_the_floor_is_found_on_a_model_of_any_price(wrong):
    assert not probe(as_model(Fragile(wrong)), budget=1).laws["splits"].kept


class Sixes(Functional):
    """Wrong in batches of six rows or more."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return logits * (1.1 if len(input_ids) >= 6 else 1.0), state


def test_a_fault_of_some_numbers_of_rows_is_found_in_every_row():
    result = probe(as_model(Sixes()), budget=1)
    assert not result.laws["rows"].kept


class LastRow(Functional):
    """Wrong in the last row of 33 only."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        scale = torch.ones(len(input_ids), 1, 1)
        scale[32:] = 1.1
        return logits * scale, state


def test_every_row_of_a_batch_is_compared():
    result = probe(as_model(LastRow()), budget=1)
    assert "row 32 of 33" in result.laws["rows"].counterexample


class FourthCall(Functional):
    """Wrong from the fourth call of a sequence on, whatever the chunks."""

    def forward(self, input_ids, state=None):
        hidden, calls = state or (None, 0)
        logits, hidden = super().forward(input_ids, hidden)
        return logits * (1.1 if calls >= 3 else 1.0), (hidden, calls + 1)


def test_a_model_wrong_from_the_fourth_call_is_exact_in_no_multiple():
    assert probe(as_model(FourthCall())).verdict == "inexact"


@given(k=st.sampled_from([2, 4, 16, 64]))
def test_a_multiple_is_tried_in_many_chunks_and_with_long_rests(k):
    longest = max(320, 9 * k)
    cases = aligned_cases(k, longest)
    assert all(cut % k == 0 for case in cases for cut in case.cuts)
    assert max(len(case.cuts) for case in cases) >= 8
    assert max(case.sizes[-1] for case in cases) > longest // 2


def test_every_chunk_length_is_tried():
    sizes = {size for case in every_chunk_length(160) for size in case.sizes[1:-1]}
    assert set(range(1, 80)) <= sizes | {case.sizes[-1] for case in every_chunk_length(160)}


def test_a_fault_of_one_chunk_length_is_found_where_the_budget_allows():
    assert not probe(as_model(Fragile(lambda seen, t: bool(seen) and t == 57))).laws["splits"].kept


def certificate(**status):
    """A certificate of a model that keeps all laws but these."""
    made = {
        "kept": LawResult(cases=9),
        "untried": LawResult(cases=0, missing="its floor"),
        "not applicable": LawResult(cases=0, unavailable="it cannot"),
    }
    laws = {name: made[status.get(name, "kept")] for name in LAWS}
    return Certificate(verdict="unproven" if "untried" in status.values() else "exact-any-chunk", dtype="float32", laws=laws)


@pytest.mark.parametrize("status", ["untried", "not applicable"])
def test_the_policy_does_only_what_was_proven(status):
    proven = policy_for(FUNCTIONAL, certificate())
    assert (proven.carry, proven.fork, proven.resume, proven.batch_size, proven.withheld) == (True, True, True, 8, ())
    alone = policy_for(FUNCTIONAL, certificate(rows=status))
    assert (alone.batch_size, alone.withheld) == (1, (f"batches of one, since rows is {status}",))
    unshared = policy_for(FUNCTIONAL, certificate(fork=status))
    assert (unshared.share, unshared.withheld) == (False, (f"no prefix is shared, since fork is {status}",))
    assert not policy_for(FUNCTIONAL, certificate(resume=status)).resume


@pytest.mark.parametrize("law", ["splits", "steps", "prefix", "causality", "repeat", "isolation", "sums"])
def test_without_the_laws_of_streaming_a_text_is_read_in_windows_that_carry_nothing(law):
    policy = policy_for(FUNCTIONAL, certificate(**{law: "untried"}))
    assert (policy.carry, policy.share, policy.decode) == (False, False, False)
    assert (policy.windows.size, policy.chunk_size) == (1024, 1024)
    assert f"{law} is untried" in policy.withheld[0]


def test_more_than_the_certificate_proves_is_refused():
    with pytest.raises(Refused, match="to read 8 rows at once"):
        Engine(FUNCTIONAL, replace(policy_for(FUNCTIONAL, certificate(rows="untried")), batch_size=8))


def test_a_model_without_a_state_needs_no_law_about_one():
    result = probe(as_model(Stateless()), budget=1)
    assert (result.verdict, result.certificate.coverage) == ("stateless", "6 of 6 laws, up to 320 tokens")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_large_model_is_searched_less_and_its_floors_are_not(profile):
    few, many = (PROFILES[profile].budget_for(parameters) for parameters in (10_000, 100_000_000_000))
    assert few == PROFILES[profile].budget
    assert many == 0


def test_the_same_cases_are_tried_on_every_machine_in_the_profile_ci():
    tried = []

    class Recorder(Stepper):
        def step(self, input_ids, state=None):
            tried[-1].append(tuple(input_ids.shape))
            return super().step(input_ids, state)

    for _ in range(2):
        tried.append([])
        probe(as_model(Recorder()), profile="ci", budget=30_000)
    assert tried[0] == tried[1]
    tried.append([])
    probe(as_model(Recorder()), profile="dev", budget=30_000)
    assert tried[2] != tried[0]


def test_a_probe_that_takes_minutes_says_so_before_it_starts(monkeypatch):
    said, clock = [], count(step=50.0)
    monkeypatch.setattr(_probe.time, "perf_counter", lambda: next(clock))
    probe(as_model(Functional()), budget=1, say=said.append)
    (line,) = said
    assert "minutes on cpu" in line
    assert "--lmeval-budget 0" in line


def test_a_probe_shows_how_far_it_is():
    shown = []
    probe(as_model(Functional()), budget=5000, progress=lambda *now: shown.append(now))
    costs = [cost for cost, _, _ in shown]
    assert costs == sorted(costs)
    assert {broken for _, broken, _ in shown} == {0}
    assert shown[-1][2] <= 2 * costs[-1]


def test_a_record_says_what_was_not_done_because_it_was_not_proven(project):
    project.makepyfile(
        test_unproven="""
        from pytest_lmeval import Choices, Task

        ASKED = Task("asked", [{"n": n} for n in range(6)], lambda row: Choices(f"{row['n']}:", (" a", " b"), answer=0))

        def test_text(lmeval, lm):
            record = lmeval.perplexity(lm, "text:text.txt", tokens=300).record
            assert record.certificate.verdict == "unproven"
            assert record.settings["reading"] == "windows"
            print("text", record.notes, record.details["why"])

        def test_task(lmeval, lm):
            record = lmeval.task(lm, ASKED).record
            assert record.settings["batch_size"] == 1
            print("task", record.notes)
        """
    )
    ran = project.runpytest_subprocess("-s", "--lm", "tiny:Tiny", "--lmeval-budget=0", "-p", "no:cacheprovider")
    ran.assert_outcomes(passed=2)
    ran.stdout.fnmatch_lines(
        [
            "*text *no state is carried, since causality is untried and isolation is untried*",
            "*task *prefix sharing: off (unproven)*no prefix is shared, since*batches of one, since rows is untried*",
        ]
    )
    ran.stdout.fnmatch_lines(["*unproven, 0 of 11 laws*"])


def reading_row(of):
    """A model that gives each row of a batch the result of another row: `of(row, rows)`."""

    class Misplaced(Functional):
        def forward(self, input_ids, state=None):
            rows = len(input_ids)
            logits, state = super().forward(input_ids, state)
            taken = [of(row, rows) for row in range(rows)]
            return logits[taken], state[:, taken]

    return as_model(Misplaced())


@pytest.mark.parametrize(
    "of",
    [
        lambda row, rows: 0 if rows == 8 and row == 7 else row,
        lambda row, rows: 0 if rows == 33 and row == 32 else row,
        lambda row, rows: 0 if rows > 1 and row == rows - 1 else row,
        *[lambda row, rows, k=k: row % k for k in (2, 4, 7, 8, 16, 32)],
        lambda row, rows: max(0, row - 1),
    ],
)
def test_a_row_that_gets_the_result_of_another_is_found_by_the_floors(of):
    assert not probe(reading_row(of), budget=1).laws["rows"].kept
    assert probe(reading_row(lambda row, rows: row), budget=1).laws["rows"].kept


@pytest.mark.parametrize("context", [2, 3, 5, 8])
def test_a_tiny_context_is_no_fault(context):
    def limited(seen, t):
        if seen + t > context:
            raise IndexError("no such position")

    model = Fragile(limited)
    model.context_length = context
    assert probe(as_model(model), budget=1).verdict == "exact-any-chunk"


def test_a_limit_of_rows_is_no_fault_and_limits_the_batches():
    class Sixteen(Functional):
        def forward(self, input_ids, state=None):
            if len(input_ids) > 16:
                raise ValueError("max_batch_size is 16")
            return super().forward(input_ids, state)

    lm = as_model(Sixteen())
    certificate = probe(lm, budget=1).certificate
    assert (certificate.verdict, certificate.limit_rows) == ("exact-any-chunk", 16)
    assert policy_for(lm, certificate, batch_size=40).batch_size == 16
    with pytest.raises(Refused, match="to read 40 rows at once"):
        Engine(lm, replace(policy_for(lm, certificate), batch_size=40))


def in_steps_of_16(wrong=lambda seen: False):
    """A model that reads at most 16 tokens a call; its logits are wrong where `wrong(tokens before)`."""

    def limited(seen, t):
        if t > 16:
            raise ValueError("at most 16 tokens a call")
        return wrong(seen)

    return as_model(Fragile(limited))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_limit_of_one_step_is_no_limit_of_the_sequence(dtype):
    lm = in_steps_of_16()
    lm.module.to(dtype)
    certificate = probe(lm, budget=5000).certificate
    assert certificate.verdict == ("exact-any-chunk" if dtype == torch.float32 else "consistent"), certificate.why_not()
    assert certificate.coverage == "11 of 11 laws, up to 320 tokens"
    assert (certificate.limit_tokens, certificate.limit_is_step) == (16, True)


def test_a_fault_behind_a_limit_of_one_step_is_found():
    found = probe(in_steps_of_16(lambda seen: seen > 100 and seen % 16), budget=1)
    assert not found.laws["splits"].kept
    line = found.laws["splits"].counterexamples[0].replay
    with pytest.raises(LawBroken):
        eval(line, {"pytest_lmeval": pytest_lmeval, "lm": in_steps_of_16(lambda seen: seen > 100 and seen % 16)})
    eval(line, {"pytest_lmeval": pytest_lmeval, "lm": in_steps_of_16()})
