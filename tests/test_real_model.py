"""The principal claims on a real model: what is right is certified, what is wrong is not, and rows that leak are read alone."""

from copy import deepcopy
from dataclasses import replace

import pytest

transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from faults_at_size import Planted, PositionsClamped, planted  # noqa: E402
from real_model import MISSING, real_model_folder  # noqa: E402

from pytest_lmeval import Choices, Generate, Task, as_model, load, task  # noqa: E402
from pytest_lmeval._session import Session  # noqa: E402
from pytest_lmeval.engine._losses import token_rounding  # noqa: E402
from pytest_lmeval.laws import probe  # noqa: E402
from pytest_lmeval.measures._context import VerbContext, running_in  # noqa: E402
from pytest_lmeval.measures._task import measure_task  # noqa: E402

pytestmark = [pytest.mark.real_model, pytest.mark.thorough]

READ = 160 + 46  # the work of reading 160 tokens in one call


@pytest.fixture(scope="module")
def folder():
    return real_model_folder() or pytest.skip(MISSING)


@pytest.fixture(scope="module")
def clean(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shallow(folder):
    """Its first layers, which are enough to see a fault in; `benchmarks/test_faults_at_size.py` reads all 30."""
    return transformers.LlamaForCausalLM.from_pretrained(folder, num_hidden_layers=6, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_it_knows_the_capital_of_france(clean, tokenizer):
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(clean(ids).logits[0, -1].argmax()) == " Paris"


def test_the_right_model_is_certified_at_the_floors_with_little_work(clean):
    result = probe(clean)
    certificate = result.certificate
    assert certificate.verdict == "exact-any-chunk"
    assert certificate.with_status("kept") == list(certificate.laws)
    assert certificate.longest >= 320
    assert result.record.details["work"] <= 68 * READ  # 60 for the laws of every model, the rest for `packed`


def test_positions_as_if_only_24_tokens_were_cached_are_not_certified(shallow):
    small = deepcopy(shallow)
    small.resize_token_embeddings(4096)  # most of the work is that of the vocabulary
    certificate = probe(planted(small, PositionsClamped, 24), budget=1).certificate
    assert certificate.verdict == "inexact"
    assert {"splits", "steps"} <= certificate.broken


class Leaky(Planted):
    """Each row of a batch gets the logits of the one before it."""

    def logits(self, logits, cache, seen):
        return logits.roll(1, 0)


WORDS = ["cat", "house", "river", "python", "garden", "winter", "number", "function"]
PLURALS = Task(
    "plurals",
    [{"word": word, "number": number} for number, word in enumerate(WORDS)],
    lambda row: Choices(f"{row['number']}. The plural of {row['word']} is", (f" {row['word']}s", f" {row['word']}x"), answer=0),
)


def likelihoods(result):
    return [one for example in result.examples for one in example.loglikelihoods]


def test_rows_that_see_each_other_are_read_alone(shallow, tokenizer):
    lm = as_model(planted(shallow, Leaky), tokenizer=tokenizer)
    right, wrong = (measure_task(model, PLURALS) for model in (as_model(shallow, tokenizer=tokenizer), lm))
    assert likelihoods(wrong) != pytest.approx(likelihoods(right), abs=1)  # without a certificate, rows are read side by side
    with running_in(VerbContext(Session(budget=1))):
        found = task(lm, PLURALS)
    assert likelihoods(found) == pytest.approx(likelihoods(right), abs=1e-3)
    assert found.accuracy == right.accuracy
    assert found.record.certificate.verdict == "inexact"
    assert found.record.certificate.broken == {"rows"}


CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Egypt": "Cairo", "Norway": "Oslo", "Kenya": "Nairobi",
    "Austria": "Vienna", "Cuba": "Havana", "Ghana": "Accra", "Latvia": "Riga", "Nepal": "Kathmandu", "Spain": "Madrid",
}  # fmt: skip
CONTINUED = ("", " and it is the largest city of the country, with a long history")  # 1 to 3 tokens, and 14 more


def test_two_precisions_differ_by_the_rounding_that_makes_a_tie(folder):
    """The difference of two choices errs by `token_rounding` times the root of their tokens, whatever their length."""
    choices = [tuple(f" {city}{more}" for city in CAPITALS.values()) for more in CONTINUED]
    rows = [{"land": land, "choices": some} for land in CAPITALS for some in choices]
    asked = Task("capitals", rows, lambda row: Choices(f"The capital of {row['land']} is", row["choices"], 0))
    exact, rounded = (measure_task(load(f"hf:{folder}@{name}", device="cpu"), asked).examples for name in ("fp32", "bf16"))
    for more in (0, 1):
        errors = []
        for one, other in zip(exact[more::2], rounded[more::2], strict=True):
            assert other.rounding == token_rounding(torch.bfloat16)
            gaps = [np.diff(example.loglikelihoods) for example in (one, other)]
            errors += list((gaps[1] - gaps[0]) / np.sqrt(np.maximum(one.tokens[1:], one.tokens[:-1])))
        assert 0.5 < np.sqrt(np.mean(np.square(errors))) / token_rounding(torch.bfloat16) < 2
    assert exact[0].rounding < 1e-5


def test_a_turn_ends_at_the_special_token_that_is_its_stop_and_judges_see_neither_it_nor_half_an_emoji(folder):
    lm, seen = load(f"hf:{folder}"), []
    lm.tokenizer.ends = ()  # as of a model whose configuration forgets that its turns end with one
    questions = ["What is the capital of France? Answer with one word.", "Write three emoji of animals."]
    asked = [[{"role": "user", "content": one}] for one in questions]
    rows = [{"q": lm.tokenizer.tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)} for one in asked]

    def ask(row):
        return Generate(row["q"], (), stop=("<|im_end|>",), max_tokens=24)

    chat = Task("chat", rows, ask, judge=lambda text: seen.append(text), special_tokens=True)
    france, animals = measure_task(lm, chat).examples
    assert france.output.rstrip(".").endswith("Paris")
    assert set(animals.output) & set("🐶🐱🐦🐟🐠🐻🐘🐍🐎🐢🦁🐒")
    assert not {letter for text in seen for letter in text} & {"\ufffd", "|"}
    with_what_follows = measure_task(lm, replace(chat, rows=rows[:1], ask=lambda row: replace(ask(row), stop=())))
    assert len(with_what_follows.examples[0].generated) > len(france.generated)


def test_a_choice_that_merges_with_the_whole_prompt_is_scored_after_the_beginning_of_sequence(folder):
    rows = [{"a": "un", "b": "happy"}, {"a": "He", "b": "llo"}]
    asked = measure_task(load(f"hf:{folder}"), Task("border", rows, lambda row: Choices(row["a"], (row["b"], "zzz"), 0)))
    assert (asked.accuracy, asked.record.details["retokenized"]) == (1, 1)  # "Hello" is one token, and the prompt has no other
