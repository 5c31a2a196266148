"""The probe gives a correct model its verdict, names what is wrong with others, and leaves both as they were."""

import pytest
import torch
from hypothesis import given, settings
from probing import failure, first_failure, probed
from tiny_models import (
    CARRYING,
    Broken,
    Changed,
    Dropped,
    Drowned,
    Fragile,
    Functional,
    GetSetState,
    PortableStreaming,
    Stateless,
    Stepper,
    Streaming,
)

from pytest_lmeval.errors import ModelError, NotFiniteError
from pytest_lmeval.laws import LAWS, Case, Harness, cases, check, edge_cases, probe
from pytest_lmeval.laws._probe import EquivalenceResult
from pytest_lmeval.laws._run_probe import verdict_of
from pytest_lmeval.laws._tolerance import Reference, token_errors
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._measured import Record


@pytest.fixture(scope="module")
def dropped():
    return probed(Dropped())


@pytest.mark.parametrize("kind", CARRYING)
def test_a_model_that_carries_its_state_is_exact_for_any_chunk(kind):
    result = probed(kind(), examples=5)
    assert result.verdict == "exact-any-chunk", result
    assert result.certificate.worst_ratio < 8


def test_a_model_without_a_state_is_stateless():
    result = probed(Stateless())
    assert result.verdict == "stateless"
    assert set(result.laws) == {"repeat", "isolation", "causality", "prefix", "rows", "sums"}


def test_the_demo_is_exact_beyond_its_window():
    result = probe(load("demo"), budget=1000)
    assert result.verdict == "exact-any-chunk", result
    assert result.certificate.longest == 2 * 256 + 1
    assert result.certificate.not_reached == ()
    assert result.laws["splits"].longest == result.certificate.longest


@pytest.mark.thorough
def test_the_demo_keeps_every_law_beyond_its_window():
    harness = Harness(load("demo"), 3 * 256 + 7)
    for case in edge_cases(harness.longest, (256,))[:2]:
        assert [law for law, one in LAWS.items() if one.applies_to(harness.lm) and failure(law, harness, case)] == []


def test_a_boundary_beyond_the_longest_sequence_is_reported():
    result = probe(load("demo"), budget=1000, longest=16)
    assert result.certificate.not_reached == (256,)
    assert "boundaries not reached: 256 tokens; set longest=" in str(result)


def test_a_law_that_does_not_apply_says_why_and_is_not_counted():
    class SingleRow(Stepper):
        def step(self, input_ids, state=None):
            return super().step(input_ids[:1], state)

    result = probed(SingleRow())
    rows = result.laws["rows"]
    assert (rows.status, rows.kept, rows.cases) == ("not applicable", False, 0)
    assert "does not read 2 rows at once" in rows.unavailable
    assert (result.verdict, result.certificate.coverage) == ("exact-any-chunk", "10 of 10 laws, up to 320 tokens")
    assert result.record.metrics["laws_kept"].unit == "of 10"
    fork = probed(Streaming()).laws["fork"]
    assert "cannot be forked" in fork.unavailable


def test_a_model_that_fails_on_batches_in_some_shapes_only_breaks_the_law():
    class SometimesSingle(Functional):
        def forward(self, input_ids, state=None):
            if input_ids.shape == (2, 1):
                raise IndexError("one token of two rows")
            return super().forward(input_ids, state)

    law = probed(SometimesSingle()).laws["rows"]
    assert not law.kept
    assert "one token of two rows" in law.counterexample


class InBuffer(GetSetState):
    def __init__(self):
        super().__init__()
        del self.held
        self.register_buffer("held", torch.zeros(1, 1, 16))

    def reset_state(self):
        self.held = torch.zeros(1, 1, 16)

    def set_state(self, state):
        self.held = state


class NoReset(Functional):
    held = None

    def get_state(self):
        return self.held

    def set_state(self, state):
        self.held = state

    def forward(self, input_ids):
        logits, self.held = super().forward(input_ids, self.held)
        return logits


