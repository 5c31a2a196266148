"""A fingerprint says who a model is: it follows from what the model is now, and never from who asked before."""

import copy
import gc
import importlib
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from reading import measure_perplexity
from tiny_models import VOCAB, Forgetful, Functional, GetSetState, Stepper
from torch import nn

from pytest_lmeval._benchmarking import Driver
from pytest_lmeval._session import Session, TestLog as Log
from pytest_lmeval.engine import policy_for
from pytest_lmeval.engine._state_rows import SELECTIONS, selection
from pytest_lmeval.laws._probe import replay
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.measures._latency import measure_latency
from pytest_lmeval.measures._latency_grid import measure_latency_grid
from pytest_lmeval.measures._throughput import measure_throughput
from pytest_lmeval.models import _identity as identity
from pytest_lmeval.models._identity import facts, fingerprint, weights_digest
from pytest_lmeval.models._model import Bytes, Codebooks, Model
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.models._weak_cache import WeakCache
from pytest_lmeval.scoring._requests import Encoder
from pytest_lmeval.tasks._questions import Choices, Task
from pytest_lmeval.training._plan import refuse_untrainable
from pytest_lmeval.training._protocol import Protocol

CONTEXTS = (None, 64, 256)


class Wide(Functional):
    """With a matrix of 8,000 elements and a buffer of 5,000: both are too large to be hashed whenever one asks."""

    def __init__(self) -> None:
        super().__init__(vocab=500)
        self.register_buffer("table", torch.arange(5000.0))


class Limited(Functional):
    """Reads 37 tokens and does not say so."""

    def forward(self, input_ids, state=None):
        hidden, seen = state or (None, 0)
        if seen + input_ids.shape[1] > 37:
            raise IndexError("no more positions")
        logits, hidden = super().forward(input_ids, hidden)
        return logits, (hidden, seen + input_ids.shape[1])


@dataclass(frozen=True, repr=False)
class Remembering(Model):
    """Wrong: a memo in the value, which `replace` shares with the next one."""

    memo: dict = field(default_factory=dict, compare=False)


def remembered(model):
    """Wrong: what the first value said of itself."""
    return model.memo.setdefault("fingerprint", fingerprint(model))


def remembering(source):
    return Remembering(**vars(as_model(source)))


def depends_on_the_order(ask, lm, order):
    """Whether values of one model that differ in a declared fact, asked in this order, say what others say of themselves that
    nobody has asked before."""
    values = [replace(lm, context_length=length) for length in CONTEXTS]
    for number in order:
        ask(values[number])
    expected = [fingerprint(replace(as_model(lm.source), context_length=length)) for length in CONTEXTS]
    return [ask(value) for value in values] != expected


# ---------------------------------------------------------------------------------- what is declared decides


@pytest.mark.parametrize("source", [Functional, Stepper])
@pytest.mark.parametrize("order", ["declared first", "replaced first"])
def test_a_fingerprint_does_not_depend_on_who_was_asked_first(source, order):
    lm = as_model(source())
    values = [lm, replace(lm, context_length=256)]
    first = [fingerprint(value) for value in (values if order == "declared first" else values[::-1])]
    assert first[0] != first[1]
    assert fingerprint(replace(lm, context_length=256)) == fingerprint(values[1]) != fingerprint(lm)


@pytest.mark.parametrize("source", [Functional, Stepper])
@given(order=st.lists(st.integers(0, len(CONTEXTS) - 1), max_size=6))
def test_no_order_of_asking_changes_an_answer(source, order):
    assert not depends_on_the_order(fingerprint, as_model(source()), order)


@pytest.mark.parametrize("order", [[0], [1], [2, 0]])
def test_this_test_can_fail(order):
    assert depends_on_the_order(remembered, remembering(Functional()), order)


@pytest.mark.parametrize(
    "declared",
    [
        {"form": "stateless"},
        {"vocab_size": VOCAB + 1},
        {"context_length": 1},
        {"codebooks": Codebooks((8, 8), (0, 1), (0, 0))},
    ],
    ids=str,
)
@pytest.mark.parametrize("source", [Functional, Stepper])
def test_every_declared_fact_is_part_of_it(source, declared):
    lm = as_model(source())
    others = [fingerprint(replace(lm, **declared)) for _ in range(2)]
    assert others[0] == others[1] != fingerprint(lm)


