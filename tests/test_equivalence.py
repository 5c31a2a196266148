"""The probe passes what is right and catches what is wrong, with a case that shows it."""

import time

import pytest
import torch
from hypothesis import given, settings
from tiny_models import (
    CARRYING,
    Aligned,
    Broken,
    Dropped,
    Drowned,
    Forgetful,
    Functional,
    GetSetState,
    Learning,
    LengthDependent,
    Neighbourly,
    PortableStreaming,
    Seeing,
    Shared,
    Stale,
    Stateless,
    Stepper,
    Streaming,
)

from pytest_lmeval.errors import ModelError, NotFiniteError
from pytest_lmeval.laws._checks import check
from pytest_lmeval.laws._harness import Harness
from pytest_lmeval.laws._probe import probe, restore
from pytest_lmeval.laws._strategies import Case, cases, edge_cases
from pytest_lmeval.laws._tolerance import Yardstick, token_errors
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._measured import Record


@pytest.mark.parametrize("toy", CARRYING)
def test_a_model_that_carries_its_state_is_exact_for_any_chunk(toy):
    result = probe(as_model(toy()))
    assert result.verdict == "exact-any-chunk", result
    assert result.certificate.worst_ratio < 8


def test_a_model_without_a_state_is_stateless():
    result = probe(as_model(Stateless()))
    assert result.verdict == "stateless"
    assert set(result.laws) == {"repeat", "isolation", "causality", "prefix", "rows", "sums"}


def test_the_demo_is_exact_beyond_its_window():
    result = probe(load("demo"))
    assert result.verdict == "exact-any-chunk", result
    assert result.certificate.longest > 3 * 256
    assert result.certificate.not_reached == ()
    assert result.laws["splits"].longest == result.certificate.longest


@pytest.mark.parametrize(
    ("fault", "verdict", "broken"),
    [
        (Dropped, "exact-step-only", {"splits"}),
        (Forgetful, "inexact", {"splits", "steps"}),
        (Seeing, "non-causal", {"splits", "steps", "causality"}),
        (Stale, "inexact", {"isolation"}),
        (Learning, "inexact", {"isolation"}),
        (Aligned, "exact-multiple-of-4", {"splits", "steps"}),
        (LengthDependent, "length-dependent", {"prefix"}),
        (Neighbourly, "inexact", {"rows"}),
        (Shared, "inexact", {"fork"}),
    ],
)
def test_a_fault_is_caught_by_the_law_it_breaks(fault, verdict, broken):
    result = probe(as_model(fault()))
    assert result.verdict == verdict, result
    assert broken <= {name for name, law in result.laws.items() if not law.kept}


def test_a_law_that_cannot_be_tried_says_why_and_breaks_nothing():
    class SingleRow(Stepper):
        def step(self, input_ids, state=None):
            return super().step(input_ids[:1], state)

    rows = probe(as_model(SingleRow())).laws["rows"]
    assert (rows.kept, rows.cases) == (True, 0)
    assert "does not read 2 rows at once" in rows.unavailable
    fork = probe(as_model(Streaming())).laws["fork"]
    assert "cannot be forked" in fork.unavailable


def test_a_model_that_fails_on_rows_in_some_shapes_only_breaks_the_law():
    class SometimesSingle(Functional):
        def forward(self, input_ids, state=None):
            if input_ids.shape == (2, 1):
                raise IndexError("one token of two rows")
            return super().forward(input_ids, state)

    law = probe(as_model(SometimesSingle()), budget=60.0).laws["rows"]
    assert not law.kept
    assert "one token of two rows" in law.counterexample


def test_a_state_in_a_buffer_is_no_change_of_the_model():
    class InBuffer(GetSetState):
        def __init__(self):
            super().__init__()
            del self.held
            self.register_buffer("held", torch.zeros(1, 1, 16))

        def reset_state(self):
            self.held = torch.zeros(1, 1, 16)

        def set_state(self, state):
            self.held = state

    result = probe(as_model(InBuffer()))
    assert result.verdict == "exact-any-chunk", result