@pytest.mark.parametrize(
    ("kind", "reference"),
    [(InBuffer, "full run, alone and as one of two rows"), (NoReset, "float64 run of the same weights")],
)
def test_a_module_that_holds_its_state_in_a_buffer_or_has_no_reset_is_exact(kind, reference):
    result = probed(kind())
    assert result.verdict == "exact-any-chunk", result
    assert result.certificate.reference == reference


def test_logits_that_are_not_finite_are_reported_with_their_position():
    with pytest.raises(NotFiniteError, match=r"gave logits that are not finite at token \d+ of"):
        probed(Broken())


def test_a_counterexample_is_small_and_says_what_happened(dropped):
    small = dropped.laws["splits"].counterexamples[0]
    assert small.case["length"] <= 8
    assert len(small.case["cuts"]) == 1
    assert "log-probabilities off by" in str(dropped)
    assert "fades out: a state that forgets" in str(dropped)


def test_a_result_is_restored_from_its_record(dropped):
    again = EquivalenceResult(schema.convert(schema.to_plain(dropped.record), Record))
    assert (schema.to_plain(again.record), str(again)) == (schema.to_plain(dropped.record), str(dropped))


@pytest.mark.parametrize(
    "noise",
    [lambda logits: logits + 1e-4 * torch.rand_like(logits), lambda logits: torch.nn.functional.dropout(logits, 0.1)],
)
def test_a_model_that_is_not_deterministic_is_reported(noise):
    result = probed(Changed(lambda logits, state: (noise(logits), state)))
    assert result.verdict == "inexact"
    assert result.certificate.decisive == ["repeat", "isolation"]
    assert "not deterministic" in str(result)


def test_a_module_in_train_mode_is_refused_with_the_names_of_its_parts():
    lm = as_model(Functional())
    lm.module.cell.train()
    with pytest.raises(ModelError, match=r"is in train mode \(1 of its parts: cell\).*eval\(\)"):
        probe(lm)


def test_a_module_in_train_mode_inside_a_plain_object_is_named_if_it_matters():
    class Wrapped(Stepper):
        def __init__(self):
            super().__init__()
            self.model.train()
            self.dropout = torch.nn.Dropout(0.2)

        def step(self, input_ids, state=None):
            logits, state = super().step(input_ids, state)
            return self.dropout(logits), state

    assert "in train mode (Functional): call its eval()" in str(failure("repeat", Harness(as_model(Wrapped())), Case(8)))


def test_a_model_on_two_devices_is_refused_with_both():
    model = Functional()
    model.head = torch.nn.Linear(16, 32, device="meta")
    with pytest.raises(ModelError, match=r"on several devices: \d tensors on cpu, 2 tensors on meta"):
        as_model(model)


def limited(seen, t):
    if seen + t > 37:
        raise IndexError("index out of range in self")


def test_an_undeclared_limit_is_found_and_reported():
    certificate = probed(Fragile(limited)).certificate
    assert (certificate.limit_tokens, certificate.limit_is_step) == (37, False)
    assert certificate.verdict == "exact-any-chunk"
    assert "at most 37 tokens in one call: it raised IndexError when it read 38" in certificate.limit


def test_a_declared_limit_is_respected():
    model = Fragile(limited)
    model.context_length = 37
    certificate = probed(model).certificate
    assert (certificate.verdict, certificate.limit, certificate.longest) == ("exact-any-chunk", None, 37)


def test_a_limit_of_one_step_is_told_from_one_of_the_sequence():
    def limited_step(seen, t):
        assert t <= 20, "n_seq"

    certificate = probed(Fragile(limited_step)).certificate
    assert (certificate.limit_tokens, certificate.limit_is_step) == (20, True)


def test_a_model_that_refuses_to_continue_in_chunks_is_exact_in_steps():
    def single(seen, t):
        if seen and t > 1:
            raise ValueError("only supports a single new token per step")

    result = probed(Fragile(single))
    assert result.verdict == "exact-step-only"
    assert "it raised ValueError when it read" in result.laws["splits"].counterexample


@pytest.mark.parametrize("shortest", [2, 9])
def test_a_model_that_raises_at_some_lengths_gets_a_verdict_that_says_so(shortest):
    def eights(seen, t):
        if t % 8 and t >= shortest:
            raise ValueError("length must be a multiple of 8")

    assert "raised ValueError" in str(probed(Fragile(eights)))