def test_frames_with_gaps_are_another_fact_than_frames_without():
    lms = [replace(as_model(Functional()), codebooks=Codebooks((8, 8), (0, 1), (0, 0), gaps=gaps)) for gaps in (False, True)]
    assert fingerprint(lms[0]) != fingerprint(lms[1])


def test_what_the_probe_found_and_what_a_model_is_called_are_not():
    lm = as_model(Functional())
    assert fingerprint(replace(lm, found_limit=37, spec="other")) == fingerprint(lm)


def test_a_model_holds_nothing_that_changes():
    lm = as_model(Functional())
    before = dict(vars(lm))
    facts(lm), fingerprint(lm), selection(lm)
    assert vars(lm) == before
    assert not [name for name, value in before.items() if isinstance(value, dict | list | set)]


# ------------------------------------------------------------------------------------- what it is now decides


def with_(changed):
    """The change of a module, made by a function of it."""

    def change(module):
        with torch.no_grad():
            changed(module)

    return change


CHANGES = {
    "a weight": with_(lambda module: module.head.bias[3].add_(1e-3)),
    "a weight of a large tensor": with_(lambda module: module.embed.weight[77, 3].add_(1e-3)),
    "a small tensor behind torch's back": with_(lambda module: module.head.bias.data[5].add_(1e-3)),
    "a large tensor behind torch's back": with_(lambda module: module.embed.weight.data.mul_(1.5)),
    "a tensor's data": with_(lambda module: setattr(module.embed.weight, "data", module.embed.weight + edge(module))),
    "a buffer": with_(lambda module: module.table[123].add_(1)),
    "another parameter": with_(
        lambda module: setattr(module.embed, "weight", nn.Parameter(module.embed.weight + edge(module)))
    ),
    "another buffer": with_(lambda module: setattr(module, "table", module.table.flip(0))),
    "a setting": with_(lambda module: setattr(module, "level", getattr(module, "level", 0) + 1)),
    "the precision": with_(
        lambda module: module.to(torch.float64 if module.head.weight.dtype == torch.float32 else torch.float32)
    ),
    "another part": with_(
        lambda module: setattr(module, "cell", copy.deepcopy(module.cell).requires_grad_(False).apply(larger))
    ),
}


def edge(module):
    """[500, 16], zero but for one element that no sample of 64 looks at."""
    found = torch.zeros_like(module.embed.weight)
    found[77, 3] = 1e-3
    return found


def larger(module):
    for parameter in module.parameters():
        parameter.mul_(1.25)


def anew(module):
    """The fingerprint of an equal module of which nothing is known yet."""
    return fingerprint(as_model(copy.deepcopy(module)))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_once(change):
    lm = as_model(Wide())
    before = fingerprint(lm)
    CHANGES[change](lm.module)
    assert before != fingerprint(lm) == anew(lm.module)


@given(steps=st.lists(st.sampled_from([*CHANGES, "ask", "ask"]), max_size=8))
def test_the_answer_is_always_that_of_hashing_anew(steps):
    module = Wide()
    lm = as_model(module)
    for step in steps:
        if step == "ask":
            fingerprint(lm)
        else:
            CHANGES[step](module)
    assert fingerprint(lm) == anew(module)


def test_a_new_storage_at_the_address_of_the_old_one_is_seen():
    lm, memory = as_model(Wide()), np.ones((500, 16), dtype=np.float32)
    lm.module.embed.weight.data = torch.from_numpy(memory)
    before = fingerprint(lm)
    memory[77, 3] = 2  # not counted by torch, and in no sample
    lm.module.embed.weight.data = torch.from_numpy(memory)
    assert fingerprint(lm) != before


def test_equal_models_have_equal_fingerprints():
    assert fingerprint(as_model(Wide())) == fingerprint(as_model(Wide()))
    assert fingerprint(as_model(Wide())) != fingerprint(as_model(Functional(vocab=500)))


def test_the_fingerprint_changes_with_one_weight():
    module = Functional()
    before = fingerprint(as_model(module))
    assert before == fingerprint(as_model(Functional()))
    with torch.no_grad():
        module.head.bias[3] += 1e-6
    assert before != fingerprint(as_model(module))


def test_the_fingerprint_of_a_large_tensor_sees_every_element(monkeypatch):
    monkeypatch.setattr("pytest_lmeval.models._identity.SMALL", 16)
    module = Functional()
    before = fingerprint(as_model(module))
    with torch.no_grad():
        module.embed.weight[VOCAB - 1, 15] += 0.5
    assert before != fingerprint(as_model(module))


