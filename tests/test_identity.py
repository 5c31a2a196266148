"""A fingerprint depends on the present content of a model only, never on what was asked before."""

import copy
import gc
import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import measure_perplexity
from tiny_models import VOCAB, Forgetful, Functional, GetSetState, Stepper
from torch import nn

from pytest_lmeval._benchmarking import Driver
from pytest_lmeval._session import Session, TestLog as Log
from pytest_lmeval.engine import policy_for
from pytest_lmeval.engine._state_rows import SELECTIONS, selection
from pytest_lmeval.laws._probe import replay
from pytest_lmeval.measures._context import VerbContext, running_in
from pytest_lmeval.measures._equivalence import equivalence
from pytest_lmeval.measures._latency import measure_latency
from pytest_lmeval.measures._latency_grid import measure_latency_grid
from pytest_lmeval.measures._throughput import measure_throughput
from pytest_lmeval.models import _identity as identity
from pytest_lmeval.models._identity import facts, fingerprint, weights_digest
from pytest_lmeval.models._model import Bytes, Codebooks, Model
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.models._weak_cache import WeakCache
from pytest_lmeval.records._measured import ModelFacts, Record
from pytest_lmeval.scoring._requests import Encoder
from pytest_lmeval.tasks._questions import Choices
from pytest_lmeval.tasks._task import Task
from pytest_lmeval.training._plan import refuse_untrainable
from pytest_lmeval.training._protocol import Protocol


class Wide(Functional):
    """Has a matrix of 8,000 elements and a buffer of 5,000, whose hashes are cached."""

    def __init__(self) -> None:
        super().__init__(vocab=500)
        self.register_buffer("table", torch.arange(5000.0))


class Limited(Functional):
    """Reads at most 37 tokens, undeclared."""

    def forward(self, input_ids, state=None):
        hidden, seen = state or (None, 0)
        if seen + input_ids.shape[1] > 37:
            raise IndexError("no more positions")
        logits, hidden = super().forward(input_ids, hidden)
        return logits, (hidden, seen + input_ids.shape[1])


# ---------------------------------------------------------------------------------- declared facts


@pytest.mark.parametrize("source", [Functional, Stepper])
@settings(max_examples=12)
@given(order=st.lists(st.integers(0, 2), max_size=6))
def test_a_fingerprint_does_not_depend_on_earlier_ones(source, order):
    one = source()
    values, new = ([replace(as_model(one), context_length=length) for length in (None, 64, 256)] for _ in range(2))
    for number in order:
        fingerprint(values[number])
    assert list(map(fingerprint, values)) == list(map(fingerprint, new))


@pytest.mark.parametrize("source", [Functional, Stepper])
def test_every_declared_fact_changes_the_fingerprint(source):
    lm, books = as_model(source()), Codebooks((8, 8), (0, 1), (0, 0))
    facts = [{}, {"form": "stateless"}, {"vocab_size": VOCAB + 1}, {"context_length": 1}]
    facts += [{"codebooks": books}, {"codebooks": replace(books, gaps=True)}]
    found = [fingerprint(replace(lm, **declared)) for declared in facts]
    assert found == [fingerprint(replace(lm, **declared)) for declared in facts]
    assert len(set(found)) == len(facts)


def test_the_spec_and_a_found_limit_do_not_and_a_model_has_no_mutable_fields():
    lm = as_model(Functional())
    assert fingerprint(replace(lm, found_limit=37, spec="other")) == fingerprint(lm)
    before = dict(vars(lm))
    facts(lm), fingerprint(lm), selection(lm)
    assert vars(lm) == before
    assert not [name for name, value in before.items() if isinstance(value, dict | list | set)]


# ------------------------------------------------------------------------------------- content