@pytest.mark.parametrize("pause", [0, 0.004])
def test_a_slow_model_is_tried_on_less_and_never_crashes_the_probe(pause):
    class Rare(Functional):
        """Wrong where few cases look: a chunk after 10 to 59 tokens whose length is no multiple of five."""

        def forward(self, input_ids, state=None):
            time.sleep(pause)
            hidden, seen = state or (None, 0)
            wrong = input_ids.shape[1] > 1 and 10 <= seen < 60 and seen % 5
            logits, hidden = super().forward(input_ids, None if wrong else hidden)
            return logits, (hidden, seen + input_ids.shape[1])

    result = probe(as_model(Rare()), budget=2.0 if pause else 60.0)
    law = result.laws["splits"]
    assert pause or not law.kept
    assert result.verdict in ("exact-multiple-of-64", "exact-any-chunk")  # 64 is right: no cut falls where it is wrong


def test_a_model_that_gives_no_numbers_is_named_with_the_place():
    with pytest.raises(NotFiniteError, match=r"gave logits that are no numbers at token \d+ of"):
        probe(as_model(Broken()))


def test_a_counterexample_is_small_and_says_what_happened():
    result = probe(as_model(Dropped()))
    small = result.laws["splits"].counterexamples[0]
    assert small.case["length"] <= 8
    assert len(small.case["cuts"]) == 1
    assert "log-probabilities off by" in str(result)
    assert "fades out: a state that forgets" in str(result)


def test_a_fault_far_behind_the_beginning_is_found():
    class ForgetsAfterHundred(Functional):
        def forward(self, input_ids, state=None):
            hidden, seen = (None, 0) if state is None else state
            logits, hidden = super().forward(input_ids, hidden if seen < 100 else None)
            return logits, (hidden, seen + input_ids.shape[1])

    result = probe(as_model(ForgetsAfterHundred()))
    assert not result.laws["splits"].kept


