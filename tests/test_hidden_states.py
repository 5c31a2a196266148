"""Hidden states in one pass: the numbers of all vectors at once, whatever the batches and pieces, and errors that say why."""

import dataclasses
import functools
import weakref

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, Functional, Stateless, Stepper
from torch import nn

import pytest_lmeval
from pytest_lmeval import Document, HiddenStates, load_hidden_states
from pytest_lmeval._session import Session
from pytest_lmeval.data._corpus import Corpus
from pytest_lmeval.engine import Policy
from pytest_lmeval.errors import ArgumentError, LmevalError, ModelError, NotFiniteError, StreamError, UnreadableError
from pytest_lmeval.measures import Lmeval, _hidden_reading, _hidden_states
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.measures._hidden_states import hidden_batches, measure_hidden_states
from pytest_lmeval.models._failures import NoMemory
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._journal import Checkpoints, Saver
from pytest_lmeval.report._figures import figures
from pytest_lmeval.scoring import _hidden_states as sums
from pytest_lmeval.scoring._hidden_files import read_checkpoint

LAYERS = ["blocks.0", "blocks.1", "blocks.2"]


class Deep(nn.Module):
    """Three blocks of a GRU; their state is passed and returned."""

    def __init__(self, limit=None, width=16):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCAB, width)
            self.blocks = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(3))
            self.head = nn.Linear(width, VOCAB)
        if limit is not None:
            self.context_length = limit

    def forward(self, input_ids, state=None):
        hidden, states = self.embed(input_ids), []
        for number, block in enumerate(self.blocks):
            hidden, own = block(4 * hidden, None if state is None else state[number])
            states.append(own)
        return self.head(hidden), states


LM = as_model(Deep())
PROBED = Session(budget=1000)


def lmeval(folder=None):
    return Lmeval(VerbContext(Session(folder, budget=1000, verdicts=PROBED.verdicts)))


def drawn(lengths, seed=0, below=VOCAB):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, below, length) for length in lengths]


