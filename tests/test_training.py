"""One protocol for all models: the same tokens, resumable to the bit, cached, and clear about what goes wrong."""

import json
import math
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import Functional, GetSetState, PortableStreaming, Stateless, Stepper, Streaming
from torch import nn
from torch.nn import functional as F

import pytest_lmeval.training._loop as loop
from pytest_lmeval.data import corpus
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.errors import CorpusError, ModelError, ProtocolError, SpecError, StreamError, TrainingError
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Codebooks
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import JournalWarning, Saver
from pytest_lmeval.records._measured import Record
from pytest_lmeval.training import Protocol, load_weights, run_training
from pytest_lmeval.training._batches import batches, held_out_batches
from pytest_lmeval.training._protocol import learning_rate
from pytest_lmeval.training._weights import snapshot
from pytest_lmeval.zoo._demo import Demo

VOCAB = 32
SMALL = Protocol(steps=12, batch_size=4, seq_len=16, eval_every=4, eval_tokens=256, lr=1e-2)


def text(seed=0, length=2000):
    """Ids that can be learned: mostly the next one up, now and then any."""
    generator = np.random.default_rng(seed)
    steps = np.where(generator.random(length) < 0.9, 1, generator.integers(VOCAB, size=length))
    return np.cumsum(steps) % VOCAB


TEXT, UNSEEN = text(0), text(1)


def weights(result):
    return {name: tensor.clone() for name, tensor in result.lm.module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def outcome(result):
    """What must be the same whenever the same training is done: curves, metrics but those of time and memory, weights."""
    timed = ("seconds", "tokens_per_second", "peak_memory", "peak_memory_growth")
    metrics = {name: metric.to_json() for name, metric in result.record.metrics.items() if name not in timed}
    series = {name: schema.to_plain(curve) for name, curve in result.record.series.items()}
    digest = {name: tensor.tolist() for name, tensor in weights(result).items()}
    return json.dumps([metrics, series, digest, result.best_step])


@pytest.fixture
def save_each_step(monkeypatch):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    monkeypatch.setattr(Saver, "SHARE", 0.0)


# ------------------------------------------------------------------------------------------------- protocol


def test_a_training_has_one_end():
    assert (Protocol().steps, Protocol().epochs) == (300, None)
    assert (Protocol(epochs=2).steps, Protocol(epochs=2).epochs) == (None, 2)
    with pytest.raises(ProtocolError, match="steps=5 and epochs=2: a training has one end"):
        Protocol(steps=5, epochs=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("epochs", -1),
        ("batch_size", 0),
        ("seq_len", True),
        ("tokens", None),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("warmup", 1.0),
        ("schedule", "constant"),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("clip", 0),
        ("seed", -1),
        ("seed", 1 << 31),
        ("eval_every", 0),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(ProtocolError, match=rf"{name}=.*; {name} must be "):
        Protocol(**{name: value})


@given(st.integers(1, 200), st.floats(0, 0.99), st.sampled_from(["cosine", "linear"]))
def test_the_learning_rate_rises_to_its_height_and_falls_to_a_tenth(steps, warmup, schedule):
    protocol = Protocol(steps=steps, warmup=warmup, schedule=schedule, lr=2.0)
    rates = [learning_rate(protocol, step, steps) for step in range(steps)]
    rising = math.ceil(warmup * steps)
    assert all(0 < rate <= 2 for rate in rates)
    assert rates[:rising] == sorted(rates[:rising])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    assert rising in (0, steps) or rates[rising - 1] == 2
    assert rising == steps or rates[-1] == pytest.approx(0.2)


# -------------------------------------------------------------------------------------------------- batches

shapes = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 40)).map(
    lambda drawn: (drawn[0], drawn[1], drawn[0] * drawn[1] + 1 + drawn[2])
)


def an_epoch(seq_len, batch_size, length, seed=0, first=0):
    protocol = Protocol(seq_len=seq_len, batch_size=batch_size, seed=seed)
    steps = (length - 1) // seq_len // batch_size
    return list(islice(batches(np.arange(length), protocol, first=first), steps))


def targets_come_at_most_once(epoch):
    targets = torch.cat([batch[:, 1:].flatten() for batch in epoch])
    return len(targets.unique()) == len(targets)


@given(shapes, st.integers(0, 5))
def test_an_epoch_reads_each_target_once_but_for_less_than_a_batch_and_a_crop(shape, seed):
    seq_len, batch_size, length = shape
    epoch = an_epoch(*shape, seed=seed)
    assert all(batch.shape == (batch_size, seq_len + 1) for batch in epoch)
    assert all((batch.diff(dim=1) == 1).all() for batch in epoch)  # each crop is a piece of the text
    assert targets_come_at_most_once(epoch)
    assert length - 1 - sum(batch[:, 1:].numel() for batch in epoch) < batch_size * seq_len + seq_len


