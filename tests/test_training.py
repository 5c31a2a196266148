"""One protocol for all models: the same tokens, resumable to the bit, cached, and clear about what goes wrong."""

import gc
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import Changed, Functional, GetSetState, PortableStreaming, Stateless, Stepper, Streaming
from torch import nn
from torch.nn import functional as F

from pytest_lmeval.data import corpus
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.errors import CorpusError, ModelError, ProtocolError, SpecError, StreamError, TrainingError
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Codebooks
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import JournalWarning, Saver
from pytest_lmeval.records._measured import Record
from pytest_lmeval.training import Protocol, load_weights, run_training
from pytest_lmeval.training._plan import batches, held_out_batches
from pytest_lmeval.training._protocol import learning_rate
from pytest_lmeval.training._text_objective import evaluate
from pytest_lmeval.training._weights import snapshot
from pytest_lmeval.zoo._demo import Demo

VOCAB = 32
SMALL = Protocol(steps=12, batch_size=4, seq_len=16, eval_every=4, eval_tokens=256, lr=1e-2)
SHORT = replace(SMALL, steps=2, eval_every=2)


def text(seed=0, length=2000):
    """Ids that can be learned: nine in ten follow the last one, the others are random."""
    generator = np.random.default_rng(seed)
    steps = np.where(generator.random(length) < 0.9, 1, generator.integers(VOCAB, size=length))
    return np.cumsum(steps) % VOCAB


TEXT, UNSEEN = text(0), text(1)


def trained(module=None, ids=TEXT, **options):
    return run_training(as_model(module or Functional()), ids, **{"held_out": UNSEEN, "protocol": SMALL, **options})