TEXTS = drawn([3, 40, 1, 17, 8, 25, 2, 33, 8, 52, 5, 11])
OTHER = drawn([12, 30, 7, 50, 9, 21, 4, 18], seed=1, below=VOCAB // 2)


def vectors_of(texts, token, lm=LM):
    """The vectors of each layer [n, d], each text read alone and whole, with nothing of ours."""
    found = {name: [] for name in LAYERS}
    for ids in texts:
        for name in LAYERS:
            module = lm.module.get_submodule(name)
            hook = module.register_forward_hook(lambda module, given, output, name=name: found[name].append(output[0][0]))
            with torch.no_grad():
                lm.module(torch.as_tensor(ids)[None])
            hook.remove()
    take = {"last": lambda one: one[-1:], "mean": lambda one: one.mean(0, keepdim=True), "all": lambda one: one}[token]
    return {name: torch.cat([take(one.double()) for one in own]) for name, own in found.items()}


def check_moments(found, rows):
    """Within float32's rounding of the model in other batches, and far closer where the vectors are the same."""
    expected = torch.cov(rows.T)
    assert found.count == len(rows)
    assert float((found.mean - rows.mean(0)).abs().max()) < 2e-6
    assert float((found.covariance - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("token", ["last", "mean", "all"])
@pytest.mark.parametrize("policy", [Policy(chunk_size=20), Policy(carry=False), Policy(chunk_size=7, multiple=7, batch_size=1)])
def test_moments_are_those_of_all_vectors_however_the_texts_are_read(token, policy):
    result = measure_hidden_states(LM, TEXTS, OTHER, token=token, policy=policy)
    assert [*result.states] == LAYERS
    first, second = (vectors_of(texts, token) for texts in (TEXTS, OTHER))
    for name in LAYERS:
        layer = result.states[name]
        check_moments(layer.first, first[name])
        check_moments(layer.second, second[name])
        check_moments(layer.both, torch.cat([first[name], second[name]]))
        difference = first[name].mean(0) - second[name].mean(0)
        torch.testing.assert_close(layer.difference, difference, atol=2e-6, rtol=1e-4)
    assert result.states.texts == [12, 8]
    assert result.record.cost.tokens == sum(map(len, TEXTS + OTHER))


def test_the_same_vectors_give_the_batch_computation_within_1e_10():
    batches = list(hidden_batches(LM, TEXTS, token="all"))
    rows = torch.cat([batch.vectors["blocks.1"] for batch in batches]).double()
    found = measure_hidden_states(LM, TEXTS, token="all").states["blocks.1"].first
    expected = torch.cov(rows.T)
    assert float((found.covariance - expected).abs().max() / expected.abs().max()) < 1e-10
    squares = rows.float().T @ rows.float() / len(rows) - torch.outer(rows.float().mean(0), rows.float().mean(0))
    assert float((squares.double() - expected).abs().max() / expected.abs().max()) > 1e-10  # float32, subtracted at the end


def test_a_generator_yields_each_vector_once_with_its_text_and_token():
    read = list(hidden_batches(LM, TEXTS, layers=-1, token="all"))
    assert [*read[0].vectors] == ["blocks.2"]
    seen = {(int(text), int(at)) for batch in read for text, at in zip(batch.texts, batch.positions, strict=True)}
    assert seen == {(text, at) for text, ids in enumerate(TEXTS) for at in range(len(ids))}
    assert sum(len(batch.texts) for batch in read) == len(seen)
    rows = {
        (int(text), int(at)): row
        for batch in read
        for text, at, row in zip(batch.texts, batch.positions, batch.vectors["blocks.2"], strict=True)
    }
    expected = iter(vectors_of(TEXTS, "all")["blocks.2"])
    for text, ids in enumerate(TEXTS):
        for at in range(len(ids)):
            torch.testing.assert_close(rows[text, at].double(), next(expected), atol=1e-5, rtol=1e-4)


def equal(one, other):
    """Whether two sums are the same to the last bit, with what they keep to be plotted."""
    pairs = [
        (a[name], b[name]) for own, theirs in zip(one.moments, other.moments, strict=True)
        for a, b in zip(own, theirs, strict=True) for name in a
    ]  # fmt: skip
    kept = zip(one.sample, other.sample, strict=True)
    return (one.texts, one.tokens) == (other.texts, other.tokens) and all(
        [torch.equal(a.mean, b.mean) and torch.equal(a.scatter, b.scatter) for a, b in pairs]
        + [(a.count, a.total, a.lost) == (b.count, b.total, b.lost) for a, b in pairs]
        + [torch.equal(a.vectors[name], b.vectors[name]) for a, b in kept for name in a.vectors]
    )


@pytest.mark.parametrize(("token", "rank"), [("last", None), ("mean", None), ("all", 3)])
@pytest.mark.parametrize("saved", [1, 6])
def test_a_reading_that_is_killed_goes_on_to_the_same_bits(tmp_path, monkeypatch, token, rank, saved):
    read = functools.partial(
        measure_hidden_states, LM, TEXTS, OTHER, token=token, rank=rank, policy=Policy(chunk_size=20, batch_size=2), key="key"
    )
    monkeypatch.setattr(_hidden_reading, "AHEAD", 2)
    whole = read().states
    checkpoints, count = Checkpoints(tmp_path), 0

    def save(self, point):
        nonlocal count
        self.save(point)
        count += 1
        if count == saved:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save_if_due", save)
        with pytest.raises(KeyboardInterrupt):
            read(checkpoints=checkpoints)
    resumed = read(checkpoints=checkpoints)
    assert resumed.resumed_at > 0 or saved == 1
    assert equal(resumed.states, whole)
    states, point = read_checkpoint(checkpoints, "key", LM)
    wrong = dataclasses.replace(point, text=point.text - 1 if point.text else 1, position=0)
    monkeypatch.setattr(_hidden_states, "read_checkpoint", lambda *given: (states, wrong))
    assert not equal(read(checkpoints=checkpoints).states, whole)  # what a point that is one text off would give


def test_shards_merge_to_the_whole_and_are_saved_and_read(tmp_path):
    parts = [(TEXTS[:5], OTHER[:2]), (TEXTS[5:], OTHER[2:])]
    for number, part in enumerate(parts):
        measure_hidden_states(LM, *part, save=tmp_path / f"{number}.safetensors")
    loaded = [load_hidden_states(tmp_path / f"{number}.safetensors") for number in (0, 1)]
    merged, whole = HiddenStates.merged(loaded), measure_hidden_states(LM, TEXTS, OTHER).states
    assert (merged.texts, merged.tokens) == (whole.texts, whole.tokens)
    for name in LAYERS:
        torch.testing.assert_close(merged[name].both.covariance, whole[name].both.covariance, atol=1e-6, rtol=1e-4)
        assert merged[name].first.count == len(TEXTS)
    result = lmeval().hidden_states(LM, merged)
    assert result.record.subject == "12 texts and 8 other texts"
    other = measure_hidden_states(LM, TEXTS, token="mean").states
    with pytest.raises(ArgumentError, match="token 'last' and 'mean' cannot be merged"):
        HiddenStates.merged([merged, other])
    with pytest.raises(ArgumentError, match="are of a model with the fingerprint"):
        lmeval().hidden_states(LM, dataclasses.replace(merged, about={**merged.about, "model": "another"}))
    with pytest.raises(UnreadableError, match="there are no hidden states"):
        load_hidden_states(tmp_path / "none")
    (tmp_path / "0.safetensors").write_bytes((tmp_path / "0.safetensors").read_bytes()[:-9])
    with pytest.raises(UnreadableError, match="it was cut off"):
        load_hidden_states(tmp_path / "0.safetensors")


def test_vectors_kept_for_plots_are_the_same_however_they_come(monkeypatch):
    monkeypatch.setattr(sums, "KEPT", 5)
    one, other = (measure_hidden_states(LM, TEXTS, policy=Policy(batch_size=size)).states.sample[0] for size in (1, 8))
    assert one.drawn.tolist() == other.drawn.tolist()
    assert len(one.drawn) == len(one.vectors["blocks.0"]) == 5
    torch.testing.assert_close(one.vectors["blocks.2"], other.vectors["blocks.2"])


def test_a_separation_is_that_of_texts_the_direction_was_not_chosen_for():
    """Of two sets that do not differ, the direction of their own means looks as if it told them apart, in many dimensions."""
    lm = as_model(Deep(width=64))
    texts = drawn([20] * 80, seed=5)
    result = measure_hidden_states(lm, texts[:40], texts[40:])
    value = result.states[-1].separation
    assert value.low < 0.5 < 1.0
    assert abs(float(value)) < 0.6
    layer = result.states[-1]
    within = (layer.first.variance(layer.direction) + layer.second.variance(layer.direction)) / 2
    assert float(layer.difference.norm()) / within**0.5 > 1.0  # tried on the texts that it was chosen for
    apart = measure_hidden_states(lm, texts[:40], drawn([20] * 40, seed=6, below=2))
    assert apart.separation.low > 3
    assert apart.states[-1].separation.interval is not None
    every = measure_hidden_states(lm, texts[:40], texts[40:], token="all").states[-1].separation
    assert every.interval is None
    with pytest.raises(AttributeError, match="each of four texts"):
        measure_hidden_states(lm, texts[:3], texts[3:6]).separation  # noqa: B018


def test_a_low_rank_says_its_error_and_bounds_the_exact_covariance():
    exact, low = (measure_hidden_states(LM, TEXTS, token="all", rank=rank) for rank in ("exact", 4))
    for name in LAYERS:
        one, other = exact.states[name].first, low.states[name].first
        lacking = torch.linalg.eigvalsh(one.covariance - other.covariance)
        assert other.scatter.shape[0] <= 8
        assert float(lacking[0]) > -1e-9
        assert float(lacking[-1]) <= other.error + 1e-9
        assert 0 < low.record.details["error_of_low_rank"][name] < 1
    assert any("covariances of low rank" in note for note in low.record.notes)
    assert exact.record.details["error_of_low_rank"] == {}


def test_wide_layers_are_of_low_rank_by_default(monkeypatch):
    monkeypatch.setattr(_hidden_states, "EXACT_WIDTH", 15)
    monkeypatch.setattr(_hidden_states, "RANK", 2)
    assert measure_hidden_states(LM, TEXTS).states[0].first.rank == 2
    assert measure_hidden_states(LM, TEXTS, rank="exact").states[0].first.rank is None


def test_layers_are_named_by_number_pattern_and_name():
    def read(layers):
        return [*measure_hidden_states(LM, TEXTS, layers=layers).states]

    assert read(None) == read("blocks.*") == LAYERS
    assert read([-1, 0]) == ["blocks.0", "blocks.2"]
    assert read(["embed", "blocks.1"]) == ["embed", "blocks.1"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"layers": "block.0"}, ArgumentError, r"'block.0' matches no module of .*Did you mean blocks.0\?"),
        ({"layers": 3}, ArgumentError, "layer 3 was asked for, and .* has 3 blocks, blocks.0 to blocks.2: 0 to 2"),
        ({"layers": [None, True]}, ArgumentError, "a module is named by a text"),
        ({"token": "first"}, ArgumentError, "token='first' was asked for"),
        ({"rank": 0}, ArgumentError, "rank=0 was asked for"),
        ({"texts": TEXTS[:1]}, StreamError, r"texts\[1\] has 1 vector.*a covariance needs two"),
        ({"texts": []}, StreamError, r"texts\[0\] has 0 vector"),
        ({"other": [TEXTS[0]]}, StreamError, r"other texts\[1\] has 1 vector"),
        ({"texts": [[1, 2], [3, VOCAB]]}, StreamError, r"texts\[2\]: text 1: token 1 of the stream has id 32"),
        ({"texts": 5}, LmevalError, "a text is a Corpus"),
        ({"texts": ["a", "b"]}, LmevalError, "has no tokenizer"),
        ({"texts": [[1, 2], ["a"]]}, StreamError, "text 1 is .*expected a row of integer token ids"),
    ],
)
def test_what_cannot_be_read_is_said(options, error, said):
    texts = options.pop("texts", TEXTS)
    with pytest.raises(error, match=said):
        measure_hidden_states(LM, texts, options.pop("other", None), **options)