def test_a_model_that_is_not_deterministic_is_caught():
    class Noisy(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return logits + 1e-4 * torch.rand_like(logits), state

    result = probe(as_model(Noisy()))
    assert result.verdict == "inexact"
    assert result.certificate.decisive == ["repeat", "isolation"]
    assert "not deterministic" in str(result)


def test_dropout_that_cannot_be_switched_off_is_caught():
    class Dropping(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return torch.nn.functional.dropout(logits, 0.1), state

    assert not probe(as_model(Dropping())).laws["repeat"].kept


def test_a_model_in_train_mode_is_refused_by_name_of_its_parts():
    lm = as_model(Functional())
    lm.module.cell.train()
    with pytest.raises(ModelError, match=r"is in train mode \(1 of its parts: cell\).*eval\(\)"):
        probe(lm)


def test_a_held_module_in_train_mode_is_named_where_it_matters():
    class Wrapped(Stepper):
        def __init__(self):
            super().__init__()
            self.model.train()
            self.dropout = torch.nn.Dropout(0.2)

        def step(self, input_ids, state=None):
            logits, state = super().step(input_ids, state)
            return self.dropout(logits), state

    assert "in train mode (Functional): call its eval()" in str(probe(as_model(Wrapped())))


def test_a_model_that_lies_on_two_devices_is_named_with_both():
    model = Functional()
    model.head = torch.nn.Linear(16, 32, device="meta")
    with pytest.raises(ModelError, match=r"on several devices: \d tensors on cpu, 2 tensors on meta"):
        as_model(model)


def test_an_undeclared_limit_is_found_and_reported():
    class Short(Functional):
        def forward(self, input_ids, state=None):
            hidden, seen = state or (None, 0)
            if seen + input_ids.shape[1] > 37:
                raise IndexError("index out of range in self")
            logits, hidden = super().forward(input_ids, hidden)
            return logits, (hidden, seen + input_ids.shape[1])

    certificate = probe(as_model(Short())).certificate
    assert (certificate.limit_tokens, certificate.limit_is_step) == (37, False)
    assert certificate.verdict == "exact-any-chunk"
    assert "at most 37 tokens in one piece: it raised IndexError when it read 38" in certificate.limit


def test_a_limit_of_one_step_is_told_from_one_of_the_sequence():
    class ShortSteps(Functional):
        def forward(self, input_ids, state=None):
            assert input_ids.shape[1] <= 20, "n_seq"
            return super().forward(input_ids, state)

    certificate = probe(as_model(ShortSteps())).certificate
    assert (certificate.limit_tokens, certificate.limit_is_step) == (20, True)


def test_a_declared_limit_is_respected():
    class Declared(Functional):
        context_length = 37

        def forward(self, input_ids, state=None):
            hidden, seen = state or (None, 0)
            assert seen + input_ids.shape[1] <= 37
            logits, hidden = super().forward(input_ids, hidden)
            return logits, (hidden, seen + input_ids.shape[1])

    certificate = probe(as_model(Declared())).certificate
    assert (certificate.verdict, certificate.limit, certificate.longest) == ("exact-any-chunk", None, 37)


def test_a_model_that_refuses_to_go_on_in_chunks_is_exact_in_steps():
    class StepsOnly(Functional):
        def forward(self, input_ids, state=None):
            if state is not None and input_ids.shape[1] > 1:
                raise ValueError("only supports a single new token per step")
            return super().forward(input_ids, state)

    result = probe(as_model(StepsOnly()))
    assert result.verdict == "exact-step-only"
    assert "it raised ValueError when it read" in result.laws["splits"].counterexample


def test_a_model_that_cannot_be_copied_is_measured_against_its_own_noise():
    class Uncopyable(Functional):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle")

    result = probe(as_model(Uncopyable()))
    assert result.verdict == "exact-any-chunk"
    assert result.certificate.reference == "full run, alone and as one of two rows"


def test_what_reading_changed_is_put_back():
    model = Learning()
    lm = as_model(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = probe(lm)
    assert "parameters or buffers (embed.weight" in str(result)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_random_numbers_of_the_user_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    probe(as_model(Functional()), budget=0.1)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("declared", "kept"), [(True, False), (False, True)])
def test_a_state_that_grows_breaks_a_law_only_if_it_was_declared_constant(declared, kept):
    class Hoarding(Functional):
        constant_state = declared

        def forward(self, input_ids, state=None):
            hidden, seen = state or (None, input_ids[:, :0])
            logits, hidden = super().forward(input_ids, hidden)
            return logits, (hidden, torch.cat([seen, input_ids], 1))

    result = probe(as_model(Hoarding()))
    assert result.laws["size"].kept is kept
    assert result.certificate.state.bytes_per_token == 8
    assert result.certificate.state.dtypes == ("float32", "int64")


def test_a_state_that_is_partly_kept_in_the_model_cannot_be_resumed():
    class HalfOutside(Functional):
        def forward(self, input_ids, state=None):
            if state is None:
                self.bias = torch.tanh(self.embed.weight[input_ids[:, 0]]).sum(-1)[:, None, None]
            elif not hasattr(self, "bias"):
                self.bias = torch.zeros(1, 1, 1)
            logits, state = super().forward(input_ids, state)
            return torch.cat([logits[..., :1] + self.bias, logits[..., 1:]], -1), state

    result = probe(as_model(HalfOutside()))
    assert not result.laws["resume"].kept
    assert "A part of its state is not in the state" in result.laws["resume"].counterexample


def test_a_model_that_keeps_the_wrong_positions_breaks_the_sums():
    class FirstInstead(Stepper):
        def step(self, input_ids, state=None, keep=None):
            logits, state = super().step(input_ids, state)
            return logits if keep is None else logits[:, :keep], state

    result = probe(as_model(FirstInstead()))
    assert result.certificate.broken == {"sums"}
    assert "scored with another's logits" in str(result)


def test_profiles_are_our_own_and_the_users_stay_as_they_are():
    before = settings.default
    probe(as_model(Functional()), profile="dev", budget=0.2)
    assert settings.default is before
    with pytest.raises(ValueError, match="no profile 'nonsense'"):
        probe(as_model(Functional()), profile="nonsense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_consistent_and_never_proven(dtype):
    result = probe(as_model(Functional().to(dtype)))
    assert result.verdict == "consistent"
    assert result.certificate.float32 == "exact-any-chunk"


def test_a_fault_that_16_bits_hide_is_found_in_a_float32_copy():
    result = probe(as_model(Drowned().bfloat16()))
    assert result.verdict == "exact-step-only"
    assert "a copy of it in float32" in result.laws["splits"].counterexample


def test_a_fault_smaller_than_the_rounding_of_16_bits_does_not_count_against_them():
    class Rounding(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return logits, state.bfloat16().to(state.dtype)

    result = probe(as_model(Rounding().bfloat16()))
    assert (result.verdict, result.certificate.float32) == ("consistent", "inexact")


def test_a_state_that_is_rounded_to_bfloat16_is_caught_in_float32():
    class Rounding(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return logits, state.bfloat16().float()

    assert probe(as_model(Rounding())).verdict == "inexact"


def test_a_model_without_a_module_is_measured_against_its_own_noise():
    result = probe(as_model(Stepper()))
    assert result.certificate.reference == "full run, alone and as one of two rows"


def test_the_tolerance_belongs_to_the_arithmetic():
    reference = torch.log_softmax(torch.randn(50, 20, dtype=torch.float64), -1)
    noise = torch.full((50,), 1e-6)
    yardstick = Yardstick(reference, noise, torch.float32)
    assert yardstick.measure(reference + 1e-6 * torch.randn_like(reference)).share < 1
    assert yardstick.measure(reference + 1e-3 * torch.randn_like(reference)).share > 1
    coarse = Yardstick(reference, torch.full((50,), 1e-2), torch.bfloat16)
    assert coarse.measure(reference + 1e-3 * torch.randn_like(reference)).share < 1


def test_an_error_that_is_not_finite_is_infinite_and_a_shared_infinity_is_none():
    run = torch.tensor([[0.0, float("nan")], [0.0, float("-inf")], [0.0, float("-inf")]])
    reference = torch.tensor([[0.0, 0.0], [0.0, float("-inf")], [0.0, 1.0]])
    assert token_errors(run, reference).tolist() == [float("inf"), 0.0, float("inf")]


@settings(max_examples=200)
@given(cases(40, boundaries=(8,)))
def test_cases_are_cut_inside_their_length(case):
    assert 2 <= case.length <= 40
    assert sum(case.sizes) == case.length
    assert all(size > 0 for size in case.sizes)


def test_edge_cases_stand_at_the_borders():
    places = {case.cuts for case in edge_cases(100, boundaries=(8,))}
    assert {(1,), (7,), (8,), (9,), (63,), (64,), (65,), (99,)} <= places


def test_the_budget_is_kept_and_the_record_says_what_was_covered():
    few = probe(as_model(Functional()), budget=0.0)
    core = {"repeat", "causality", "prefix", "splits", "steps"}
    assert {name for name, law in few.laws.items() if law.cases == 1} == core
    assert set(few.certificate.untried) == few.laws.keys() - core
    assert "not tried, since the budget was used up: isolation, fork" in str(few)
    assert all(law.planned > 10 for law in few.laws.values())
    more = probe(as_model(Functional()), budget=60.0, examples=5)
    assert all(law.cases == law.planned > 5 for law in more.laws.values())


def test_a_model_draws_the_same_numbers_whenever_a_case_is_tried():
    class Dropping(Functional):
        def forward(self, input_ids, state=None):
            drawn.append(torch.rand(()).item())
            return super().forward(input_ids, state)

    drawn, tries = [], []
    for seed, harness in enumerate((Harness(as_model(Dropping())), Harness(as_model(Dropping())))):
        torch.default_generator.manual_seed(seed)  # what was drawn before does not matter
        drawn.clear()
        check("repeat", harness, Case(9, seed=3))
        tries.append(drawn[:])
    assert tries[0] == tries[1] != []


def test_a_noisy_model_is_not_accused_of_seeing_its_future_however_little_time_there_is():
    class Noisy(Functional):
        def forward(self, input_ids, past_key_values=None):
            logits, state = super().forward(input_ids, past_key_values)
            return logits + torch.randn(()), state

    result = probe(as_model(Noisy()), budget=0.0)
    assert result.verdict == "inexact"
    assert result.certificate.decisive == ["repeat"]


def test_a_result_comes_back_from_its_record():
    result = probe(as_model(Dropped()))
    again = restore(schema.convert(schema.to_plain(result.record), Record))
    assert (schema.to_plain(again.record), str(again)) == (schema.to_plain(result.record), str(result))


def test_the_probe_leaves_the_model_as_it_was():
    module = PortableStreaming()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    probe(as_model(module))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(("name", "verdict"), [("Llama", "exact-any-chunk"), ("Mamba", "exact-step-only")])
def test_transformers_models_get_the_verdict_they_deserve(name, verdict):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if name == "Llama":
        size |= {"num_attention_heads": 2, "intermediate_size": 48}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**size))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    result = probe(as_model(model))
    assert result.verdict == verdict, result


class Counting(Functional):
    """Knows how much it has read; what is wrong with it is said in `spoil`."""

    def forward(self, input_ids, state=None):
        hidden, seen = state or (None, 0)
        hidden = self.spoil(hidden, seen, input_ids.shape[1])
        logits, hidden = super().forward(input_ids, hidden)
        return logits, (hidden, seen + input_ids.shape[1])


class LosesItLate(Counting):
    def spoil(self, hidden, seen, t):
        return None if seen >= 130 and t > 1 else hidden


class LosesItAtOnePlace(Counting):
    def spoil(self, hidden, seen, t):
        return None if seen == 150 else hidden


class ForgetsFromSeventy(Counting):
    def spoil(self, hidden, seen, t):
        return hidden if seen < 70 else None


@pytest.mark.parametrize(
    ("model", "verdict"),
    [(LosesItLate, "exact-step-only"), (LosesItAtOnePlace, "exact-multiple-of-4"), (ForgetsFromSeventy, "inexact")],
)
def test_no_multiple_and_no_steps_are_trusted_where_they_were_not_tried(model, verdict):
    assert probe(as_model(model())).verdict == verdict


def test_a_module_without_reset_state_is_right_too():
    class NoReset(Functional):
        def __init__(self):
            super().__init__()
            self.held = None

        def get_state(self):
            return self.held

        def set_state(self, state):
            self.held = state

        def forward(self, input_ids):
            logits, self.held = super().forward(input_ids, self.held)
            return logits

    result = probe(as_model(NoReset()))
    assert result.verdict == "exact-any-chunk", result
    assert result.certificate.reference == "float64 run of the same weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_ruled_out_breaks_nothing(dtype):
    class Masked(Functional):
        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return torch.cat([torch.full_like(logits[..., :1], -torch.inf), logits[..., 1:]], -1), state

    assert probe(as_model(Masked().to(dtype))).certificate.broken == frozenset()


def test_a_model_of_two_precisions_is_judged_by_the_coarser():
    class Mixed(Functional):
        def __init__(self):
            super().__init__()
            self.cell.bfloat16()
            self.head.bfloat16()

        def forward(self, input_ids, state=None):
            kind = self.head.weight.dtype
            hidden, state = self.cell(self.embed(input_ids).to(kind), state)
            return self.head(hidden).float(), state

    result = probe(as_model(Mixed()))
    assert (result.verdict, result.certificate.dtype) == ("consistent", "bfloat16")


@pytest.mark.parametrize("single", [True, False])
def test_a_model_that_raises_at_some_lengths_gets_a_verdict_that_says_so(single):
    class Eights(Functional):
        def forward(self, input_ids, state=None):
            t = input_ids.shape[1]
            if t % 8 and (t > 1 if single else t > 8):
                raise ValueError("length must be a multiple of 8")
            return super().forward(input_ids, state)

    result = probe(as_model(Eights()))
    assert "raised ValueError" in str(result)


def test_a_slow_model_is_tried_on_the_laws_that_matter_and_no_longer():
    calls = []

    class Slow(Functional):
        def forward(self, input_ids, state=None):
            calls.append(input_ids.shape[1])
            time.sleep(0.05)
            return super().forward(input_ids, state)

    result = probe(as_model(Slow()), budget=0.5)
    assert len(calls) < 40
    assert result.laws["splits"].cases >= 1
    assert result.laws["rows"].unavailable or result.laws["rows"].cases


def test_a_state_that_keeps_its_input_is_seen_to_grow():
    class Views(Functional):
        constant_state = True

        def forward(self, input_ids, state=None):
            hidden, seen = state or (None, ())
            logits, hidden = super().forward(input_ids, hidden)
            return logits, (hidden, (*seen, input_ids))

    assert not probe(as_model(Views())).laws["size"].kept