def test_a_model_that_cannot_be_copied_is_compared_with_its_own_noise():
    class Uncopyable(Functional):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle")

    for model in (Uncopyable(), Stepper()):
        result = probed(model)
        assert result.verdict == "exact-any-chunk"
        assert result.certificate.reference == "full run, alone and as one of two rows"


def test_the_probe_leaves_the_weights_and_the_random_numbers_as_they_were():
    module = PortableStreaming()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    profile = settings.default
    probed(module, profile="dev")
    assert torch.equal(torch.rand(1), expected)
    assert settings.default is profile
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_an_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="no profile 'nonsense'"):
        probe(as_model(Functional()), profile="nonsense")


@pytest.mark.parametrize(("declared", "kept"), [(True, False), (False, True)])
def test_a_state_that_grows_breaks_a_law_only_if_it_was_declared_constant(declared, kept):
    class Hoarding(Functional):
        constant_state = declared

        def forward(self, input_ids, state=None):
            hidden, seen = state or (None, input_ids[:, :0])
            logits, hidden = super().forward(input_ids, hidden)
            return logits, (hidden, torch.cat([seen, input_ids], 1))

    result = probed(Hoarding())
    assert result.laws["size"].kept is kept
    assert result.certificate.state.bytes_per_token == 8
    assert result.certificate.state.dtypes == ("float32", "int64")


def test_a_state_that_keeps_its_input_grows():
    class Views(Functional):
        constant_state = True

        def forward(self, input_ids, state=None):
            hidden, seen = state or (None, ())
            logits, hidden = super().forward(input_ids, hidden)
            return logits, (hidden, (*seen, input_ids))

    assert failure("size", Harness(as_model(Views())), Case(8))


def test_a_state_that_is_partly_kept_in_the_model_cannot_be_resumed():
    class HalfOutside(Functional):
        def forward(self, input_ids, state=None):
            if state is None:
                self.bias = torch.tanh(self.embed.weight[input_ids[:, 0]]).sum(-1)[:, None, None]
            elif not hasattr(self, "bias"):
                self.bias = torch.zeros(1, 1, 1)
            logits, state = super().forward(input_ids, state)
            return torch.cat([logits[..., :1] + self.bias, logits[..., 1:]], -1), state

    assert "A part of its state is not in the state" in str(first_failure(["resume"], Harness(as_model(HalfOutside()))))