CHANGES = {
    "a weight": lambda module: module.head.bias[3].add_(1e-3),
    "a weight of a large tensor": lambda module: module.embed.weight[77, 3].add_(1e-3),
    "a small tensor through .data": lambda module: module.head.bias.data[5].add_(1e-3),
    "a large tensor through .data": lambda module: module.embed.weight.data.mul_(1.5),
    "the storage of a tensor": lambda module: setattr(module.embed.weight, "data", module.embed.weight + edge(module)),
    "a buffer": lambda module: module.table[123].add_(1),
    "another parameter": lambda module: setattr(module.embed, "weight", nn.Parameter(module.embed.weight + edge(module))),
    "another buffer": lambda module: setattr(module, "table", module.table.flip(0)),
    "a setting": lambda module: setattr(module, "level", getattr(module, "level", 0) + 1),
    "the precision": lambda module: module.to(torch.float64 if module.head.weight.dtype == torch.float32 else torch.float32),
    "another submodule": lambda module: setattr(module, "cell", nn.GRU(16, 16, batch_first=True).eval().to(edge(module))),
}


def edge(module):
    """[500, 16], zero except for one element that is not in the sample of 64."""
    found = torch.zeros_like(module.embed.weight)
    found[77, 3] = 1e-3
    return found


def uncached(module):
    """The fingerprint of a copy, of which nothing is cached."""
    return fingerprint(as_model(copy.deepcopy(module)))


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_seen(what):
    lm = as_model(Wide())
    before = fingerprint(lm)
    with torch.no_grad():
        CHANGES[what](lm.module)
    assert before != fingerprint(lm) == uncached(lm.module)


@settings(max_examples=25)
@given(steps=st.lists(st.sampled_from([*CHANGES, "ask", "ask"]), max_size=8))
def test_a_cached_fingerprint_equals_an_uncached_one(steps):
    module = Wide()
    lm = as_model(module)
    for step in steps:
        with torch.no_grad():
            fingerprint(lm) if step == "ask" else CHANGES[step](module)
    assert fingerprint(lm) == uncached(module)


def test_a_new_storage_at_the_old_address_is_seen():
    lm, memory = as_model(Wide()), np.ones((500, 16), dtype=np.float32)
    lm.module.embed.weight.data = torch.from_numpy(memory)
    before = fingerprint(lm)
    memory[77, 3] = 2  # not counted by torch, and not in the sample
    lm.module.embed.weight.data = torch.from_numpy(memory)
    assert fingerprint(lm) != before


def test_equal_models_have_equal_fingerprints():
    assert fingerprint(as_model(Wide())) == fingerprint(as_model(Wide()))
    assert fingerprint(as_model(Wide())) != fingerprint(as_model(Functional(vocab=500)))
    assert fingerprint(as_model(Functional())) != fingerprint(as_model(GetSetState()))


def test_of_a_very_large_tensor_every_element_counts():
    module = Functional()
    module.register_buffer("huge", torch.zeros(2 * identity.SMALL))
    before = fingerprint(as_model(module))
    module.huge[1] += 0.5  # every second element is in the sample
    assert before != fingerprint(as_model(module))


def test_an_edited_source_file_changes_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for by in (1, 2, 1):  # of the same size, within the resolution of file times
        (tmp_path / "edited.py").write_text(f"from tiny_models import Functional\nclass Scaled(Functional):\n    by = {by}\n")
        importlib.invalidate_caches()
        edited = importlib.reload(sys.modules["edited"]) if found else importlib.import_module("edited")
        outer = Functional()
        outer.inner = edited.Scaled()
        found.append([fingerprint(as_model(module)) for module in (outer, edited.Scaled())])
    monkeypatch.delitem(sys.modules, "edited")
    assert found[0] == found[2]
    assert not set(found[0]) & set(found[1])


class Warms(Functional):
    """Stores that it was called, and its longest chunk."""

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
def test_attributes_that_reading_changes_are_not_in_the_fingerprint(source):
    module = source()
    lm = as_model(module)
    before = fingerprint(lm)
    lm.step(torch.arange(9)[None])
    for again in (as_model(module), as_model(module, form=lm.form)):
        assert fingerprint(again) == before == fingerprint(as_model(source(), form=again.form))


def test_finding_the_form_of_a_module_in_train_mode_does_not_change_it():
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