def test_models_without_such_layers_are_refused():
    with pytest.raises(ArgumentError, match="has no list of blocks"):
        measure_hidden_states(as_model(Functional()), TEXTS)
    assert [*measure_hidden_states(as_model(Functional()), TEXTS, layers="cell").states] == ["cell"]
    with pytest.raises(ArgumentError, match="is no torch module"):
        measure_hidden_states(as_model(Stepper()), TEXTS)
    unused = Deep()
    unused.spare = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"spare of .*: not called in a step"):
        measure_hidden_states(as_model(unused), TEXTS, layers="spare")
    shared = Deep()
    shared.blocks[2] = shared.blocks[1]
    with pytest.raises(ModelError, match="is called several times in a step"):
        measure_hidden_states(as_model(shared), TEXTS, layers="blocks.1")


def test_a_text_longer_than_the_model_reads_is_refused_and_can_be_cut():
    for lm in (as_model(Deep(limit=32)), as_model(Limited())):
        layers = None if lm.stateful else "cell"
        with pytest.raises(StreamError, match=r"text 1: it has more than the 32 tokens .*tokens=32"):
            measure_hidden_states(lm, TEXTS, layers=layers)
        assert measure_hidden_states(lm, TEXTS, layers=layers, tokens=32).states.texts == [12]