def weights(result):
    return {name: tensor.clone() for name, tensor in result.lm.module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def outcome(result):
    """Everything that equal trainings repeat: curves, weights, and metrics except those of time and memory."""
    timed = ("seconds", "tokens_per_second", "peak_memory", "peak_memory_growth")
    metrics = {name: metric.to_json() for name, metric in result.record.metrics.items() if name not in timed}
    tensors = {name: tensor.tolist() for name, tensor in weights(result).items()}
    return json.dumps([metrics, schema.to_plain(result.record.series), tensors, result.best_step])


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Exempt imported objects from the garbage collection before each training, which takes longer than the training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def reference():
    return trained()


def only(folder, name):
    """The only file of this name among the trainings of an output folder."""
    (file,) = folder.glob(f"models/*/{name}")
    return file


@pytest.fixture
def save_each_step(monkeypatch):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    monkeypatch.setattr(Saver, "SHARE", 0.0)


# ------------------------------------------------------------------------------------------------- protocol


@pytest.mark.parametrize(("name", "value"), [
    ("steps", 0), ("steps", 1.5), ("epochs", -1), ("batch_size", 0), ("seq_len", True), ("tokens", None), ("lr", 0.0),
    ("lr", float("nan")), ("warmup", 1.0), ("schedule", "constant"), ("weight_decay", -0.1), ("betas", (0.9, 1.0)),
    ("betas", 0.9), ("clip", 0), ("seed", -1), ("seed", 1 << 31), ("eval_every", 0),
])  # fmt: skip
def test_an_invalid_setting_is_refused_by_name(name, value):
    with pytest.raises(ProtocolError, match=rf"{name}=.*; {name} must be "):
        Protocol(**{name: value})


def test_a_training_has_one_end():
    assert (Protocol().steps, Protocol(epochs=2).steps) == (300, None)
    with pytest.raises(ProtocolError, match="steps=5 and epochs=2: a training has one end"):
        Protocol(steps=5, epochs=2)


@given(st.integers(1, 200), st.floats(0, 0.99), st.sampled_from(["cosine", "linear"]))
def test_the_learning_rate_rises_to_its_maximum_and_falls_to_a_tenth(steps, warmup, schedule):
    protocol = Protocol(steps=steps, warmup=warmup, schedule=schedule, lr=2.0)
    rates = [learning_rate(protocol, step, steps) for step in range(steps)]
    rising = math.ceil(warmup * steps)
    assert all(0 < rate <= 2 for rate in rates)
    assert rates[:rising] == sorted(rates[:rising])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    assert rising in (0, steps) or rates[rising - 1] == 2
    assert rising == steps or rates[-1] == pytest.approx(0.2)


# -------------------------------------------------------------------------------------------------- batches

BATCHES = st.builds(Protocol, seq_len=st.integers(1, 9), batch_size=st.integers(1, 4), seed=st.integers(0, 5))
SPARE = st.integers(1, 40)  # tokens beyond one batch


def an_epoch(protocol, length, first=0):
    steps = (length - 1) // protocol.seq_len // protocol.batch_size
    return list(islice(batches(np.arange(length), protocol, first=first), steps))


def targets_are_unique(epoch):
    targets = torch.cat([batch[:, 1:].flatten() for batch in epoch])
    return len(targets.unique()) == len(targets)


@given(BATCHES, SPARE)
def test_an_epoch_reads_each_target_once_except_for_less_than_a_batch_and_a_crop(protocol, spare):
    size, crop = protocol.batch_size, protocol.seq_len
    epoch = an_epoch(protocol, size * crop + spare)
    assert all(batch.shape == (size, crop + 1) for batch in epoch)
    assert all((batch.diff(dim=1) == 1).all() for batch in epoch)  # each crop is a piece of the text
    assert targets_are_unique(epoch)
    assert not targets_are_unique([*epoch, epoch[0]])
    assert size * crop + spare - 1 - sum(batch[:, 1:].numel() for batch in epoch) < size * crop + crop


@given(BATCHES, SPARE, st.integers(0, 30))
def test_batches_can_start_at_any_step(protocol, spare, first):
    ids = np.arange(protocol.batch_size * protocol.seq_len + spare)
    every, later = (list(islice(batches(ids, protocol, first=begin), n)) for begin, n in ((0, first + 3), (first, 3)))
    assert all(torch.equal(one, other) for one, other in zip(every[first:], later, strict=True))


def test_each_epoch_and_each_seed_has_its_own_order():
    epochs = [an_epoch(Protocol(seq_len=4, batch_size=2, seed=seed), 100, first) for seed, first in ((0, 0), (0, 12), (1, 0))]
    assert len({tuple(torch.cat(epoch)[:, 0].tolist()) for epoch in epochs}) == 3


@given(st.integers(1, 9), st.integers(1, 400), st.integers(1, 300))
def test_held_out_crops_are_spread_over_the_whole_text(seq_len, extra, wanted):
    length = seq_len + extra
    crops = torch.cat(held_out_batches(np.arange(length), Protocol(seq_len=seq_len, eval_tokens=wanted), "text"))
    number = min((length - 1) // seq_len, max(1, wanted // seq_len))
    assert crops.shape == (number, seq_len + 1)
    assert targets_are_unique([crops])
    assert number == 1 or crops[-1, -1] >= length - 1 - seq_len


class Recording(Functional):
    """Records the ids that it, and its copies, are trained on."""

    read = []

    def forward(self, input_ids, state=None):
        if self.training:
            self.read.append(input_ids.clone())
        return super().forward(input_ids, state)


def test_all_models_read_the_same_tokens_in_the_same_order():
    read = []
    for width in (4, 16):
        lm = as_model(Recording(width=width))
        Recording.read.clear()
        trained(lm, held_out=None)
        read.append(torch.stack(Recording.read))
    assert len(read[0]) == 12 + 1  # one more to count the operations of a step
    assert torch.equal(*read)


def test_an_endless_corpus_is_read_up_to_the_tokens_of_the_protocol():
    def documents():
        for number in range(10**9):
            assert number < 30, "read too far"
            yield Document("part", ids=text(number, 100))

    endless = Corpus("endless", "train", documents, "fingerprint", tokenized=True)
    result = trained(ids=endless, protocol=replace(SHORT, tokens=2000))
    assert result.record.details["steps_an_epoch"] == 1999 // 16 // 4


# ------------------------------------------------------------------------------------------------- training


def test_it_equals_a_bare_loop():
    result, module, losses = reference(), Functional(), []
    matrices, others = ([p for p in module.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": SMALL.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SMALL.lr, betas=SMALL.betas)

    def loss_of(crops):
        return F.cross_entropy(module(crops[:, :-1])[0].flatten(0, 1), crops[:, 1:].flatten())

    for step, crops in enumerate(islice(batches(TEXT, SMALL), 12)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(SMALL, step, 12)
        optimizer.zero_grad()
        loss = loss_of(crops)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), SMALL.clip)
        optimizer.step()
        losses.append(loss.item())
    assert result.curve.y == losses
    nll = np.mean([loss_of(crops).item() for crops in held_out_batches(UNSEEN, SMALL, "")])
    assert float(result.record.metrics["nll_last"]) == pytest.approx(nll, rel=1e-6)
    assert result.best_step == 12
    assert same(weights(result), module.state_dict())


def test_it_learns():
    protocol = replace(SMALL, steps=120, eval_every=60, lr=2e-2)
    result = trained(ids=text(0, 10_000), held_out=text(1, 10_000), protocol=protocol)
    best = -0.9 * math.log(0.9) + 0.1 * math.log(VOCAB / 0.1)  # approximate entropy of the text
    assert best - 0.1 < result.nll < best + 0.3
    assert result.nll.low < float(result.nll) < result.nll.high
    assert float(result.perplexity) == pytest.approx(math.exp(result.nll))


@pytest.mark.parametrize("form", [Stateless, GetSetState, Streaming, PortableStreaming])
def test_models_of_all_forms_learn_the_same(form):
    result = trained(form())
    assert result.lm.form == as_model(form()).form
    assert result.curve.y == reference().curve.y
    assert same(weights(result), weights(reference()))


def test_the_trained_model_is_ready_for_use():
    result = reference()
    assert result.lm.spec == "tiny_models:Functional, trained 12 steps on ids[test]"
    assert not result.lm.module.training
    assert all(parameter.grad is None for parameter in result.lm.module.parameters())
    _, state = result.lm.step(torch.tensor([[1, 2]]))
    assert result.lm.step(torch.tensor([[3]]), state)[0].shape == (1, 1, VOCAB)
    held_out = held_out_batches(UNSEEN, SMALL, "")
    assert float(evaluate(result.lm, held_out).mean()) / SMALL.seq_len == pytest.approx(float(result.nll), rel=1e-12)
    assert trained(protocol=SHORT, spec="mine").lm.spec == "mine"


class Buffered(Functional):
    """Its state is a buffer with one row per batch row."""

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


def test_a_state_in_a_buffer_is_not_part_of_the_trained_weights(save_each_step, tmp_path):
    result = trained(Buffered(), folder=tmp_path)
    assert result.curve.y == reference().curve.y
    assert result.lm.module.held.shape == (1, 1, 16)
    again = trained(result.lm, protocol=SHORT)  # no graph is left in it, so it can be copied
    assert again.nll < 3.5
    cached = trained(Buffered(), folder=tmp_path)
    assert cached.cached
    assert fingerprint(cached.lm) == fingerprint(result.lm)


def test_frozen_parameters_the_given_model_and_the_random_state_do_not_change():
    module = Functional().train()
    module.embed.weight.requires_grad_(False)
    lm = as_model(module)
    before, random = fingerprint(lm), torch.get_rng_state()
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = trained(lm, protocol=SHORT)
    assert same(kept, module.state_dict())
    assert fingerprint(lm) == before != fingerprint(result.lm)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(result.lm.module.embed.weight, module.embed.weight)
    assert not torch.equal(result.lm.module.head.weight, module.head.weight)


def test_the_weights_with_the_lowest_held_out_loss_are_kept():
    backwards = UNSEEN[::-1].copy()  # training on TEXT makes this worse
    result = trained(held_out=backwards, protocol=replace(SMALL, steps=24))
    assert result.best_step < 24
    assert result.nll < result.record.metrics["nll_last"]
    assert float(result.nll) == min(result.record.series["held_out_loss"].y)
    assert f"trained {result.best_step} steps" in result.lm.spec


def test_without_a_held_out_text_the_last_weights_are_kept_and_progress_is_reported_after_each_step():
    calls = []
    result = trained(held_out=None, progress=lambda *arguments: calls.append(arguments))
    assert [(done, expected) for done, _, expected in calls] == [(64 * step, 64 * 12) for step in range(1, 13)]
    assert calls[-1][1] == pytest.approx(64 * sum(result.curve.y))
    assert result.best_step == 12
    assert "held_out_loss" not in result.record.series
    with pytest.raises(AttributeError, match="trained without held_out, so its perplexity on unseen text is not known"):
        result.perplexity  # noqa: B018


class Tied(Functional):
    """Embedding and head have one weight; with dropout of logits."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.head.weight = self.embed.weight
        self.drop = nn.Dropout(dropout)

    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, state)
        return self.drop(logits), state


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    result = trained(Tied(), protocol=SHORT, folder=tmp_path)
    file = only(tmp_path, "best.safetensors")
    tensors = load_file(file)
    assert "head.weight" not in tensors
    save_file({name.replace("embed", "head"): tensor for name, tensor in tensors.items()}, tmp_path / "other")
    for path in (file, tmp_path / "other"):
        loaded = load_weights(as_model(Tied()), path).module
        assert loaded.head.weight is loaded.embed.weight
        assert same(weights(result), loaded.state_dict())


def test_dropout_is_active_only_in_training_and_repeats():
    first, again, without = (trained(Tied(dropout), protocol=SHORT) for dropout in (0.3, 0.3, 0.0))
    assert outcome(first) == outcome(again)
    assert first.curve.y[0] != without.curve.y[0]
    assert first.record.series["held_out_loss"].y[0] == without.record.series["held_out_loss"].y[0]


# --------------------------------------------------------------------------------------------------- record


def test_the_record_has_settings_curves_and_costs():
    module = as_model(Demo(width=16, layers=1, heads=2, window=9, kernel=3, hidden=16))
    ids = torch.randint(0, 256, (2000,), generator=torch.Generator().manual_seed(0))
    protocol = replace(SMALL, steps=None, epochs=2)
    record = trained(module, ids, held_out=ids.flip(0), protocol=protocol).record
    per_epoch = 1999 // 16 // 4
    steps = 2 * per_epoch
    assert (record.kind, record.subject) == ("train", "ids[test]")
    assert record.details["steps"] == steps
    assert record.settings["lr"] == protocol.lr
    assert record.settings["data"] != record.settings["held_out_data"]
    assert record.cost.tokens == steps * 64
    flops = [record.metrics[f"flops_{way}"] for way in ("total", "forward", "backward")]
    assert record.cost.flops == flops[0] == sum(flops[1:])
    assert record.metrics["parameters"] == sum(parameter.numel() for parameter in module.module.parameters())
    assert record.metrics["model_bytes"] == 4 * record.metrics["parameters"]
    assert float(record.metrics["tokens_per_second"]) == pytest.approx(steps * 64 / record.cost.seconds)
    curve, epochs = record.series["learning_curve"], record.series["epoch_loss"]
    assert curve.x == [64.0 * step for step in range(1, steps + 1)]
    assert epochs.x == [1.0, 2.0]
    assert epochs.y == pytest.approx([np.mean(curve.y[:per_epoch]), np.mean(curve.y[per_epoch:])])
    assert record.series["held_out_loss"].x == [64.0 * step for step in (*range(0, steps, 4), steps)]
    assert float(record.metrics["train_loss"]) == pytest.approx(np.mean(curve.y[-4:]))


def test_the_record_fits_the_schema():
    whole = schema.json_schema()
    written = json.loads(json.dumps(schema.to_plain(reference().record)))
    assert schema.to_plain(schema.convert(written, Record)) == written
    pytest.importorskip("jsonschema").validate(written, {**whole["$defs"]["Record"], "$defs": whole["$defs"]})


def test_a_long_curve_is_averaged(monkeypatch):
    whole = reference().curve
    monkeypatch.setattr("pytest_lmeval.training._result.POINTS", 5)
    thinned = trained().curve
    assert thinned.x == [64.0 * 3, 64.0 * 6, 64.0 * 9, 64.0 * 12]
    assert thinned.y == pytest.approx([np.mean(whole.y[begin : begin + 3]) for begin in range(0, 12, 3)])


# --------------------------------------------------------------------------------------------------- cached


def test_a_finished_training_is_not_repeated_unless_fresh(tmp_path):
    module = Recording()
    first = trained(module, folder=tmp_path)
    read = len(module.read)
    again = trained(module, folder=tmp_path)
    assert (first.cached, again.cached, len(module.read)) == (False, True, read)
    assert (again.record, again.lm.spec) == (first.record, first.lm.spec)
    assert fingerprint(again.lm) == fingerprint(first.lm)
    fresh = trained(module, folder=tmp_path, fresh=True)
    assert (fresh.cached, outcome(fresh)) == (False, outcome(first))


def test_everything_that_decides_the_outcome_belongs_to_the_key(tmp_path):
    def cached(module=None, ids=TEXT, held_out=UNSEEN, **changed):
        protocol = replace(SMALL, **{"steps": 1, **changed})
        return trained(module, ids, held_out=held_out, protocol=protocol, folder=tmp_path).cached

    assert not cached()
    assert cached()
    assert not cached(Functional(seed=1))
    frozen = Functional()
    frozen.embed.requires_grad_(False)
    assert not cached(frozen)
    assert not cached(ids=text(2))
    assert not cached(held_out=text(2))
    assert not cached(held_out=None)
    assert not cached(seed=1)
    assert not cached(lr=2e-2)
    assert cached(ids=TEXT.tolist())
    assert [cached(ids=iter(np.split(TEXT, 4))) for _ in range(2)] == [False, True]


def test_only_a_given_folder_is_written_and_says_what_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(protocol=SHORT)
    assert list(tmp_path.iterdir()) == []
    result = trained(protocol=SHORT, folder=tmp_path)
    (folder,) = (tmp_path / "models").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["best.safetensors", "protocol.json", "record.json"]
    written = json.loads((folder / "protocol.json").read_text())
    assert written["trained_from"] == "tiny_models:Functional"
    assert written["decided by"]["protocol"] == SHORT.to_json()
    assert same(weights(result), load_weights(as_model(Functional(seed=1)), folder).module.state_dict())


@pytest.mark.parametrize("name", ["best.safetensors", "record.json"])
@pytest.mark.parametrize("how", ["truncated", "empty", "another"])
def test_a_broken_file_is_reported_and_the_model_trained_anew(tmp_path, name, how):
    first = trained(protocol=SHORT, folder=tmp_path)
    file = only(tmp_path, name)
    content = file.read_bytes()
    another = content[:-3] + bytes(byte ^ 1 for byte in content[-3:])
    file.write_bytes({"truncated": content[:-30], "empty": b"", "another": another}[how])
    with pytest.warns(JournalWarning, match=f"{name}.*trained anew"):
        again = trained(protocol=SHORT, folder=tmp_path)
    assert (again.cached, outcome(again)) == (False, outcome(first))
    assert trained(protocol=SHORT, folder=tmp_path).cached


def test_weights_of_a_model_with_other_settings_are_refused(tmp_path):
    run_training("zoo:windowed", corpus("automaton:size=20k", "train"), protocol=SHORT, folder=tmp_path)
    file = only(tmp_path, "best.safetensors")
    with pytest.raises(SpecError, match=r"does not fit zoo:transformer: .*layers.0.window 64 there, not set here"):
        load_weights("zoo:transformer", file)
    assert load_weights("zoo:windowed", file).spec.startswith("zoo:windowed, trained")


def test_weights_of_another_model_are_refused_with_the_names_of_the_tensors(tmp_path):
    trained(protocol=SHORT, folder=tmp_path)
    file = only(tmp_path, "best.safetensors")
    tensors = load_file(file)
    tensors["new.weight"] = tensors.pop("embed.weight")
    tensors["head.bias"] = torch.zeros(7)
    save_file(tensors, file)
    expected = (
        r"does not fit tiny_models:Functional. Tensors missing: embed.weight; not in the model: new.weight; "
        r"of another shape: head.bias \[7\] for \[32\]"
    )
    with pytest.raises(SpecError, match=expected):
        trained(protocol=SHORT, folder=tmp_path)
    lm = as_model(Functional(seed=1))
    with pytest.raises(SpecError, match=expected):
        load_weights(lm, file)
    assert same(lm.module.state_dict(), Functional(seed=1).state_dict())
    with pytest.raises(SpecError, match=r"missing: .*, .*, .*, .*, .* and \d+ more"):
        load_weights("demo", file)


def test_missing_and_truncated_weights_are_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"12")
    with pytest.raises(SpecError, match=r"there are no weights at .*nowhere"):
        load_weights(as_model(Functional()), tmp_path / "nowhere")
    with pytest.raises(SpecError, match="short is no whole file of weights"):
        load_weights(as_model(Functional()), tmp_path / "short")


# -------------------------------------------------------------------------------------------------- resumed


def interrupted(step, folder, module=Functional, **options):
    def stop(done, nats, expected):
        if done == 64 * step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(module(), progress=stop, folder=folder, **options)


def dropping():
    return Tied(0.2)


@cache
def uninterrupted(**options):
    return outcome(trained(dropping(), **options))


LATER = [pytest.param(step, {}, marks=pytest.mark.thorough) for step in (2, 3, 5, 6, 7, 8, 9, 10)]


@pytest.mark.parametrize(("step", "options"), [(1, {}), (4, {}), (11, {}), (5, {"held_out": None}), *LATER])
def test_a_training_resumes_at_any_step_with_the_same_outcome(save_each_step, tmp_path, step, options):
    interrupted(step, tmp_path, dropping, **options)
    result = trained(dropping(), folder=tmp_path, **options)
    assert (result.resumed_at, outcome(result)) == (step, uninterrupted(**options))


FORGOTTEN = {
    "the optimizer": lambda point: point["optimizer"].update(state={}),
    "the weights": lambda point: point.update(weights=snapshot(as_model(Tied()))),
    "a step": lambda point: point["losses"].pop(),
    "an evaluation": lambda point: point["evaluations"].pop(0),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_point_without_one_of_its_parts_changes_the_outcome(save_each_step, tmp_path, forgotten):
    interrupted(6, tmp_path, dropping)
    file = only(tmp_path, "point.pt")
    point = torch.load(file)
    FORGOTTEN[forgotten](point)
    torch.save(point, file)
    result = trained(dropping(), folder=tmp_path)
    assert result.resumed_at > 0
    assert outcome(result) != uninterrupted()


def test_a_fresh_training_does_not_resume(save_each_step, tmp_path):
    interrupted(6, tmp_path)
    assert trained(folder=tmp_path, fresh=True).resumed_at == 0


def trained_until_killed(folder):
    def die(done, nats, expected):
        if done == 64 * 8:
            os.kill(os.getpid(), signal.SIGKILL)

    Saver.PAUSE = Saver.SHARE = 0.0
    trained(folder=Path(folder), progress=die)


def test_a_killed_training_resumes_with_the_same_outcome(tmp_path):
    code = "import sys, test_training; test_training.trained_until_killed(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    result = trained(folder=tmp_path)
    assert (result.resumed_at, outcome(result)) == (8, outcome(reference()))
    assert not list(tmp_path.glob("models/*/point.pt"))


class Foreign:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


UNUSABLE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-500]),
    "foreign": lambda file: file.write_bytes(pickle.dumps(Foreign(), protocol=2)),
    "of another model": lambda file: torch.save({"weights": Functional(width=8).state_dict(), "optimizer": {}}, file),
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_an_unusable_point_is_reported_and_runs_no_code(save_each_step, monkeypatch, tmp_path, how):
    monkeypatch.chdir(tmp_path)
    interrupted(6, tmp_path)
    UNUSABLE[how](only(tmp_path, "point.pt"))
    with pytest.warns(JournalWarning, match=r"point\.pt cannot be read"):
        result = trained(folder=tmp_path)
    assert (result.resumed_at, outcome(result)) == (0, outcome(reference()))
    assert not Path("ran").exists()


def test_a_training_whose_points_cannot_be_saved_warns_and_goes_on(save_each_step, tmp_path):
    def occupy(done, nats, expected):
        """Put a file in place of all folders, between the first and the third step."""
        if done == 64:
            (tmp_path / "models").rename(tmp_path / "moved")
            (tmp_path / "models").touch()
        elif done == 3 * 64:
            (tmp_path / "models").unlink()

    with pytest.warns(JournalWarning, match=r"no checkpoint can be saved \("):
        assert trained(folder=tmp_path, progress=occupy).best_step == 12


@pytest.mark.parametrize("when", ["at once", "at the end"])
def test_a_trained_model_that_cannot_be_kept_is_returned_with_a_warning(tmp_path, when):
    def occupy(done, nats, expected):
        if (tmp_path / "models").is_dir():
            (tmp_path / "models").rename(tmp_path / "moved")
            (tmp_path / "models").touch()

    if when == "at once":
        (tmp_path / "models").touch()
    with pytest.warns(JournalWarning, match="nothing of this training is kept" if when == "at once" else "trains it again"):
        result = trained(folder=tmp_path, progress=occupy)
    assert outcome(result) == outcome(reference())


# --------------------------------------------------------------------------------------------------- failure


class Root(Functional):
    """Wrong: from the seventh step, the gradient of a square root at zero is not finite."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))
        self.steps = 0

    def forward(self, input_ids, state=None):
        self.steps += self.training
        logits, state = super().forward(input_ids, state)
        return logits + (self.gain.abs().sqrt() if self.steps > 6 else 0), state


def test_a_gradient_that_is_not_finite_stops_the_training(tmp_path):
    module = Root()
    lm, module.steps = as_model(module), 0
    with pytest.raises(TrainingError) as caught:
        trained(lm, folder=tmp_path)
    file = only(tmp_path, "best.safetensors")
    place = r":Root on ids\[test\], step 7: the loss is .*, the gradient norm nan \(.*, at learning rate 0\.00"
    cause = r"; 1 gradients are not finite, in backward order the first is that of gain\."
    assert re.search(f"{place}.*{cause}.*those after 4 steps, are in {re.escape(str(file))}", str(caught.value))
    assert load_weights(as_model(Root()), file).spec.endswith("Root, trained 4 steps on ids[test]")


class Overflowing(Functional):
    """Wrong: its logits overflow from the third evaluation."""

    examined = 0

    def forward(self, input_ids, state=None):
        self.examined += not self.training and len(input_ids) > 1
        logits, state = super().forward(input_ids, state)
        return logits * (float("inf") if self.examined > 8 else 1), state


def broken_head():
    module = Functional()
    module.head.bias.data[3] = float("nan")
    return module


@pytest.mark.parametrize(
    ("module", "held_out", "message"),
    [
        (broken_head, None, r"step 1: the loss is nan, the gradient norm nan, .*the first is that of head\.bias"),
        (broken_head, UNSEEN, r"after 0 steps the loss of held-out crop 0 of 16 is nan"),
        (Overflowing, UNSEEN, r"after 8 steps the loss of held-out crop 0 of 16 is nan\. The last training loss was"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_training(module, held_out, message):
    with pytest.raises(TrainingError, match=message):
        trained(module(), held_out=held_out)


@pytest.mark.parametrize("held_out", [UNSEEN, None])
def test_a_loss_that_diverges_stops_the_training(held_out, tmp_path):
    wild = replace(SMALL, lr=30.0, warmup=0.0, clip=None, steps=100)
    with pytest.raises(TrainingError, match=r"diverged: after 4, 8, 12 steps its .* a uniform guess costs 3.466") as caught:
        trained(held_out=held_out, protocol=wild, folder=tmp_path)
    assert ("those after 0 steps" in str(caught.value)) == (held_out is not None)


def test_a_model_with_a_large_initial_loss_may_learn():
    module = Functional()
    module.head.weight.data *= 100
    result = trained(module, protocol=replace(SMALL, steps=30))
    first = result.record.series["held_out_loss"].y[0]
    assert first > 10
    assert result.nll < first


# -------------------------------------------------------------------------------------------------- refused


def changed(**attributes):
    module = Functional()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (Stepper(), SpecError, "is no torch module"),
        (Functional().requires_grad_(False), SpecError, "no parameter with requires_grad=True"),
        (Functional().bfloat16(), SpecError, r"7 parameters in torch.bfloat16, for example embed.weight.*Load it with @fp32"),
        (changed(context_length=15), ProtocolError, "seq_len=16 is more than .*:Functional reads: at most 15 tokens"),
        (replace(as_model(Functional()), codebooks=Codebooks((8, 8), (0, 1), (0, 0))), SpecError, "reads frames of 2 codes"),
        (changed(kept=Functional().head.weight * 2), SpecError, "cannot be copied"),
        (Changed(lambda logits, state: (logits.detach(), state)), ModelError, "no gradient: the model runs under torch"),
        (Changed(lambda logits, state: (logits.exp().add_(1), state)), ModelError, "no gradient: .* by an inplace operation"),
    ],
    ids=["no module", "frozen", "16 bits", "short context", "codebooks", "graph", "no gradient", "in place"],
)
def test_a_model_that_cannot_be_trained_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        trained(source)


UNUSABLE_TEXTS = {
    "empty": ({"ids": np.empty(0, dtype=np.int64)}, CorpusError, "gave 0 tokens"),
    "short": ({"ids": TEXT[:64]}, CorpusError, r"ids\[test\] gave 64 tokens, but one batch of 4 crops of 16 tokens needs 65"),
    "cut": ({"protocol": replace(SMALL, tokens=64)}, CorpusError, r"gave 64 tokens \(the protocol reads at most tokens=64\)"),
    "short held out": ({"held_out": TEXT[:16]}, CorpusError, r"held-out text ids\[test\] gave 16 tokens; one crop needs 17"),
    "same": ({"held_out": TEXT.copy()}, CorpusError, "the same text"),
    "vocabulary": ({"ids": TEXT + 1}, StreamError, r"ids\[test\]: token \d+ of the stream has id 32, but the vocabulary of"),
    "vocabulary held out": ({"held_out": UNSEEN + 1}, StreamError, "has id 32, but the vocabulary of"),
}


@pytest.mark.parametrize(("options", "error", "message"), UNUSABLE_TEXTS.values(), ids=UNUSABLE_TEXTS)
def test_unusable_texts_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        trained(**options)


def test_a_text_of_one_batch_is_enough():
    assert trained(ids=TEXT[:65], protocol=replace(SMALL, steps=3)).best_step == 3