# ------------------------------------------------------------------------------------------ caches


def test_a_large_tensor_is_hashed_again_only_if_its_version_or_sample_changes():
    lm = as_model(Wide())
    before, digest = fingerprint(lm), weights_digest(lm)
    lm.module.embed.weight.data[77, 3] += 1e-3  # not counted by torch, and not in the sample
    for other in (lm, replace(lm, spec="other"), as_model(lm.module)):
        assert fingerprint(other) == facts(other).fingerprint == before
    assert weights_digest(lm) != digest  # has no cache
    with torch.no_grad():
        lm.module.table[0] = 7
    assert before != fingerprint(lm) != uncached(lm.module)  # the embedding is cached still


def test_tensors_without_a_version_counter_are_always_hashed():
    with torch.inference_mode():
        module = Wide()
    lm = as_model(module)
    before = fingerprint(lm)
    with torch.inference_mode():
        module.embed.weight[77, 3] += 1e-3
    assert fingerprint(lm) != before


def test_cache_entries_are_removed_with_the_model():
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


def test_facts_follow_the_present_module_and_share_no_objects():
    lm = as_model(Functional())
    facts(lm).precision.kept["fp64"] = 1
    assert (facts(lm).precision.name, facts(lm).precision.kept) == ("fp32", {})
    assert facts(replace(lm, module=Functional().bfloat16())).precision.name == "bf16"
    assert facts(replace(lm, bytes_before=8)).precision.bytes_before == 8
    assert facts(lm).precision.bytes_before is None
    lm.module.double()
    assert facts(lm).precision.name == "fp64"


def test_row_selection_is_tested_once_per_loaded_model():
    class Counted(Functional):
        _calls = 0

        def forward(self, input_ids, state=None):
            self._calls += 1
            if not getattr(self, "numbered", False):
                return super().forward(input_ids, state)
            return super().forward(input_ids)[0], [len(input_ids)]  # not a tensor with a row for each sequence

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


# ------------------------------------------------------------------------------------- objects that are no modules


class Bare:
    """Cannot be weakly referenced."""

    __slots__ = ("model",)

    def __init__(self):
        self.model = Functional()

    def step(self, input_ids, state=None):
        with torch.no_grad():
            return self.model(input_ids, state)


class Alike(Stepper):
    """All instances are equal and unhashable."""

    def __eq__(self, other):
        return True

    __hash__ = None


@pytest.mark.parametrize("source", [Stepper, Bare, Alike])
def test_an_object_keeps_its_fingerprint_while_it_lives(source):
    one, other = source(), source()
    assert fingerprint(as_model(one)) == fingerprint(as_model(one)) != fingerprint(as_model(other))
    assert fingerprint(replace(as_model(one), context_length=4)) != fingerprint(as_model(one))


def test_an_object_can_give_its_own_fingerprint_and_a_step_function_alone_keeps_one():
    first, second = Stepper(), Stepper()
    first.fingerprint = second.fingerprint = "v1"
    assert fingerprint(as_model(first)) == fingerprint(as_model(second))
    lm = as_model(Stepper())
    alone = Model(lm.step_fn, "alone", "step", True, VOCAB)
    assert fingerprint(alone) == fingerprint(replace(alone, spec="other"))
    assert fingerprint(alone) != fingerprint(replace(alone, step_fn=as_model(Stepper()).step_fn))


def test_a_weak_cache_finds_objects_by_identity():
    cache, owners = WeakCache(), [Alike(), Alike(), Bare()]
    found = [cache.value(owner, object) for owner in owners]
    assert len(set(found)) == 3
    assert [cache.value(owner, object) for owner in owners] == found
    assert cache.value(owners[1], object, stamp="changed") is not found[1]
    assert (Alike() in cache, owners[0] in cache, owners[2] in cache) == (False, True, True)
    del owners[0]
    gc.collect()
    assert len(cache) == 2


# ------------------------------------------------------------------------------------------- found limits