def test_this_test_can_fail():
    starts = torch.randint(0, 90, (5, 4, 1), generator=torch.Generator().manual_seed(0))
    assert not targets_come_at_most_once(list(starts + torch.arange(11)))


@given(shapes, st.integers(0, 30))
def test_batches_can_be_taken_up_anywhere(shape, first):
    seq_len, batch_size, length = shape
    protocol = Protocol(seq_len=seq_len, batch_size=batch_size)
    every = list(islice(batches(np.arange(length), protocol), first + 3))
    later = list(islice(batches(np.arange(length), protocol, first=first), 3))
    assert all(torch.equal(one, other) for one, other in zip(every[first:], later, strict=True))


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = [an_epoch(4, 2, 100, seed, first) for seed, first in ((0, 0), (0, 12), (1, 0))]
    orders = [tuple(torch.cat(order)[:, 0].tolist()) for order in orders]
    assert len(set(orders)) == 3


@given(st.integers(1, 9), st.integers(1, 400), st.integers(1, 300))
def test_held_out_crops_are_spread_over_the_whole_text(seq_len, extra, wanted):
    length = seq_len + extra
    crops = torch.cat(held_out_batches(np.arange(length), Protocol(seq_len=seq_len, eval_tokens=wanted), "text"))
    number = min((length - 1) // seq_len, max(1, wanted // seq_len))
    assert crops.shape == (number, seq_len + 1)
    assert targets_come_at_most_once([crops])
    assert number == 1 or crops[-1, -1] >= length - 1 - seq_len


class LossAccumulator(Functional):
    """Remembers what it was given to learn from."""

    def __init__(self, **options):
        super().__init__(**options)
        self.read = []

    def __deepcopy__(self, memo):
        copied = type(self)(width=self.head.in_features)
        copied.load_state_dict(self.state_dict())
        copied.read = self.read
        return copied

    def forward(self, input_ids, state=None):
        if self.training:
            self.read.append(input_ids.clone())
        return super().forward(input_ids, state)


def test_all_models_read_the_same_tokens_in_the_same_order():
    small, large = LossAccumulator(width=4), LossAccumulator(width=16)
    for module in (small, large):
        lm = as_model(module)
        module.read.clear()
        run_training(lm, TEXT, held_out=UNSEEN, protocol=SMALL)
    assert len(small.read) == 12 + 1  # the operations of a step are counted in one that changes nothing
    assert torch.equal(torch.stack(small.read), torch.stack(large.read))


def test_a_corpus_without_end_is_read_as_far_as_the_protocol_says():
    def documents():
        for number in range(10**9):
            assert number < 30, "read too far"
            yield Document("part", ids=text(number, 100))

    endless = Corpus("endless", "train", documents, "fingerprint", tokenized=True)
    result = run_training(as_model(Functional()), endless, protocol=replace(SMALL, tokens=2000, steps=2))
    assert result.record.details["steps_an_epoch"] == 1999 // 16 // 4


# ------------------------------------------------------------------------------------------------- training


def bare_loop(module, ids, held_out, protocol):
    """What one writes without a harness."""
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": protocol.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=protocol.lr, betas=protocol.betas)
    losses = []
    for step, crops in enumerate(islice(batches(ids, protocol), protocol.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(protocol, step, protocol.steps)
        logits, _ = module(crops[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), protocol.clip)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        nll = [
            F.cross_entropy(module(crops[:, :-1])[0].flatten(0, 1), crops[:, 1:].flatten()).item()
            for crops in held_out_batches(held_out, protocol, "")
        ]
    return losses, sum(nll) / len(nll)


def test_it_does_what_a_bare_loop_does():
    result = run_training(as_model(Functional()), TEXT, held_out=UNSEEN, protocol=SMALL)
    module = Functional()
    losses, nll = bare_loop(module, TEXT, UNSEEN, SMALL)
    assert result.curve.y == losses
    assert float(result.record.metrics["nll_last"]) == pytest.approx(nll, rel=1e-6)
    assert result.best_step == 12
    assert same(weights(result), module.state_dict())


def test_it_learns():
    protocol = replace(SMALL, steps=150, eval_every=50)
    result = run_training(as_model(Functional()), text(0, 20_000), held_out=text(1, 20_000), protocol=protocol)
    best = -0.9 * math.log(0.9) + 0.1 * math.log(VOCAB / 0.1)  # nats of the source, about
    assert best - 0.1 < result.nll < best + 0.3
    assert result.nll.low < float(result.nll) < result.nll.high
    assert float(result.perplexity) == pytest.approx(math.exp(result.nll))


@pytest.mark.parametrize("form", [Stateless, GetSetState, Streaming, PortableStreaming])
def test_a_model_of_any_form_learns_as_one_that_is_passed_its_state(form):
    reference = run_training(as_model(Functional()), TEXT, held_out=UNSEEN, protocol=SMALL)
    result = run_training(as_model(form()), TEXT, held_out=UNSEEN, protocol=SMALL)
    assert result.lm.form == as_model(form()).form
    assert result.curve.y == reference.curve.y
    assert same(weights(result), weights(reference))


def test_what_comes_back_can_be_used_at_once():
    result = run_training(as_model(Functional()), TEXT, held_out=UNSEEN, protocol=SMALL)
    assert result.lm.spec == "tiny_models:Functional, trained 12 steps on ids[test]"
    assert not result.lm.module.training
    assert all(parameter.grad is None for parameter in result.lm.module.parameters())
    _, state = result.lm.step(torch.tensor([[1, 2]]))
    assert result.lm.step(torch.tensor([[3]]), state)[0].shape == (1, 1, VOCAB)
    held_out = held_out_batches(UNSEEN, SMALL, "")
    assert float(loop.evaluate(result.lm, held_out).mean()) / SMALL.seq_len == pytest.approx(float(result.nll), rel=1e-12)
    assert run_training(as_model(Functional()), TEXT, protocol=SMALL, spec="mine").lm.spec == "mine"


class Buffered(Functional):
    """Its state is a buffer, of as many rows as were read."""

    def __init__(self):
        super().__init__()
        self.register_buffer("held", torch.zeros(1, 1, 16))

    def forward(self, input_ids):
        logits, self.held = super().forward(input_ids, self.held.expand(1, len(input_ids), 16).contiguous())
        return logits

    def get_state(self):
        return self.held

    def set_state(self, state):
        self.held = state


def test_a_state_that_is_held_in_the_module_is_no_part_of_what_was_trained(save_each_step, tmp_path):
    result = run_training(as_model(Buffered()), TEXT, protocol=SMALL, folder=tmp_path)
    assert result.curve.y == run_training(as_model(Functional()), TEXT, protocol=SMALL).curve.y
    assert result.lm.module.held.shape == (1, 1, 16)
    again = run_training(result.lm, TEXT, held_out=UNSEEN, protocol=SMALL)  # no graph is left in it, so it can be copied
    assert again.nll < 3.5
    cached = run_training(as_model(Buffered()), TEXT, protocol=SMALL, folder=tmp_path)
    assert cached.cached
    assert same(weights(cached), weights(result))
    assert fingerprint(cached.lm) == fingerprint(result.lm)


def test_the_model_that_was_given_is_not_changed_and_no_random_number_is_used_up():
    module = Functional().train()
    lm = as_model(module)
    before, random = (fingerprint(lm), weights_of := module.state_dict()), torch.get_rng_state()
    kept = {name: tensor.clone() for name, tensor in weights_of.items()}
    result = run_training(lm, TEXT, held_out=UNSEEN, protocol=SMALL)
    assert same(kept, module.state_dict())
    assert fingerprint(lm) == before[0] != fingerprint(result.lm)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_weights_that_the_held_out_text_likes_best_are_kept():
    backwards = UNSEEN[::-1].copy()  # the more is learned of the text, the worse this goes
    result = run_training(as_model(Functional()), TEXT, held_out=backwards, protocol=replace(SMALL, steps=24))
    assert result.best_step < 24
    assert result.nll < result.record.metrics["nll_last"]
    assert float(result.nll) == min(result.record.series["held_out_loss"].y)
    assert f"trained {result.best_step} steps" in result.lm.spec


def test_without_a_held_out_text_the_last_weights_are_kept():
    result = run_training(as_model(Functional()), TEXT, protocol=SMALL)
    assert result.best_step == 12
    assert "held_out_loss" not in result.record.series
    with pytest.raises(AttributeError, match="trained without held_out, so its perplexity on unseen text is not known"):
        result.perplexity  # noqa: B018


def test_frozen_parameters_stay_as_they_are():
    module = Functional()
    module.embed.weight.requires_grad_(False)
    result = run_training(as_model(module), TEXT, protocol=SMALL)
    assert torch.equal(result.lm.module.embed.weight, module.embed.weight)
    assert not torch.equal(result.lm.module.head.weight, module.head.weight)


class Tied(nn.Module):
    """The embedding is the head."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 16)
        self.cell = nn.GRU(16, 16, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, state=None):
        hidden, state = self.cell(self.embed(input_ids), state)
        return self.head(self.drop(hidden)), state


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    result = run_training(as_model(Tied()), TEXT, protocol=SMALL, folder=tmp_path)
    (file,) = tmp_path.glob("models/*/best.safetensors")
    assert "head.weight" not in load_file(file)
    loaded = load_weights(as_model(Tied()), file)
    assert loaded.module.head.weight is loaded.module.embed.weight
    assert same(weights(result), loaded.module.state_dict())
    save_file({name.replace("embed", "head"): tensor for name, tensor in load_file(file).items()}, tmp_path / "other")
    assert same(weights(result), load_weights(as_model(Tied()), tmp_path / "other").module.state_dict())


def test_dropout_is_on_in_training_only_and_its_seed_is_the_protocols():
    first, again = (run_training(as_model(Tied(0.3)), TEXT, held_out=UNSEEN, protocol=SMALL) for _ in range(2))
    assert outcome(first) == outcome(again)
    other = run_training(as_model(Tied(0.0)), TEXT, held_out=UNSEEN, protocol=SMALL)
    assert first.curve.y[0] != other.curve.y[0]
    assert first.record.series["held_out_loss"].y[0] == other.record.series["held_out_loss"].y[0]


def test_progress_is_told_after_each_step():
    told = []
    result = run_training(as_model(Functional()), TEXT, protocol=SMALL, progress=lambda *arguments: told.append(arguments))
    assert [(done, expected) for done, _, expected in told] == [(64 * step, 64 * 12) for step in range(1, 13)]
    assert told[-1][1] == pytest.approx(64 * sum(result.curve.y))


# --------------------------------------------------------------------------------------------------- record


def test_the_record_says_how_it_was_trained_what_came_of_it_and_what_it_cost():
    module = as_model(Demo(width=16, layers=1, heads=2, window=9, kernel=3, hidden=16))
    ids = torch.randint(0, 256, (2000,), generator=torch.Generator().manual_seed(0))
    protocol = replace(SMALL, steps=None, epochs=2)
    record = run_training(module, ids, held_out=ids.flip(0), protocol=protocol).record
    per_epoch = 1999 // 16 // 4
    steps = 2 * per_epoch
    assert (record.kind, record.subject) == ("train", "ids[test]")
    assert record.details["steps"] == steps
    assert record.settings["lr"] == protocol.lr
    assert record.settings["data"] != record.settings["held_out_data"]
    assert record.cost.tokens == steps * 64
    assert record.cost.flops == record.metrics["flops_total"] == sum(
        record.metrics[f"flops_{way}"] for way in ("forward", "backward")
    )  # fmt: skip
    assert record.metrics["parameters"] == sum(parameter.numel() for parameter in module.module.parameters())
    assert record.metrics["model_bytes"] == 4 * record.metrics["parameters"]
    assert float(record.metrics["tokens_per_second"]) == pytest.approx(steps * 64 / record.cost.seconds)
    curve, epochs = record.series["learning_curve"], record.series["epoch_loss"]
    assert curve.x == [64.0 * step for step in range(1, steps + 1)]
    assert epochs.x == [1.0, 2.0]
    assert epochs.y == pytest.approx([np.mean(curve.y[:per_epoch]), np.mean(curve.y[per_epoch:])])
    assert record.series["held_out_loss"].x == [64.0 * step for step in (*range(0, steps, 4), steps)]
    assert float(record.metrics["train_loss"]) == pytest.approx(np.mean(curve.y[-4:]))


def test_the_record_is_one_of_the_schema():
    jsonschema = pytest.importorskip("jsonschema")
    whole = schema.json_schema()
    record = run_training(as_model(Functional()), TEXT, held_out=UNSEEN, protocol=SMALL).record
    written = json.loads(json.dumps(schema.to_plain(record)))
    jsonschema.validate(written, {**whole["$defs"]["Record"], "$defs": whole["$defs"]})
    assert schema.to_plain(schema.convert(written, Record)) == written


def test_a_long_curve_is_thinned_by_averaging(monkeypatch):
    whole = run_training(as_model(Functional()), TEXT, protocol=SMALL).curve
    monkeypatch.setattr("pytest_lmeval.training._result.POINTS", 5)
    thinned = run_training(as_model(Functional()), TEXT, protocol=SMALL).curve
    assert thinned.x == [64.0 * 3, 64.0 * 6, 64.0 * 9, 64.0 * 12]
    assert thinned.y == pytest.approx([np.mean(whole.y[begin : begin + 3]) for begin in range(0, 12, 3)])


# --------------------------------------------------------------------------------------------------- cached


def test_a_model_that_was_trained_before_is_not_trained_again(tmp_path):
    module = LossAccumulator()
    first = run_training(as_model(module), TEXT, held_out=UNSEEN, protocol=SMALL, folder=tmp_path)
    read = len(module.read)
    again = run_training(as_model(module), TEXT, held_out=UNSEEN, protocol=SMALL, folder=tmp_path)
    assert (first.cached, again.cached, len(module.read)) == (False, True, read)
    assert again.record == first.record
    assert same(weights(first), weights(again))
    assert fingerprint(again.lm) == fingerprint(first.lm)
    assert again.lm.spec == first.lm.spec
    fresh = run_training(as_model(module), TEXT, held_out=UNSEEN, protocol=SMALL, folder=tmp_path, fresh=True)
    assert (fresh.cached, outcome(fresh)) == (False, outcome(first))


def test_nothing_that_decides_the_outcome_may_differ(tmp_path):
    def cached(lm, ids=TEXT, held_out=UNSEEN, **changed):
        return run_training(lm, ids, held_out=held_out, protocol=replace(SMALL, steps=1, **changed), folder=tmp_path).cached

    lm = as_model(Functional())
    assert not cached(lm)
    assert cached(lm)
    assert not cached(as_model(Functional(seed=1)))
    assert not cached(lm, ids=text(2))
    assert not cached(lm, held_out=text(2))
    assert not cached(lm, held_out=None)
    assert not cached(lm, seed=1)
    assert not cached(lm, lr=2e-2)
    assert cached(lm, ids=TEXT.tolist())


def test_an_iterator_is_known_again_by_what_it_brings(tmp_path):
    first, again = (
        run_training(as_model(Functional()), iter(np.split(TEXT, 4)), protocol=SMALL, folder=tmp_path) for _ in range(2)
    )
    assert (first.cached, again.cached) == (False, True)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_training(as_model(Functional()), TEXT, held_out=UNSEEN, protocol=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_says_what_was_trained_in_it(tmp_path):
    result = run_training(as_model(Functional()), TEXT, held_out=UNSEEN, protocol=SMALL, folder=tmp_path)
    (folder,) = (tmp_path / "models").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["best.safetensors", "protocol.json", "record.json"]
    written = json.loads((folder / "protocol.json").read_text())
    assert written["trained_from"] == "tiny_models:Functional"
    assert written["decided by"]["protocol"] == SMALL.to_json()
    assert same(weights(result), load_weights(as_model(Functional(seed=1)), folder).module.state_dict())


@pytest.mark.parametrize("name", ["best.safetensors", "record.json"])
@pytest.mark.parametrize("how", ["truncated", "empty", "another"])
def test_a_broken_file_is_reported_and_the_model_is_trained_anew(tmp_path, name, how):
    first = run_training(as_model(Functional()), TEXT, protocol=SMALL, folder=tmp_path)
    (file,) = tmp_path.glob(f"models/*/{name}")
    content = file.read_bytes()
    another = content[:-3] + bytes(byte ^ 1 for byte in content[-3:])
    file.write_bytes({"truncated": content[:-30], "empty": b"", "another": another}[how])
    with pytest.warns(JournalWarning, match=f"{name}.*trained anew"):
        again = run_training(as_model(Functional()), TEXT, protocol=SMALL, folder=tmp_path)
    assert (again.cached, outcome(again)) == (False, outcome(first))
    assert run_training(as_model(Functional()), TEXT, protocol=SMALL, folder=tmp_path).cached


def test_weights_that_fit_a_model_of_other_settings_are_refused(tmp_path):
    run_training("zoo:windowed", corpus("automaton:size=20k", "train"), protocol=SMALL, folder=tmp_path)
    (file,) = tmp_path.glob("models/*/best.safetensors")
    with pytest.raises(SpecError, match=r"does not fit zoo:transformer: .*layers.0.window 64 there, not set here"):
        load_weights("zoo:transformer", file)
    assert load_weights("zoo:windowed", file).spec.startswith("zoo:windowed, trained")


def test_weights_of_another_model_are_refused_with_the_names_of_what_does_not_fit(tmp_path):
    run_training(as_model(Functional()), TEXT, protocol=SMALL, folder=tmp_path)
    (file,) = tmp_path.glob("models/*/best.safetensors")
    tensors = load_file(file)
    tensors["new.weight"] = tensors.pop("embed.weight")
    tensors["head.bias"] = torch.zeros(7)
    save_file(tensors, file)
    expected = (
        r"does not fit tiny_models:Functional. Tensors missing: embed.weight; not in the model: new.weight; "
        r"of another shape: head.bias \[7\] for \[32\]"
    )
    with pytest.raises(SpecError, match=expected):
        run_training(as_model(Functional()), TEXT, protocol=SMALL, folder=tmp_path)
    lm = as_model(Functional(seed=1))
    with pytest.raises(SpecError, match=expected):
        load_weights(lm, file)
    assert same(lm.module.state_dict(), Functional(seed=1).state_dict())
    with pytest.raises(SpecError, match=r"missing: .*, .*, .*, .*, .* and \d+ more"):
        load_weights("demo", file)


def test_weights_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"there are no weights at .*nowhere"):
        load_weights(as_model(Functional()), tmp_path / "nowhere")
    (tmp_path / "short").write_bytes(b"12")
    with pytest.raises(SpecError, match=r"short is no whole file of weights"):
        load_weights(as_model(Functional()), tmp_path / "short")


# -------------------------------------------------------------------------------------------------- resumed


class Stopped(Exception):
    """The interruption."""


def stop_after(step):
    def progress(done, nats, expected):
        if done == 64 * step:
            raise Stopped

    return progress


def interrupted(step, folder, **options):
    options = {"held_out": UNSEEN, "protocol": SMALL, "folder": folder, **options}
    with pytest.raises(Stopped):
        run_training(as_model(Tied(0.2)), TEXT, progress=stop_after(step), **options)
    return run_training(as_model(Tied(0.2)), TEXT, **options)


def test_a_training_that_was_stopped_anywhere_goes_on_to_the_same_end(save_each_step):
    whole = outcome(run_training(as_model(Tied(0.2)), TEXT, held_out=UNSEEN, protocol=SMALL))

    @settings(max_examples=8)
    @given(st.integers(1, 11))
    def check(step):
        with tempfile.TemporaryDirectory() as folder:
            result = interrupted(step, folder)
            assert result.resumed_at == step
            assert outcome(result) == whole

    check()


FORGOTTEN = {
    "the optimizer": lambda point: point["optimizer"].update(state={}),
    "the weights": lambda point: point.update(weights=snapshot(as_model(Tied()))),
    "a step": lambda point: point["losses"].pop(),
    "an evaluation": lambda point: point["evaluations"].pop(0),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_point_that_forgets_something_leads_elsewhere(save_each_step, tmp_path, forgotten):
    """The test above can fail: all parts of a point are needed."""
    with pytest.raises(Stopped):
        run_training(as_model(Tied(0.2)), TEXT, held_out=UNSEEN, protocol=SMALL, folder=tmp_path, progress=stop_after(6))
    (file,) = tmp_path.glob("models/*/point.pt")
    point = torch.load(file)
    FORGOTTEN[forgotten](point)
    torch.save(point, file)
    result = run_training(as_model(Tied(0.2)), TEXT, held_out=UNSEEN, protocol=SMALL, folder=tmp_path)
    assert result.resumed_at > 0
    assert outcome(result) != outcome(run_training(as_model(Tied(0.2)), TEXT, held_out=UNSEEN, protocol=SMALL))


def test_without_a_held_out_text_it_goes_on_too(save_each_step, tmp_path):
    whole = outcome(run_training(as_model(Tied(0.2)), TEXT, protocol=SMALL))
    assert outcome(interrupted(5, tmp_path, held_out=None)) == whole


KILLED = """
import sys, time
import torch
from torch import nn
from pytest_lmeval import as_model
from pytest_lmeval.training import Protocol, run_training
from pytest_lmeval.records._journal import Saver

class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 32))

    def forward(self, input_ids):
        return self.layers(input_ids)

def work(folder, progress=None):
    text, held_out = torch.randint(0, 32, (2, 3000), generator=torch.Generator().manual_seed(0))
    protocol = Protocol(steps=150, batch_size=4, seq_len=16, eval_every=10, eval_tokens=256)
    return run_training(as_model(Dropping()), text, held_out=held_out, protocol=protocol, folder=folder, progress=progress)

if __name__ == "__main__":
    import killed  # the class has the same name for whoever imports it
    Saver.PAUSE, Saver.SHARE = 0.0, 0.0
    killed.work(sys.argv[1], lambda *_: time.sleep(0.02))
"""


def test_a_training_that_was_killed_goes_on_to_the_same_end(tmp_path, monkeypatch):
    (tmp_path / "killed.py").write_text(KILLED)
    monkeypatch.syspath_prepend(tmp_path)
    from killed import work

    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("models/*/point.pt")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()

    result = work(tmp_path)
    assert 0 < result.resumed_at < 150
    assert outcome(result) == outcome(work(None))
    assert not list(tmp_path.glob("models/*/point.pt"))


def broken_point(folder, content):
    with pytest.raises(Stopped):
        run_training(as_model(Functional()), TEXT, protocol=SMALL, folder=folder, progress=stop_after(6))
    (point,) = folder.glob("models/*/point.pt")
    point.write_bytes(content(point.read_bytes()))


class Run:
    """What a file from elsewhere may bring."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def foreign(content):
    return pickle.dumps(Run(), protocol=2)


def of_another_model(content):
    with tempfile.TemporaryFile() as file:
        torch.save({"weights": Functional(width=8).state_dict(), "optimizer": {}}, file)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("content", [lambda content: content[:-500], foreign, of_another_model])
def test_a_point_that_cannot_be_used_is_reported_and_never_run(save_each_step, monkeypatch, tmp_path, content):
    monkeypatch.chdir(tmp_path)
    broken_point(tmp_path, content)
    with pytest.warns(JournalWarning, match=r"point\.pt cannot be read"):
        result = run_training(as_model(Functional()), TEXT, protocol=SMALL, folder=tmp_path)
    assert result.resumed_at == 0
    assert outcome(result) == outcome(run_training(as_model(Functional()), TEXT, protocol=SMALL))
    assert not Path("ran").exists()


def test_fresh_does_not_go_on(save_each_step, tmp_path):
    broken_point(tmp_path, lambda content: content)
    assert run_training(as_model(Functional()), TEXT, protocol=SMALL, folder=tmp_path, fresh=True).resumed_at == 0


def test_a_disk_that_is_full_is_reported_and_the_training_goes_on(save_each_step, monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("pytest_lmeval.training._folder.Folder.save", full)
    with pytest.warns(JournalWarning, match=r"no point to go on from can be saved \(no space left\)"):
        assert run_training(as_model(Functional()), TEXT, protocol=SMALL, folder=tmp_path).best_step == 12


# --------------------------------------------------------------------------------------------------- failure


class Root(Functional):
    """Wrong: its root has no slope where a parameter has come to zero."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))
        self.steps = 0

    def forward(self, input_ids, state=None):
        self.steps += self.training
        logits, state = super().forward(input_ids, state)
        return logits + (self.gain.abs().sqrt() if self.steps > 6 else 0), state


def test_a_gradient_that_is_not_finite_stops_the_training_and_is_named(tmp_path):
    module = Root()
    lm, module.steps = as_model(module), 0
    with pytest.raises(TrainingError) as caught:
        run_training(lm, TEXT, held_out=UNSEEN, protocol=SMALL, folder=tmp_path)
    message = str(caught.value)
    (file,) = tmp_path.glob("models/*/best.safetensors")
    assert ":Root on ids[test], step 7: the loss is " in message
    assert "the gradient norm nan (" in message
    assert "at learning rate 0.00" in message
    assert "1 gradients are not finite, and backward came first to that of gain." in message
    assert f"those after 4 steps, are in {file}." in message
    assert load_weights(as_model(Root()), file).spec.endswith("Root, trained 4 steps on ids[test]")


class Overflowing(Functional):
    """Wrong: its logits overflow once it has been evaluated twice."""

    examined = 0

    def forward(self, input_ids, state=None):
        self.examined += not self.training and len(input_ids) > 1
        logits, state = super().forward(input_ids, state)
        return logits * (float("inf") if self.examined > 8 else 1), state


def test_a_loss_that_is_not_finite_is_named_with_the_first_gradient_that_backward_came_to():
    module = Functional()
    module.head.bias.data[3] = float("nan")
    with pytest.raises(
        TrainingError, match=r"step 1: the loss is nan, the gradient norm nan, .*came first to that of head\.bias"
    ):
        run_training(as_model(module), TEXT, protocol=SMALL)
    with pytest.raises(TrainingError, match=r"after 0 steps the loss of held-out crop 0 of 16 is nan"):
        run_training(as_model(module), TEXT, held_out=UNSEEN, protocol=SMALL)
    with pytest.raises(
        TrainingError, match=r"after 8 steps the loss of held-out crop 0 of 16 is nan\. The last training loss was"
    ):
        run_training(as_model(Overflowing()), TEXT, held_out=UNSEEN, protocol=SMALL)


@pytest.mark.parametrize("held_out", [UNSEEN, None])
def test_a_loss_that_goes_away_stops_the_training(held_out, tmp_path):
    wild = replace(SMALL, lr=30.0, warmup=0.0, clip=None, steps=100)
    with pytest.raises(TrainingError, match=r"diverged: after 4, 8, 12 steps its .* where an even guess costs 3.466") as caught:
        run_training(as_model(Functional()), TEXT, held_out=held_out, protocol=wild, folder=tmp_path)
    assert ("those after 0 steps" in str(caught.value)) == (held_out is not None)


def test_a_model_that_begins_badly_may_learn():
    module = Functional()
    module.head.weight.data *= 100
    result = run_training(as_model(module), TEXT, held_out=UNSEEN, protocol=replace(SMALL, steps=30))
    assert result.record.series["held_out_loss"].y[0] > 10
    assert result.nll < result.record.series["held_out_loss"].y[0]


# -------------------------------------------------------------------------------------------------- refused


class Unlearnable(Functional):
    def forward(self, input_ids, state=None):
        with torch.no_grad():
            return super().forward(input_ids, state)


class InPlace(Functional):
    """Its logits are changed in place while their gradient still needs what they were."""

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        logits = logits.exp()
        logits += 1
        return logits, state


class Short(Functional):
    context_length = 15


def frozen():
    return Functional().requires_grad_(False)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (Stepper(), SpecError, "is no torch module"),
        (frozen(), SpecError, "no parameter with requires_grad=True"),
        (Functional().bfloat16(), SpecError, r"7 parameters in torch.bfloat16, for example embed.weight.*Load it with @fp32"),
        (Short(), ProtocolError, "seq_len=16 is more than .*:Short reads: at most 15 tokens"),
        (Unlearnable(), ModelError, r"since its loss has no gradient: it reads under torch\.no_grad"),
        (InPlace(), ModelError, "since its loss has no gradient: .* modified by an inplace operation"),
    ],
    ids=["no module", "frozen", "16 bits", "short context", "no gradient", "in place"],
)
def test_a_model_that_cannot_be_trained_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        run_training(as_model(source), TEXT, protocol=SMALL)


def test_a_model_of_several_codebooks_is_refused():
    lm = replace(as_model(Functional()), codebooks=Codebooks((8, 8), (0, 1), (0, 0)))
    with pytest.raises(SpecError, match="reads frames of 2 codes"):
        run_training(lm, TEXT, protocol=SMALL)


def test_a_module_that_cannot_be_copied_is_refused():
    module = Functional()
    module.kept = module.head.weight * 2
    with pytest.raises(SpecError, match="cannot be copied"):
        run_training(as_model(module), TEXT, protocol=SMALL)


@pytest.mark.parametrize(
    ("ids", "held_out", "error", "message"),
    [
        (TEXT[:64], None, CorpusError, r"ids\[test\] gave 64 tokens, and one batch of 4 crops of 16 tokens needs 65"),
        (TEXT, TEXT[:16], CorpusError, r"held-out text ids\[test\] gave 16 tokens; one crop needs 17"),
        (TEXT, TEXT.copy(), CorpusError, "the same text"),
        (TEXT + 1, None, StreamError, r"ids\[test\]: token \d+ of the stream has id 32, but the vocabulary of"),
        (TEXT, UNSEEN + 1, StreamError, "has id 32, but the vocabulary of"),
    ],
    ids=["short", "short held out", "same", "vocabulary", "vocabulary of the held-out text"],
)
def test_a_text_that_cannot_be_learned_is_refused(ids, held_out, error, message):
    with pytest.raises(error, match=message):
        run_training(as_model(Functional()), ids, held_out=held_out, protocol=SMALL)


def test_a_protocol_that_reads_too_little_says_so():
    with pytest.raises(CorpusError, match=r"gave 64 tokens \(the protocol reads no more than tokens=64\)"):
        run_training(as_model(Functional()), TEXT, protocol=replace(SMALL, tokens=64))
    assert run_training(as_model(Functional()), TEXT[:65], protocol=replace(SMALL, steps=3)).best_step == 3


def test_a_text_without_a_token_is_refused():
    with pytest.raises(CorpusError, match="gave 0 tokens"):
        run_training(load("zoo:lstm"), np.empty(0, dtype=np.int64), protocol=Protocol(steps=2))


def test_frozen_parameters_make_another_training(tmp_path):
    module, ids = load("zoo:lstm").module, np.arange(3000) % 100
    protocol = Protocol(steps=1, seq_len=8, batch_size=2)
    free = run_training(as_model(module), ids, protocol=protocol, folder=tmp_path)
    module.embed.requires_grad_(False)
    assert not run_training(as_model(module), ids, protocol=protocol, folder=tmp_path).cached
    module.embed.requires_grad_(True)
    assert run_training(as_model(module), ids, protocol=protocol, folder=tmp_path).cached
    assert not free.cached
