"""Texts of known entropy: formulas equal exhaustive counts, texts follow the formulas, and the harness measures both."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reading import measure_perplexity

from pytest_lmeval.data import _automaton as words, _recall as recall, corpus
from pytest_lmeval.data._automaton import Automaton, AutomatonLM, Branch, automaton, entropies, load, stationary, tables, write
from pytest_lmeval.data._corpus import SPLITS
from pytest_lmeval.data._recall import DIGITS, VALUES, Recall, RecallLM, frequencies
from pytest_lmeval.data._synthetic import options_in, tape
from pytest_lmeval.errors import CorpusError
from pytest_lmeval.laws._probe import probe
from pytest_lmeval.models._sources import as_model

SOURCE = automaton()

automata = st.builds(automaton, st.integers(0, 99), st.sampled_from([4, 8, 12, 48]))


def text_of(name, split="test"):
    return "".join(document.text for document in corpus(name, split).documents())


def entropy(chances):
    """Entropy of a distribution, a mapping from outcomes to probabilities."""
    return -sum(chance * math.log(chance) for chance in chances.values() if chance)


# ------------------------------------------------------------------------------------------- both corpora


def test_the_texts_never_change():
    assert text_of("automaton")[:32] == " damo da metodamanatire memi re "
    assert text_of("recall")[:24] == "F>1?S$M%5*X$b&B.9-8,H+@+"
    assert text_of("recall:keys=1024")[:24] == "h5?nz$ll%jO=or.mr:aD?g@,"


@settings(max_examples=10)
@given(st.sampled_from(["automaton:", "recall:", "recall:keys=100,skew=1,"]), st.tuples(*[st.integers(2, 150_000)] * 2))
def test_a_longer_text_begins_with_the_shorter_one(name, sizes):
    shorter, longer = sorted(sizes)
    texts = [text_of(f"{name}size={size}") for size in (shorter, longer)]
    assert list(map(len, texts)) == [shorter, longer]
    assert texts[1].startswith(texts[0])


@pytest.mark.parametrize("name", ["automaton", "recall"])
def test_splits_and_seeds_are_independent_and_a_text_is_generated_while_it_is_read(name):
    found = corpus(f"{name}:size=1000000M", "test")
    assert found.size == 10**12
    assert 1000 < len(next(found.documents()).text) < 100_000
    texts = [text_of(f"{name}:size=20k", split) for split in SPLITS] + [text_of(f"{name}:size=20k,seed=1")]
    for one, other in itertools.combinations(texts, 2):
        size = min(len(one), len(other))
        assert sum(map(str.__eq__, one, other)) < 0.25 * size  # not more than by chance
        assert not {one[i : i + 40] for i in range(size - 40)} & {other[i : i + 40] for i in range(size - 40)}


def test_different_texts_have_different_fingerprints():
    options = {"automaton": ["", "size=1k", "seed=1"], "recall": ["", "size=1k", "seed=1", "values=8", "skew=1"]}
    names = [f"{name}:{option}" for name, some in options.items() for option in some]
    found = {corpus(name, split).fingerprint for name in names for split in SPLITS}
    assert len(found) == 3 * len(names)
    assert corpus("automaton:", "test").fingerprint == corpus("automaton", "test").fingerprint


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("automaton:size=lots", r"'size=lots' is no option of automaton. Options and defaults: automaton:size=200000,seed=0"),
        ("automaton:seed=0.5", "'seed=0.5' is no option"),
        ("automaton:length=3", "'length=3' is no option"),
        ("automaton:size=1", r"a text of 1 byte\(s\) has nothing to predict"),
        ("recall:size=0", r"a text of 0 byte\(s\) has nothing to predict"),
        ("recall:window=3", "'window=3' is no option of recall"),
        ("recall:keys=5000", r"recall:keys=5000,values=16,skew=0: there can be 2 to 4096 keys"),
        ("recall:values=3", "2, 4, 8 or 16 values"),
    ],
)
def test_a_bad_option_is_refused(name, says):
    with pytest.raises(CorpusError, match=says):
        corpus(name, "test")


@settings(max_examples=50)
@given(st.decimals(0, 9000, places=2, allow_nan=False))
def test_numbers_in_a_name_are_exact(number):
    found = options_in("x", f"size={number}k,skew={number}", {"size": 0, "skew": 0.0})
    assert found == {"size": int(number * 1000), "skew": float(number)}


# ---------------------------------------------------------------------------- automaton: entropy


def all_texts(source, size):
    """Each text of `size` bytes and its probability, by enumeration."""
    found = {}
    for path in itertools.product(range(3), repeat=size):
        state, text, chance = 0, "", 1.0
        for choice in path:
            letter, weight, state = source.states[state][choice]
            text, chance = text + letter, chance * weight / 256
        found[text] = found.get(text, 0) + chance
    return found


@settings(max_examples=10)
@given(automata, st.integers(1, 5))
def test_the_entropy_of_a_prefix_equals_that_of_all_texts(source, size):
    texts = all_texts(source, size)
    assert sum(texts.values()) == pytest.approx(1)
    assert words.entropy_of(source, size) == pytest.approx(entropy(texts))
    for text, chance in list(texts.items())[:20]:
        assert words.surprisal(source, text.encode()).sum() == pytest.approx(-math.log(chance))


@settings(max_examples=10)
@given(automata)
def test_the_entropy_of_a_late_byte_equals_the_rate_and_no_window_costs_less(source):
    last, rate = words.entropy_of(source, 20_001) - words.entropy_of(source, 20_000), words.entropy_rate(source)
    assert last == pytest.approx(rate, abs=1e-7)
    assert stationary(source).sum() == pytest.approx(1)
    assert (stationary(source) > 0).all()
    floors = [words.entropy_in_window(source, window) for window in range(5)]
    assert (np.diff(floors) < 1e-12).all()
    assert floors[-1] >= rate - 1e-12
    assert floors[0] == pytest.approx(entropies((stationary(source) @ tables(source)[0])[None])[0])


def test_a_few_bytes_do_not_determine_the_state_and_letter_counts_give_the_same_entropies():
    rate = words.entropy_rate(SOURCE)
    assert rate / math.log(2) == pytest.approx(1.2358, abs=1e-4)  # bits a byte
    assert words.entropy_in_window(SOURCE, 1) > 1.7 * rate
    assert words.entropy_in_window(SOURCE, 4) > 1.15 * rate
    text = text_of("automaton:size=200k")
    for window in (0, 2):
        counts = defaultdict(lambda: defaultdict(int))
        for i in range(window, len(text)):
            counts[text[i - window : i]][text[i]] += 1
        table = np.array([[following.get(letter, 0) for letter in sorted(set(text))] for following in counts.values()])
        counted = table.sum(1) @ entropies(table / table.sum(1, keepdims=True)) / table.sum()
        assert counted == pytest.approx(words.entropy_in_window(SOURCE, window), abs=0.008)


def test_an_automaton_or_a_window_of_unknown_entropy_is_refused():
    for branches in (
        [Branch("a", 128, 0), Branch("a", 128, 0)],  # the letter does not determine the next state
        [Branch("a", 256, 1)],
        [Branch("a", 255, 0)],
        [Branch("a", 300, 0), Branch("b", -44, 0)],
        [Branch("é", 256, 0)],
    ):
        with pytest.raises(ValueError, match="state 0 of 1 has the branches"):
            Automaton((tuple(branches),))
    with pytest.raises(ValueError, match="use a multiple of four"):
        automaton(states=6)
    with pytest.raises(ValueError, match=r"a window of 1 byte\(s\) is smaller than a key of 2"):
        recall.entropy_in_window(Recall(100), 1)


# ------------------------------------------------------------------------- automaton: text and model


def test_the_loss_of_the_optimal_model_is_the_entropy():
    text = corpus("automaton", "test")
    result = measure_perplexity(as_model(load()), text)
    assert text.entropy == pytest.approx(words.entropy_rate(SOURCE), abs=1e-5)
    assert float(result.perplexity) == pytest.approx(math.exp(text.entropy), rel=5e-3)
    assert result.nll.low < text.entropy < result.nll.high
    exact = words.surprisal(SOURCE, text_of("automaton").encode())[1:].mean()
    assert float(result.nll) == pytest.approx(exact, abs=1e-6)  # for this text


@st.composite
def reweighted(draw):
    """The same automaton with other weights."""
    states = []
    for branches in SOURCE.states:
        cuts = sorted(draw(st.lists(st.integers(1, 255), min_size=2, max_size=2, unique=True)))
        weights = np.diff([0, *cuts, 256]).tolist()
        states.append(tuple(branch._replace(weight=weight) for branch, weight in zip(branches, weights, strict=True)))
    return Automaton(tuple(states))


def divergence(other):
    """Kullback-Leibler divergence of a reweighted automaton from SOURCE, nats per byte: both are always in the same state."""
    true, wrong = tables(SOURCE)[0], tables(other)[0]
    return stationary(SOURCE) @ (true * np.log(np.where(true > 0, true, 1) / np.where(true > 0, wrong, 1))).sum(1)


TEXT = text_of("automaton:size=100k").encode()


@settings(max_examples=10)
@given(reweighted())
def test_a_reweighted_automaton_loses_its_divergence(other):
    excess = words.surprisal(other, TEXT) - words.surprisal(SOURCE, TEXT)
    blocks = excess.reshape(-1, 500).mean(1)
    assert divergence(other) >= 0
    assert excess.mean() == pytest.approx(divergence(other), abs=6 * blocks.std() / math.sqrt(len(blocks)) + 1e-12)


def test_the_harness_measures_a_small_divergence():
    (likely, medium, rare), rest = SOURCE.states[2], SOURCE.states[3:]
    moved = (likely._replace(weight=likely.weight - 50), medium, rare._replace(weight=rare.weight + 50))
    other = Automaton((*SOURCE.states[:2], moved, *rest))
    text = corpus("automaton:size=100k", "test")
    right, wrong = (measure_perplexity(as_model(AutomatonLM(source)), text).nll for source in (SOURCE, other))
    assert 0 < divergence(other) < 0.01
    assert wrong - right == pytest.approx(divergence(other), rel=0.1)


@settings(max_examples=8)
@given(automata, st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 9))
def test_chunks_give_the_exact_probabilities(source, sizes, seed):
    text = next(write(source, [tape(seed, size=sum(sizes))])).encode()
    model, state, parts = AutomatonLM(source), None, []
    for chunk in torch.split(torch.tensor(list(text))[None].expand(2, -1), sizes, dim=1):
        logits, state = model(chunk, state)
        parts.append(logits)
    chances = torch.cat(parts, 1).softmax(-1)[1, torch.arange(len(text) - 1), list(text[1:])]
    np.testing.assert_allclose(-np.log(chances.numpy()), words.surprisal(source, text)[1:], atol=1e-5)


MODELS = {"automaton": load, "recall": recall.load_windowed, "two digits": lambda: RecallLM(Recall(100, 4, 1.0), window=40)}


@pytest.mark.parametrize("name", ["automaton", "two digits", pytest.param("recall", marks=pytest.mark.thorough)])
def test_the_probe_finds_the_optimal_models_exact(name):
    result = probe(as_model(MODELS[name]().eval()), budget=1000)
    assert result.verdict == "exact-any-chunk", result


def test_a_text_of_another_source_has_a_large_finite_loss():
    with pytest.raises(CorpusError, match=r"byte 3 of the text is b'X', after b' da': that cannot come from this automaton"):
        words.surprisal(SOURCE, b" daXmo")
    result = measure_perplexity(as_model(load()), list(b"The quick brown fox"))
    assert 10 < float(result.nll) < 30


# -------------------------------------------------------------------------------- recall: entropy


def all_pairs(source, pairs):
    """Each text of so many pairs and its probability, over all tables and keys."""
    found = defaultdict(float)
    often = frequencies(source)
    for table in itertools.product(VALUES[: source.values], repeat=source.keys):
        for keys in itertools.product(range(source.keys), repeat=pairs):
            found["".join(DIGITS[key] + table[key] for key in keys)] += float(np.prod(often[list(keys)]))
    return {text: chance / source.values**source.keys for text, chance in found.items()}


def given_before(texts, end, window):
    """Entropy of byte `end` of the texts given the `window` bytes before it."""
    joint, before = defaultdict(float), defaultdict(float)
    for text, chance in texts.items():
        joint[text[end - window : end + 1]] += chance
        before[text[end - window : end]] += chance
    return entropy(joint) - entropy(before)


small = st.builds(Recall, st.integers(2, 3), st.sampled_from([2, 4]), st.sampled_from([0.0, 0.5, 2.0]))


@settings(max_examples=6)
@given(small)
def test_entropies_equal_those_over_all_tables_and_keys(source):
    texts = all_pairs(source, 4)
    assert sum(texts.values()) == pytest.approx(1)
    for end in range(8):
        assert recall.entropy_at(source, end) == pytest.approx(given_before(texts, end, end))
        cut = defaultdict(float)
        for text, chance in texts.items():
            cut[text[: end + 1]] += chance
        assert recall.entropy_of(source, end + 1) == pytest.approx(entropy(cut))


@settings(max_examples=6)
@given(small, st.integers(1, 6))
def test_the_entropy_in_a_window_is_a_bound_and_exact_for_whole_pairs(source, window):
    texts = all_pairs(source, 4)
    counted = (given_before(texts, 6, window) + given_before(texts, 7, window)) / 2  # the last key, the last value
    bound = recall.entropy_in_window(source, window)
    assert counted >= bound - 1e-12
    if window % 2:
        assert counted == pytest.approx(bound)


sources = st.builds(Recall, st.integers(2, 4096), st.sampled_from([2, 16]), st.floats(0, 4))


@settings(max_examples=15)
@given(sources, st.integers(1, 3000))
def test_entropies_add_up_and_decrease(source, size):
    assert frequencies(source).sum() == 1
    assert (frequencies(source) > 0).all()
    last = recall.entropy_of(source, size) - recall.entropy_of(source, size - 1)
    assert last == pytest.approx(recall.entropy_at(source, size - 1), abs=1e-8)
    assert recall.entropy_at(source, size + source.pair) <= recall.entropy_at(source, size) + 1e-12
    bounds = [recall.entropy_in_window(source, window) for window in range(source.digits, 60)]
    assert (np.diff(bounds) < 1e-12).all()


# ------------------------------------------------------------------------------ recall: text and models


@pytest.mark.parametrize("name", ["recall", "recall:keys=200,values=4,skew=1"])
def test_each_document_has_its_own_table(name):
    length, tables = 2 if name == "recall" else 3, []
    for document in itertools.islice(corpus(name, "train").documents(), 5):
        pairs = [document.text[i : i + length] for i in range(0, len(document.text) - length, length)]
        tables.append({pair[:-1]: pair[-1] for pair in pairs})
        assert all(tables[-1][pair[:-1]] == pair[-1] for pair in pairs)
        assert set("".join(tables[-1])) <= set(DIGITS)
        assert set(tables[-1].values()) <= set(VALUES)
    assert all(one != other for one, other in itertools.combinations(tables, 2))


def test_keys_have_their_frequencies():
    text = text_of("recall:skew=1,size=400k")
    counted = np.array([text[::2].count(key) for key in DIGITS]) / 200_000
    expected = frequencies(Recall(skew=1.0))
    np.testing.assert_allclose(counted, expected, atol=5 * np.sqrt(expected.max() / 200_000))
    assert counted[0] / counted[9] == pytest.approx(10, rel=0.05)


def test_the_test_split_is_one_stream_and_the_training_split_many_documents():
    train, held_out = corpus("recall", "train"), corpus("recall", "test")
    assert (held_out.as_stream, train.as_stream) == (True, False)
    assert {document.name for document in held_out.documents()} == {"recall/0/test/0"}
    assert held_out.size == len(text_of("recall")) >= 64_000
    documents = list(train.documents())
    assert len({document.name for document in documents}) == len(documents) > 400
    assert train.size == sum(len(document.text) for document in documents)


@pytest.mark.parametrize("name", [pytest.param("recall", marks=pytest.mark.thorough), "recall:keys=100,values=4,skew=0.5"])
def test_full_memory_reaches_one_entropy_and_a_window_another(name):
    text = corpus(f"{name}{',' if ':' in name else ':'}size=60k", "test")
    options = options_in("recall", name.partition(":")[2], vars(Recall()))
    source = Recall(**options)
    window = 31 * source.pair + source.digits
    full, windowed = (measure_perplexity(as_model(RecallLM(source, w)), text) for w in (None, window))
    assert float(full.nll) == pytest.approx(text.entropy, rel=5e-3)
    assert float(windowed.nll) == pytest.approx(recall.entropy_in_window(source, window), rel=5e-3)
    assert windowed.nll > 1.1 * full.nll


def test_the_loss_at_positions_falls_with_full_memory_only():
    source, positions = Recall(1024), (2000, 5000)
    exact = [np.mean([recall.entropy_at(source, i) for i in range(position - 999, position + 1)]) for position in positions]
    bound = recall.entropy_in_window(source, 95)
    for window, expected, within in ((None, exact, 0.08), (95, [bound, bound], 0.02)):
        lm = as_model(RecallLM(source, window))
        result = measure_perplexity(lm, corpus("recall:keys=1024"), tokens=5_500, positions=positions)
        assert list(result.loss_at.values()) == pytest.approx(expected, abs=within)


@settings(max_examples=10)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 9))
def test_a_windowed_model_ignores_what_is_before_its_window(one, other, seed):
    def last(before):
        model = RecallLM(Recall(), window=21)
        text = "".join(recall.write(Recall(), f"before/{seed}", 2 * before)) + "".join(recall.write(Recall(), "same", 21))
        return model(torch.tensor(list(text.encode()))[None])[0][0, -1]

    assert torch.equal(last(one), last(other))


def test_a_model_with_full_memory_recalls_old_pairs():
    model, table = RecallLM(Recall()), "".join(recall.write(Recall(), "other", 2000))
    query = torch.tensor(list((table + DIGITS[0]).encode()))[None]
    assert model(query)[0][0, -1].argmax() == ord(table[2 * table[::2].index(DIGITS[0]) + 1])
    new = model(query[:, -1:])[0][0, -1]  # all values have one probability, all other bytes another
    assert len(new.unique()) == 2