def test_a_model_that_keeps_the_wrong_positions_breaks_the_sums():
    class FirstInstead(Stepper):
        def step(self, input_ids, state=None, keep=None):
            logits, state = super().step(input_ids, state)
            return logits if keep is None else logits[:, :keep], state

    result = probed(FirstInstead())
    assert result.certificate.broken == {"sums"}
    assert "scored with another's logits" in str(result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_consistent_and_never_proven(dtype):
    result = probed(Functional().to(dtype))
    assert result.verdict == "consistent"
    assert result.certificate.float32 == "exact-any-chunk"


def test_a_fault_that_16_bits_hide_is_found_in_a_float32_copy():
    result = probed(Drowned().bfloat16())
    assert result.verdict == "exact-step-only"
    assert "a copy of it in float32" in result.laws["splits"].counterexample


@pytest.mark.parametrize(
    ("dtype", "verdicts"), [(torch.bfloat16, ("consistent", "inexact")), (torch.float32, ("inexact", None))]
)
def test_a_rounded_state_counts_only_against_a_model_that_is_less_rounded_itself(dtype, verdicts):
    result = probed(Changed(lambda logits, state: (logits, state.bfloat16().to(state.dtype))).to(dtype))
    assert (result.verdict, result.certificate.float32) == verdicts


def test_a_model_of_two_precisions_is_judged_by_the_coarser():
    class Mixed(Functional):
        def __init__(self):
            super().__init__()
            self.cell.bfloat16()
            self.head.bfloat16()

        def forward(self, input_ids, state=None):
            hidden, state = self.cell(self.embed(input_ids).to(self.head.weight.dtype), state)
            return self.head(hidden).float(), state

    result = probed(Mixed())
    assert (result.verdict, result.certificate.dtype) == ("consistent", "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_ruled_out_breaks_nothing(dtype):
    def masked(logits, state):
        return torch.cat([torch.full_like(logits[..., :1], -torch.inf), logits[..., 1:]], -1), state

    assert probed(Changed(masked).to(dtype)).certificate.broken == frozenset()


def test_the_tolerance_follows_the_precision():
    expected = torch.log_softmax(torch.randn(50, 20, dtype=torch.float64), -1)
    fine = Reference(expected, torch.full((50,), 1e-6), torch.float32)
    coarse = Reference(expected, torch.full((50,), 1e-2), torch.bfloat16)
    small, large = (expected + size * torch.randn_like(expected) for size in (1e-6, 1e-3))
    assert fine.measure(small).tolerance_ratio < 1 < fine.measure(large).tolerance_ratio
    assert coarse.measure(large).tolerance_ratio < 1


def test_an_error_is_infinite_where_only_one_of_two_runs_is_finite():
    run = torch.tensor([[0.0, float("nan")], [0.0, float("-inf")], [0.0, float("-inf")]])
    expected = torch.tensor([[0.0, 0.0], [0.0, float("-inf")], [0.0, 1.0]])
    assert token_errors(run, expected).tolist() == [float("inf"), 0.0, float("inf")]


@settings(max_examples=200)
@given(cases(40, boundaries=(8,)))
def test_cases_are_cut_inside_their_length(case):
    assert 2 <= case.length <= 40
    assert sum(case.sizes) == case.length
    assert all(size > 0 for size in case.sizes)


def test_edge_cases_are_cut_at_the_boundaries_and_beside_them():
    cuts = {case.cuts for case in edge_cases(100, boundaries=(8,))}
    assert {(1,), (7,), (8,), (9,), (63,), (64,), (65,), (99,)} <= cuts


def test_a_noisy_model_is_not_accused_of_seeing_its_future():
    result = probe(as_model(Changed(lambda logits, state: (logits + torch.randn(()), state))), budget=1)
    assert result.verdict == "inexact"
    assert "repeat" in result.certificate.decisive


def test_a_model_draws_the_same_numbers_whenever_a_case_is_tried():
    def draw(logits, state):
        drawn.append(torch.rand(()).item())
        return logits, state

    drawn, tries = [], []
    for seed in range(2):
        harness = Harness(as_model(Changed(draw)))
        torch.default_generator.manual_seed(seed)  # the numbers drawn before do not matter
        drawn.clear()
        check("repeat", harness, Case(9, seed=3))
        tries.append(drawn[:])
    assert tries[0] == tries[1] != []


@pytest.mark.parametrize(("name", "verdict"), [("Llama", "exact-any-chunk"), ("Mamba", "exact-step-only")])
def test_transformers_models_get_their_verdict(name, verdict):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    size |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "Llama":
        size |= {"num_attention_heads": 2, "intermediate_size": 48}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**size))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    result = probed(model)
    assert result.verdict == verdict, result


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        (lambda seen, t: seen >= 130 and t > 1, "exact-step-only"),
        (lambda seen, t: seen == 150, "exact-multiple-of-4"),
        (lambda seen, t: seen >= 70, "inexact"),
        (lambda seen, t: t > 1 and 10 <= seen < 60 and seen % 5, "exact-multiple-of-64"),
    ],
)
def test_no_multiple_and_no_steps_are_trusted_beyond_the_cases_tried(wrong, verdict):
    assert probed(Fragile(wrong), budget=None, examples=None).verdict == verdict


@pytest.mark.parametrize(
    ("broken", "verdict"),
    [
        ({"repeat", "causality"}, "inexact"),
        ({"causality", "prefix"}, "non-causal"),
        ({"prefix", "splits"}, "length-dependent"),
        ({"rows"}, "inexact"),
        ({"steps"}, "inexact"),
        ({"splits", "steps"}, "inexact"),
        ({"splits"}, "exact-step-only"),
        (set(), "exact-any-chunk"),
    ],
)
def test_the_broken_laws_decide_the_verdict(broken, verdict):
    assert verdict_of(frozenset(broken), stateful=True, dtype="float32") == verdict