@pytest.fixture
def context(tmp_path):
    return VerbContext(Session(tmp_path, budget=1000), Log("test_it"), Driver(None))


def test_a_found_limit_is_not_in_the_fingerprint_and_a_model_probed_once(context):
    module = Limited()
    plain = context.model(module)
    certified, _ = context.certified(module)
    assert (certified.limit, certified.context_length, plain.limit) == (37, None, None)
    probed = context.session.verdict(plain).record
    read = measure_perplexity(certified, torch.arange(100) % VOCAB).record
    assert probed.lm.fingerprint == read.lm.fingerprint == fingerprint(plain)
    assert context.session.verdict(certified).record is probed
    replay(certified, "splits", length=8, cuts=(4,))  # reads no more than the limit
    other = as_model(Stepper())
    assert context.session.verdict(other) is context.session.verdict(replace(other, spec="other"))
    lm = replace(plain, found_limit=24)  # a declared limit wins
    assert (lm.limit, replace(lm, context_length=48).limit, replace(lm, found_limit=None).limit) == (24, 48, None)


def test_limits_and_end_tokens_are_in_the_journal_key(context):
    lm = as_model(Functional())
    limits = [lm, replace(lm, found_limit=37), replace(lm, found_limit=38), replace(lm, context_length=37)]
    assert len({context.key("perplexity", one, {}) for one in limits}) == 4
    task = Task("t", [{}], lambda row: Choices("a", ("b", "c"), 0))

    def key_of(lm):
        return Encoder(lm, task).encode(task.ask({}), "", id="0", number=0).key

    class Ends(Bytes):
        def __init__(self, *ends):
            self.ends = ends

    assert len({key_of(replace(one, tokenizer=Bytes())) for one in limits}) == 4
    assert len({key_of(replace(lm, tokenizer=Ends(*ends))) for ends in ((), (1,), (1, 2))}) == 3


def test_a_stored_verdict_is_keyed_by_how_hard_the_probe_searched(monkeypatch):
    keys, stored, lm = [], Record(kind="equivalence", subject="laws", lm=ModelFacts(spec="lm")), as_model(Functional())
    monkeypatch.setattr(VerbContext, "finished", lambda context, key: keys.append(key) or stored)

    def key(options=None, **settings):
        with running_in(VerbContext(Session(**settings))):
            assert equivalence(lm, **(options or {})).record is stored
        return keys.pop()

    settings = [{"profile": "ci"}, {"profile": "nightly"}, {"profile": "ci", "budget": 0}, {"profile": "ci", "budget": 1}]
    assert len({key(**one) for one in settings}) == 4
    assert key({"profile": "nightly"}, profile="ci") == key(profile="nightly") == key(profile="nightly")


def test_a_found_limit_applies_like_a_declared_one(context):
    task = Task("t", [{}], lambda row: Choices("a" * 40, ("b", "c"), 0))
    inexact = context.session.verdict(as_model(Forgetful())).certificate
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
        assert len(speed.samples["decode"]) in (0, 3)  # none if the clock is too coarse
        assert policy_for(lm, inexact, window="lm_eval").chunk_size == 24
        assert Encoder(replace(lm, tokenizer=Bytes()), task).encode(task.ask({}), "", id="0", number=0).truncated == 41 - 25
        grid = measure_latency_grid(lm, seq_lens=(4, 30), runs=1, warm_up=0, new_tokens=25)
        assert [*grid.failed] == [(1, 4), (1, 30)]  # the rest of the grid is measured


def test_a_method_that_is_put_into_a_class_later_changes_the_fingerprint(monkeypatch):
    class Patched(Functional):
        def forward(self, input_ids, state=None):
            return super().forward(input_ids, state)

    lm, right = as_model(Patched()), Patched.forward
    before = fingerprint(lm)

    def faster(self, input_ids, state=None):
        return right(self, input_ids, state)

    monkeypatch.setattr(Patched, "forward", faster)
    assert fingerprint(lm) != before
    monkeypatch.setattr(Patched, "forward", right)
    assert fingerprint(lm) == before