def test_a_change_behind_torchs_back_is_noticed():
    module = Functional()
    lm = as_model(module)
    before = fingerprint(lm)
    assert fingerprint(lm) == before
    for parameter in module.parameters():
        parameter.data.mul_(2)
    assert fingerprint(lm) != before


def test_the_fingerprint_changes_with_the_form():
    assert fingerprint(as_model(Functional())) != fingerprint(as_model(GetSetState()))


@pytest.mark.parametrize("change", ["a setting", "an inner class"])
def test_the_fingerprint_changes_with_what_is_no_weight(change, tmp_path, monkeypatch):
    (tmp_path / "inner.py").write_text("from torch import nn\nclass Scale(nn.Identity):\n    by = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "inner", raising=False)
    import inner

    module = Functional()
    module.scale, module.mode = inner.Scale(), "forget"
    before = fingerprint(as_model(module))
    if change == "a setting":
        module.mode = "remember"
    else:
        (tmp_path / "inner.py").write_text("from torch import nn\nclass Scale(nn.Identity):\n    by = 2\n")
        module = Functional()
        module.scale, module.mode = inner.Scale(), "forget"
    assert fingerprint(as_model(module)) != before


def test_an_object_without_a_module_is_known_by_its_own_fingerprint_or_not_at_all():
    assert fingerprint(as_model(Stepper())) != fingerprint(as_model(Stepper()))
    first, second = Stepper(), Stepper()
    first.fingerprint = second.fingerprint = "v1"
    assert fingerprint(as_model(first)) == fingerprint(as_model(second))


def test_weights_made_in_inference_mode_have_a_fingerprint():
    with torch.inference_mode():
        module = Functional()
    assert len(fingerprint(as_model(module))) == 16


def test_an_edited_and_reloaded_module_has_another_fingerprint(tmp_path, monkeypatch):
    file = tmp_path / "edited.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for by in (1, 2, 1):  # at the same size, and within the clock of the file system
        file.write_text(
            f"from tiny_models import Functional\nclass Scaled(Functional):\n    def by(self):\n        return {by}\n"
        )
        importlib.invalidate_caches()
        edited = importlib.reload(sys.modules["edited"]) if found else importlib.import_module("edited")
        found.append(fingerprint(as_model(edited.Scaled())))
    monkeypatch.delitem(sys.modules, "edited")
    assert found[0] == found[2] != found[1]


class Warms(Functional):
    """Notes that it was called, and how much it has read at once."""

    warm, longest = False, 0

    def forward(self, input_ids, state=None):
        self.warm, self.longest = True, max(self.longest, input_ids.shape[1])
        return super().forward(input_ids, state)


class WarmsInside(GetSetState):
    longest = 0

    def forward(self, input_ids):
        self.longest = max(self.longest, input_ids.shape[1])
        return super().forward(input_ids)


@pytest.mark.parametrize("source", [Warms, WarmsInside])
@pytest.mark.parametrize("form", ["found", "given"])
def test_a_module_that_was_adapted_and_read_before_is_the_same_model(source, form):
    module = source()
    lm = as_model(module)
    before = fingerprint(lm)
    lm.step(torch.arange(9)[None])
    again = as_model(module, form=lm.form if form == "given" else None)
    assert fingerprint(again) == before == fingerprint(as_model(source(), form=again.form))


def test_looking_for_the_form_of_a_module_in_train_mode_does_not_change_it():
    class Normed(Functional):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(VOCAB)

        def forward(self, input_ids, state=None):
            logits, state = super().forward(input_ids, state)
            return self.norm(logits.transpose(1, 2)).transpose(1, 2), state

    lm = as_model(Normed())
    assert lm.module.norm.num_batches_tracked == 0
    assert fingerprint(lm) == fingerprint(as_model(Normed().eval()))


# ------------------------------------------------------------------------------------------ and it is asked often


@pytest.fixture
def hashed(monkeypatch):
    """Elements of each large tensor that was hashed."""
    sizes, digest = [], identity._digest

    def counted(tensor):
        if tensor.numel() > identity.ALWAYS_HASHED:
            sizes.append(tensor.numel())
        return digest(tensor)

    monkeypatch.setattr(identity, "_digest", counted)
    return sizes


def test_large_tensors_are_hashed_again_only_when_they_have_changed(hashed):
    lm = as_model(Wide())
    fingerprint(lm)
    assert sorted(hashed) == [5000, 8000, 8000]  # table, embedding and head
    for other in (lm, replace(lm, context_length=3), as_model(lm.module)):
        fingerprint(other), facts(other)
    assert len(hashed) == 3
    with torch.no_grad():
        lm.module.table[0] = 7
    fingerprint(lm)
    assert hashed[3:] == [5000]


def test_a_law_that_asks_for_changed_weights_hashes_them_anew(hashed):
    lm = as_model(Wide())
    before = weights_digest(lm)
    lm.module.embed.weight.data[77, 3] += 1e-3  # not counted by torch, and in no sample
    assert weights_digest(lm) != before
    assert len(hashed) == 6


def test_a_tensor_whose_changes_torch_does_not_count_is_always_hashed_anew():
    with torch.inference_mode():
        lm = as_model(Wide())
        before = fingerprint(lm)
        lm.module.embed.weight[77, 3] += 1e-3
        assert fingerprint(lm) != before


def test_what_is_known_of_a_model_goes_with_it():
    caches = (identity.DIGESTS, identity.PRECISIONS, identity.IDENTITIES, SELECTIONS)
    gc.collect()
    before = [len(cache) for cache in caches]
    lms = [as_model(Wide()), as_model(Stepper())]
    for lm in lms:
        facts(lm), selection(lm)
    assert [len(cache) - count for cache, count in zip(caches, before, strict=True)] == [3, 1, 1, 2]
    del lm, lms
    gc.collect()
    assert [len(cache) for cache in caches] == before


def test_what_a_record_says_of_a_model_is_its_own():
    lm = as_model(Functional())
    facts(lm).precision.kept["fp64"] = 1
    assert facts(lm).precision.kept == {}


def test_the_precision_is_that_of_the_module_and_of_its_weights_now():
    lm = as_model(Functional())
    assert facts(lm).precision.name == "fp32"
    assert facts(replace(lm, module=Functional().bfloat16())).precision.name == "bf16"
    assert facts(replace(lm, bytes_before=8)).precision.bytes_before == 8
    assert facts(lm).precision.bytes_before is None
    lm.module.double()
    assert facts(lm).precision.name == "fp64"


def test_rows_are_tried_once_for_a_loaded_model():
    class Counted(Functional):
        _calls = 0

        def forward(self, input_ids, state=None):
            self._calls += 1
            if not getattr(self, "numbered", False):
                return super().forward(input_ids, state)
            return super().forward(input_ids)[0], [len(input_ids)]  # a number in its state grows with the rows

    lm = as_model(Counted())
    found = selection(lm)
    calls = lm.module._calls
    assert selection(replace(lm, spec="the same", found_limit=9)) is found is not None
    assert lm.module._calls == calls
    numbered = replace(lm, step_fn=lambda ids, state, keep: (lm.step_fn(ids, None, keep)[0], [len(ids)]))
    assert selection(numbered) is None
    assert selection(lm) is found
    assert selection(replace(lm, stateful=False)) is None
    lm.module.numbered = True
    assert selection(lm) is None


# ------------------------------------------------------------------------------------- objects that are no module


class Bare:
    """Cannot be weakly referenced."""

    __slots__ = ("model",)

    def __init__(self):
        self.model = Functional()

    def step(self, input_ids, state=None):
        with torch.no_grad():
            return self.model(input_ids, state)


class Alike(Stepper):
    """All of them are equal, and none can be hashed."""

    def __eq__(self, other):
        return True

    __hash__ = None


@pytest.mark.parametrize("source", [Stepper, Bare, Alike])
def test_an_object_is_one_model_as_long_as_it_lives(source):
    one, other = source(), source()
    assert fingerprint(as_model(one)) == fingerprint(as_model(one)) != fingerprint(as_model(other))
    assert fingerprint(replace(as_model(one), context_length=4)) != fingerprint(as_model(one))


def test_a_step_without_an_object_is_one_model_as_well():
    lm = as_model(Stepper())
    alone = Model(lm.step_fn, "alone", "step", True, VOCAB)
    assert fingerprint(alone) == fingerprint(replace(alone, spec="other"))
    assert fingerprint(alone) != fingerprint(replace(alone, step_fn=as_model(Stepper()).step_fn))


def test_a_cache_knows_objects_by_themselves():
    cache, owners = WeakCache(), [Alike(), Alike(), Bare()]
    found = [cache.value(owner, object) for owner in owners]
    assert len(set(found)) == 3
    assert [cache.value(owner, object) for owner in owners] == found
    assert (Alike() in cache, owners[0] in cache, owners[2] in cache) == (False, True, True)
    del owners[0]
    gc.collect()
    assert len(cache) == 2


# ------------------------------------------------------------------------------------------- a limit that was found


@pytest.fixture
def desk(tmp_path):
    return VerbContext(Session(tmp_path, budget=0.1), Log("test_it"), Driver(None))


def test_a_limit_that_the_probe_found_is_not_part_of_who_a_model_is(desk):
    module = Limited()
    plain = desk.model(module)
    certified, _ = desk.certified(module)
    assert (certified.limit, certified.context_length, plain.limit) == (37, None, None)
    probed = desk.session.verdict(plain).record
    read = measure_perplexity(certified, torch.arange(100) % VOCAB).record
    assert probed.lm.fingerprint == read.lm.fingerprint == fingerprint(plain)
    assert desk.session.verdict(certified).record is probed
    replay(certified, "splits", length=8, cuts=(4,))  # not on a sequence that it cannot read


def test_another_value_of_a_model_is_not_probed_again(desk):
    lm = as_model(Stepper())
    assert desk.session.verdict(lm) is desk.session.verdict(replace(lm, spec="other"))


def test_a_limit_decides_what_is_measured_so_it_is_in_every_key(desk):
    lm = as_model(Functional())
    limits = [lm, replace(lm, found_limit=37), replace(lm, found_limit=38), replace(lm, context_length=37)]
    assert len({desk.key("perplexity", one, {}) for one in limits}) == 4
    task = Task("t", [{}], lambda row: Choices("a", ("b", "c"), 0))
    spoken = [replace(one, tokenizer=Bytes()) for one in limits]
    asked = [Encoder(one, task).encode(task.ask({}), "", id="0", number=0).key for one in spoken]
    assert len(set(asked)) == 4


def test_what_ends_an_answer_is_part_of_what_was_asked():
    class Ends(Bytes):
        def __init__(self, *ends):
            self.ends = ends

    task = Task("t", [{}], lambda row: Choices("a", ("b", "c"), 0))
    lms = [replace(as_model(Functional()), tokenizer=Ends(*ends)) for ends in ((), (1,), (1, 2))]
    assert len({Encoder(lm, task).encode(task.ask({}), "", id="0", number=0).key for lm in lms}) == 3


def test_a_found_limit_is_kept_to_as_a_declared_one_is(desk):
    task = Task("t", [{}], lambda row: Choices("a" * 40, ("b", "c"), 0))
    inexact = desk.session.verdict(as_model(Forgetful())).certificate
    lms = [replace(as_model(Functional()), **limit) for limit in ({"context_length": 24}, {"found_limit": 24})]
    policies = [[policy_for(lm), policy_for(lm, window="lm_eval"), policy_for(replace(lm, stateful=False))] for lm in lms]
    assert policies[0] == policies[1]
    assert [policy.windows.size for policy in policies[0]] == [24, 24, 24]
    for lm in lms:
        with pytest.raises(ValueError, match="reads at most 24 tokens"):
            measure_latency(lm, seq_len=25, runs=1)
        with pytest.raises(ValueError, match=r"seq_len=25 is more than .* reads: at most 24 tokens"):
            refuse_untrainable(lm, Protocol(seq_len=25))
        speed = measure_throughput(lm, batch_size=1, seq_len=20, runs=1, warm_up=0, new_tokens=9, scaling=False)
        assert len(speed.samples["decode"]) in (0, 3)  # none where the clock is too coarse
        assert policy_for(lm, inexact, window="lm_eval").chunk_size == 24
        assert Encoder(replace(lm, tokenizer=Bytes()), task).encode(task.ask({}), "", id="0", number=0).truncated == 41 - 25
        grid = measure_latency_grid(lm, seq_lens=(4, 30), runs=1, warm_up=0, new_tokens=25)
        assert [*grid.failed] == [(1, 4), (1, 30)]  # each says why, and the whole grid is not refused


def test_a_declared_limit_goes_before_a_found_one():
    lm = replace(as_model(Functional()), found_limit=24)
    assert (lm.limit, replace(lm, context_length=48).limit, replace(lm, found_limit=None).limit) == (24, 48, None)