class Limited(Stateless):
    context_length = 32


def test_a_hidden_state_that_is_not_finite_is_named():
    broken = Deep()
    with torch.no_grad():
        broken.embed.weight[7] = torch.nan
    with pytest.raises(NotFiniteError, match=r"text 1: the hidden state of blocks.0 at token 2 is not finite"):
        measure_hidden_states(as_model(broken), [[1, 2, 3], [4, 5, 7]])


def test_texts_without_a_token_are_skipped_and_counted():
    result = measure_hidden_states(
        LM, Corpus("own", "test", lambda: (Document(str(n), ids=np.arange(n % 3)) for n in range(9)), "x")
    )
    assert result.states.texts == [6]
    assert result.states.skipped == 3
    assert "3 texts without a token were skipped" in result.record.notes


def test_fewer_vectors_than_the_width_are_said():
    notes = measure_hidden_states(LM, TEXTS).record.notes
    assert notes == [
        "12 vectors of width 16: the covariance has a variance along 11 directions at most, and says nothing of the others"
    ]
    assert measure_hidden_states(LM, TEXTS, token="all").record.notes == []


def test_an_iterator_is_read_once_and_memory_that_runs_out_halves_the_batch(monkeypatch):
    whole, steps = measure_hidden_states(LM, TEXTS).states, []
    step = _hidden_reading.hidden_states

    def small(engine, ids, *rest):
        steps.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 8.00 GiB")
        return step(engine, ids, *rest)

    monkeypatch.setattr(_hidden_reading, "hidden_states", small)
    found = measure_hidden_states(LM, iter(TEXTS)).states
    assert max(steps) > 2
    assert found.texts == whole.texts
    torch.testing.assert_close(found[0].first.covariance, whole[0].first.covariance)
    monkeypatch.setattr(_hidden_reading, "unless_full", lambda work: NoMemory(5))
    with pytest.raises(pytest_lmeval.OutOfMemory, match="tokens=N"):
        measure_hidden_states(LM, TEXTS)


