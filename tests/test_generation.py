"""Generated answers: where one ends, and which text of it is shown."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from tiny_models import Functional

from pytest_lmeval import as_model
from pytest_lmeval.engine import Prompt
from pytest_lmeval.engine._generation import begin_answers

LM = as_model(Functional())


class Script:
    """A tokenizer whose ids are the numbers of these pieces: bytes of text, or a text, which is that of a special token."""

    name, bos = "script", None

    def __init__(self, pieces, eos=None):
        self.pieces, self.eos = pieces, eos
        self.special = {number: piece for number, piece in enumerate(pieces) if isinstance(piece, str)}

    def encode(self, text):
        raise NotImplementedError

    def decode(self, ids):
        return b"".join(self.pieces[one] for one in ids if one not in self.special).decode(errors="replace")


def say(tokenizer, ids, stop=(), judge=lambda text: None):
    """The answer of a model that says these tokens, and the texts that the judge saw."""
    seen = []
    lm = replace(LM, tokenizer=tokenizer, vocab_size=max(ids) + 1)
    prompt = Prompt([1], "row", max_tokens=len(ids), stop=stop)
    (answer,), choose, _ = begin_answers(lm, [prompt], lambda number, text: (seen.append(text), judge(text))[1])
    for token in ids:
        logits = torch.zeros(1, lm.vocab_size)
        logits[0, token] = 1
        choose(logits, [answer])
        if answer.why:
            break
    return answer, seen


def script(*pieces, stop=(), eos=None, **options):
    return say(Script(pieces, eos), list(range(len(pieces))), stop, **options)


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "why"),
    [
        ((b"Paris", b".", "<|im_end|>", b"\n", b"And"), ("<|im_end|>",), "Paris.", "stop"),
        ((b"Paris", "<|im_end|>", b"\nuser", b"And"), ("<|im_end|>\nu",), "Paris", "stop"),  # on into a token of text
        ((b"Paris!\n", "<|im_end|>", b"And"), ("!\n<|im_end|>",), "Paris", "stop"),  # begun inside a token before it
        ((b"a", "<x>", b"b", "<y>", b"c\n", b"d"), ("\n",), "abc", "stop"),  # special tokens before a stop are not shown
        ((b"a", "<x>", b"b", "<y>", b"c\n", b"d"), ("b<y>c",), "a", "stop"),
        ((b"a", "<x>", "<y>", b"b"), ("x><",), "a", "stop"),  # across two, begun inside the first
        ((b"a", "<x>", b"b"), ("ab",), "ab", "length"),  # the model did not say "ab"
        ((b"one tw", b"o thr", b"ee"), ("three", "two th"), "one ", "stop"),  # the first stop in the text
        ((b"one two three", b"!"), ("three", "two"), "one ", "stop"),
        ((b"on", b"e\xe2", b"\x82", b"\xac", b"!"), ("€",), "one", "stop"),
        ((b"one \xe2", b"\x82"), (), "one ", "length"),  # no half a character
        ((b"one \xff", b"two"), (), "one \ufffdtwo", "length"),  # bytes that are none, for certain
    ],
)
def test_a_stop_is_found_in_what_the_model_said_with_its_special_tokens(pieces, stop, text, why):
    answer, seen = script(*pieces, stop=stop)
    assert (answer.text, answer.why) == (text, why)
    assert seen[-1] == text
    assert len(answer.ids) == len(answer.logprobs) == len(seen)


def test_the_end_of_the_model_itself_is_no_stop_and_no_part_of_the_answer():
    answer, seen = script(b"Paris", "<eos>", b"And", eos=1, stop=("\n",))
    assert (answer.text, answer.why, answer.ids) == ("Paris", "end", [0])
    assert seen == ["Paris", "Paris"]


def test_a_judge_sees_no_special_token_and_may_end_the_answer_after_one():
    answer, seen = script(b"Yes", "<think>", b", he", b"re", judge=lambda text: True if "," in text else None)
    assert seen == ["Yes", "Yes", "Yes, he"]
    assert (answer.judged, answer.why) == (True, "judged")


SPECIAL = ("<|im_end|>", "<s>", "|")
TEXTS = st.text("ab<>|é€🙂", min_size=1, max_size=6)


@settings(max_examples=400)
@given(st.lists(TEXTS | st.sampled_from(SPECIAL).map(lambda text: [text]), min_size=1, max_size=6), st.data())
@example([["<s>"], "a"], None)
def test_the_text_is_what_was_said_before_the_first_stop_whatever_the_tokens(said, data):
    """Texts are cut into tokens anywhere, also inside characters; a special token, a list here, is one token."""
    pieces = []
    for part in said:
        raw = part[0] if isinstance(part, list) else part.encode()
        cuts = [] if data is None or isinstance(raw, str) else sorted(data.draw(st.sets(st.integers(1, len(raw)), max_size=4)))
        pieces += [raw] if not cuts else [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b]
    stop = () if data is None else tuple(data.draw(st.lists(TEXTS | st.sampled_from(SPECIAL), max_size=2)))
    answer, seen = script(*pieces, stop=stop)

    expected, why = "", "length"
    for count in range(1, len(pieces) + 1):
        marked = []  # each character, and whether it is one of a special token
        for special, raw in runs(pieces[:count]):
            text = raw if special else raw.decode(errors="ignore")
            marked += [(letter, special) for letter in text]
        written = "".join(letter for letter, _ in marked)
        ends = [written.find(one) for one in stop if one in written]
        expected = "".join(letter for letter, special in marked[: min(ends, default=None)] if not special)
        assert seen[count - 1] == expected
        if ends:
            why = "stop"
            break
    assert (answer.text, answer.why, len(seen)) == (expected, why, count)
    assert all("\ufffd" not in text for text in seen)


def runs(pieces):
    """(False, joined bytes) and (True, text of a special token), in order."""
    raw = b""
    for piece in pieces:
        if isinstance(piece, str):
            yield False, raw
            yield True, piece
            raw = b""
        else:
            raw += piece
    yield False, raw