def test_a_batch_is_freed_before_the_next_step_and_a_layer_before_the_next_is_described(monkeypatch):
    batches, layers, at_a_step, at_a_layer = [], [], [], []
    step, add, layer_of = _hidden_reading.hidden_states, HiddenStates.add, HiddenStates.__getitem__

    def alive(references):
        return sum(reference() is not None for reference in references)

    def stepped(*given):
        at_a_step.append(alive(batches))
        return step(*given)

    def added(self, which, texts, positions, vectors):
        batches.append(weakref.ref(vectors["blocks.0"]))
        add(self, which, texts, positions, vectors)

    def found(self, name):
        layer = layer_of(self, name)
        at_a_layer.append(alive(layers))
        layers.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(_hidden_reading, "hidden_states", stepped)
    monkeypatch.setattr(HiddenStates, "add", added)
    monkeypatch.setattr(HiddenStates, "__getitem__", found)
    states = measure_hidden_states(LM, TEXTS, OTHER, token="all", policy=Policy(chunk_size=20, batch_size=2)).states
    assert len(at_a_step) > 9
    assert set(at_a_step) == {0}
    assert at_a_layer == [0, 0, 0]
    at_a_layer.clear()
    kept = [states[name] for name in LAYERS]  # as a record would hold them that describes all at once
    assert at_a_layer == [0, 1, 2]
    assert all(kept)


@pytest.mark.parametrize(("held", "tokens"), [(4, 1 << 22), (69_120, 256), (262_144, 256), (1 << 20, 64), (1 << 30, 1)])
def test_a_step_returns_little_but_tokens_enough_to_be_fast(held, tokens):
    """Bytes of the hidden states of a token: of SmolLM2-135M, and of a model of 8 B parameters in 16 bits."""
    assert _hidden_reading.tokens_of(held) == tokens


def test_the_plots_show_explained_variance_both_sets_and_the_layers():
    record = measure_hidden_states(LM, TEXTS, OTHER, names=("wide", "narrow")).record
    drawn = {figure["title"]: figure for figure in figures([record])}
    assert [*drawn] == [
        "Two sets along their direction",
        "Explained variance",
        "First direction by layer",
        "Separation by layer",
    ]
    sets = drawn["Two sets along their direction"]
    assert [choice["label"].rpartition(": ")[2] for choice in sets["choices"]] == LAYERS
    assert [curve["name"].rpartition(", ")[2] for curve in sets["choices"][0]["curves"]] == ["wide", "narrow"]
    assert [len(curve["x"]) for curve in sets["choices"][0]["curves"]] == [12, 8]
    assert sets["kind"] == "scatter"
    explained = drawn["Explained variance"]["choices"][0]["curves"][0]["y"]
    assert explained == sorted(explained)
    assert explained[-1] == pytest.approx(100)
    by_layer = drawn["Separation by layer"]["choices"][0]["curves"][0]
    assert all(low < y < high for low, y, high in zip(by_layer["low"], by_layer["y"], by_layer["high"], strict=True))
    single = {figure["title"] for figure in figures([measure_hidden_states(LM, TEXTS).record])}
    assert single == {"Hidden states along their first directions", "Explained variance", "First direction by layer"}


def test_a_finished_call_is_taken_from_the_journal_with_its_sums(tmp_path):
    def call():
        return lmeval(tmp_path).hidden_states(LM, TEXTS, OTHER)

    first = call()
    assert first.record.certificate.laws["rows"].kept
    again = call()
    assert again.record == first.record
    assert equal(again.states, first.states)
    (tmp_path / first.record.units).unlink()
    assert equal(call().states, first.states)  # read again


def test_the_hidden_states_of_a_transformers_model_are_those_that_it_returns(tmp_path):
    pytest.importorskip("transformers")
    import hf_tiny as tiny

    lm = pytest_lmeval.load(f"hf:{tiny.saved(tmp_path)}")
    texts = drawn([5, 30, 11, 2], below=64)
    found = measure_hidden_states(lm, texts, token="mean", policy=Policy(chunk_size=16)).states
    assert [*found] == ["model.layers.0", "model.layers.1"]
    with torch.no_grad():
        answers = [lm.module(torch.as_tensor(ids)[None], output_hidden_states=True).hidden_states for ids in texts]
    rows = torch.stack([answer[1][0].double().mean(0) for answer in answers])
    torch.testing.assert_close(found[0].first.mean, rows.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0].first.covariance, torch.cov(rows.T), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", ["zoo:mamba2", "zoo:lstm", "zoo:moshi"])
def test_models_of_every_kind_have_hidden_states(spec):
    lm = pytest_lmeval.load(spec)
    frames = lambda length: np.zeros((length, len(lm.codebooks.sizes)), dtype=int) if lm.codebooks else np.arange(length)  # noqa: E731
    texts = [Document(str(length), ids=frames(length)) for length in (3, 9, 5)]
    result = measure_hidden_states(lm, Corpus("own", "test", lambda: iter(texts), "x", tokenized=True), token="all")
    assert result.states.texts == [3]
    assert result.states[0].first.count == 17
