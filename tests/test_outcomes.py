"""Outcomes of generated answers: thoughts are no part of them, cut-off ones are counted, and too many withhold a score."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from msgspec import structs
from reading import measure_task
from test_generation import Script
from tiny_models import Functional

from pytest_lmeval import Choices, Generate, Suite, Task, as_model, suite
from pytest_lmeval.engine import Answer, Prompt
from pytest_lmeval.engine._generation import begin_answers
from pytest_lmeval.errors import TaskError
from pytest_lmeval.gates._compare import Side, compare
from pytest_lmeval.gates._entry import entry_of
from pytest_lmeval.gates._gate import _with_reasons
from pytest_lmeval.gates._margins import Margins
from pytest_lmeval.measures._task_examples import outcome_of
from pytest_lmeval.models._huggingface import HFTokenizer
from pytest_lmeval.report import _tables, _terminal

LM = as_model(Functional())
THINK = ("<think>", "</think>")
ROWS = [{"n": n} for n in range(12)]


def say(*pieces, stop=(), thinking=THINK, thinks=False, eos=None, most=None, judge=None):
    """The answer of a model that says these pieces, bytes of text or the text of a special token, and then ends."""
    tokenizer = Script([*pieces, "<eos>"], eos=len(pieces))
    lm = replace(LM, tokenizer=tokenizer, vocab_size=len(pieces) + 1)
    prompt = Prompt([1], "row", most or len(pieces) + 1, stop, thinking=thinking, thinks=thinks)
    (answer,), choose, _ = begin_answers(lm, [prompt], None if judge is None else lambda number, text: judge(text))
    for token in range(len(pieces) + 1):
        logits = torch.zeros(1, lm.vocab_size)
        logits[0, token] = 1
        choose(logits, [answer])
        if answer.why:
            break
    return answer


@pytest.mark.parametrize(
    ("pieces", "options", "text", "thought", "why"),
    [
        ((b"<think>", b"so\nso", b"</think>", b"\n\n", b"Paris", b"\n", b"And"), {"stop": ("\n",)}, "Paris", "so\nso", "stop"),
        (("<think>", b"so\n", "</think>", b"Paris"), {"stop": ("\n",)}, "Paris", "so", "end"),  # special tokens
        ((b"<th", b"ink>so", b" </thi", b"nk> Paris"), {}, "Paris", "so", "end"),  # in pieces
        ((b"so\n", b"</think>\n", b"Paris"), {"thinks": True, "stop": ("\n",)}, "Paris", "so", "end"),  # begun by the prompt
        ((b"<think>", b"a</think>", b"Rome <think>", b"b</think>", b"no"), {}, "Rome no", "a\nb", "end"),  # twice
        ((b"<think>", b"so"), {}, "", "so", "thinking"),  # the model's own end comes first
        ((b"<think>", b"so", b"so"), {"most": 2}, "", "so", "thinking"),
        ((), {"thinks": True}, "", "", "thinking"),
        ((b"<think>", "<x>", b"so", b"</think>", "<y>", b"Paris"), {"stop": ("<y>P",)}, "", "so", "stop"),
        ((b"<think>", "<x>", b"so", b"</think>", "<y>", b"Paris"), {}, "Paris", "so", "end"),
        ((b"so\n", b"Paris"), {"stop": ("\n",)}, "so", "", "stop"),  # no marker
        ((b"<think>", b"so</think>", b"Paris"), {"thinking": None}, "<think>so</think>Paris", "", "end"),
        ((b"</think>", b"Paris"), {}, "</think>Paris", "", "end"),  # nothing was begun
        ((b"<think>", b"</think>", b"Paris"), {}, "Paris", "", "end"),
    ],
)
def test_thoughts_are_taken_out_before_a_stop_is_searched_for(pieces, options, text, thought, why):
    answer = say(*pieces, **options)
    assert (answer.text, answer.thought, answer.why) == (text, thought, why)


def test_a_judge_is_not_asked_while_the_model_thinks():
    seen = []
    answer = say(
        b"<think>", b"so", b"</think>", b"Pa", b"ris", judge=lambda text: (seen.append(text), text == "Paris" or None)[1]
    )
    assert seen == ["", "Pa", "Paris"]
    assert (answer.text, answer.judged, answer.why) == ("Paris", True, "judged")


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([b"<think>", b"</think>", b"a", b" ", b"\n", b"b\n", b"<", "<x>"]), max_size=9),
    st.booleans(),
    st.sampled_from([(), ("\n",), ("b",), ("<x>",)]),
)
@example([b"<think>", b"<think>", b"</think>", b"a"], False, ())
def test_an_answer_is_what_was_said_outside_of_thoughts_until_a_stop(pieces, thinks, stop):
    """A slow oracle: token by token, one state after the other."""
    inside, text, why, swallow = thinks, "", "", False
    for piece in pieces:
        if inside or piece == b"<think>":
            inside = piece != b"</think>"
            swallow = not inside
            continue
        said = piece if isinstance(piece, str) else piece.decode()
        if swallow:
            said = said.lstrip()
            swallow = not said
        text += said
        if any(one in text for one in stop):
            why = "stop"
            break
    ends = [text.find(one) for one in stop if one in text]
    expected = text[: min(ends, default=None)].replace("<x>", "")
    answer = say(*pieces, thinks=thinks, stop=stop)
    assert (answer.text, answer.why) == (expected, why or ("thinking" if inside else "end"))


def test_the_markers_are_those_of_the_tokenizer():
    class Tokens:
        bos_token_id = eos_token_id = None

        def __init__(self, added=(), template=None):
            self.added_tokens_decoder, self.chat_template = dict(enumerate(added)), template

    def known(**options):
        return HFTokenizer(Tokens(**options), "t").thinking

    assert known() is None
    assert known(added=THINK) == THINK
    assert known(added=("<think>",)) is None
    assert known(added=("[THINK]", "[/THINK]")) == ("[THINK]", "[/THINK]")
    assert known(template="{{ content.split('</think>') }} <think>") == THINK


BYTES = as_model(Functional(vocab=256))


class Parrot:
    """The tokenizer of bytes, of a model that ends its answers with a byte."""

    def __init__(self, end=None, thinking=None):
        self.bos, self.eos, self.thinking = None, end, thinking

    def encode(self, text):
        return BYTES.tokenizer.encode(text)

    def decode(self, ids):
        return BYTES.tokenizer.decode(ids)


def outcomes(ask=None, tokenizer=None, lm=BYTES, **options):
    made = Task("t", ROWS, ask or (lambda row: Generate(f"{row['n']} is", ("x",), max_tokens=4)), **options)
    return measure_task(replace(lm, tokenizer=tokenizer) if tokenizer else lm, made)


def test_an_answer_is_cut_off_only_if_it_might_have_ended_before():
    def asks(**options):
        return lambda row: Generate(f"{row['n']} is", ("x",), **options)

    assert outcomes(asks(max_tokens=4)).cut_off == 1  # the stop is a line break
    assert outcomes(asks(max_tokens=4, stop=())).cut_off == 0  # nothing else ends it
    assert outcomes(asks(max_tokens=4, stop=()), Parrot(end=255)).cut_off == 1  # the model might have
    assert outcomes(asks(max_tokens=1)).cut_off == 0  # one token was asked for
    assert outcomes(asks(max_tokens=4), judge=lambda text: None).cut_off == 0  # a judge that is not certain counts
    assert "cut_off" not in outcomes(lambda row: Choices("x", (" a", " b"), 0)).record.metrics
    assert outcomes(asks(max_tokens=2, stop=()), Parrot(thinking=THINK)).cut_off == 0  # it might think, and did not


def test_a_prompt_that_begins_a_thought_leaves_an_answer_cut_off_that_never_ends_it():
    begun = outcomes(lambda row: Generate("Hm.\n<think>\n", ("x",), (), max_tokens=3), thinking=THINK)
    assert {(one.outcome, one.output) for one in begun.examples} == {("cut off", "")}
    assert all(one.thought for one in begun.examples)
    assert begun.record.settings["thinking"] == sorted(THINK)
    with pytest.raises(TaskError, match=r"exact_match was not measured\. 12 of 12 .* did not end thinking"):
        _ = begun.exact_match


def test_with_too_many_cut_off_a_score_is_not_measured_and_everything_says_why():
    result = outcomes()
    assert list(result.record.metrics) == ["cut_off"]
    assert result.record.details["outcomes"] == {"cut off": 12}
    with pytest.raises(TaskError, match=r"t, 0-shot: exact_match was not measured\. 12 of 12 generated answers were cut off"):
        _ = result.exact_match
    text = "\n".join(_terminal.lines([result.record], width=200))
    assert "exact match  not measured" in text
    assert "12 answers cut off" in text
    (group,) = _tables.groups([result.record])
    assert [row.metric for row in group.rows] == ["exact match", "cut off"]


def test_the_limit_is_the_tasks_own_and_within_it_the_score_counts_what_was_cut_off_as_it_is():
    allowed = outcomes(most_cut_off=1)
    assert (allowed.exact_match, allowed.cut_off, "withheld" in allowed.record.details) == (0, 1, False)
    with pytest.raises(TaskError, match=r"most_cut_off is 2. A share of answers lies between 0 and 1"):
        outcomes(most_cut_off=2)

    def mixed(row):
        return Generate(f"{row['n']} is", ("x",), ("\n",) if row["n"] == 0 else (), max_tokens=4)

    some = outcomes(mixed)
    assert some.cut_off == pytest.approx(1 / 12)
    assert "exact_match" in some.record.metrics
    assert "exact_match" not in outcomes(mixed, most_cut_off=0.05).record.metrics


def test_cut_off_is_a_headline_only_above_0():
    bounded = outcomes(lambda row: Generate(f"{row['n']} is", ("x",), (), max_tokens=4))
    assert "cut_off" not in _tables.headlines(bounded.record)
    assert "cut_off" in _tables.headlines(outcomes(most_cut_off=1).record)
    assert list(bounded.record.metrics) == ["exact_match", "cut_off"]


def test_a_gate_does_not_compare_what_was_not_measured():
    before, after = (
        structs.replace(found.record, examples="examples.jsonl") for found in (outcomes(most_cut_off=1), outcomes())
    )
    (rows,) = compare([(Side(entry_of(before), None), Side(entry_of(after), None))], Margins(), 1)
    row = _with_reasons(after, rows)["exact_match"]
    assert (row.verdict, row.new) == ("missing", None)
    assert row.note.startswith("12 of 12 generated answers were cut off")


def test_a_suite_has_no_average_of_what_was_not_measured():
    def ask(row):
        return Generate(f"{row['n']} is", ("x",), max_tokens=4)

    fine = Task("fine", ROWS, ask, most_cut_off=1)
    with pytest.raises(TaskError, match=r"\[long\] its exact_match was not measured\. 12 of 12"):
        suite(BYTES, Suite("s", (fine, Task("long", ROWS, ask))))
    assert suite(BYTES, Suite("s", (fine,))).average == 0


@pytest.mark.parametrize("thinking", [("<think>",), ("<think>", ""), "<think>", 3])
def test_markers_are_two_texts(thinking):
    with pytest.raises(TaskError, match="t: thinking"):
        Task("t", [], lambda row: None, thinking=thinking)


def test_an_answer_that_was_kept_has_its_thought_and_outcome_again(tmp_path):
    task = Task("t", ROWS, lambda row: Generate("<think>", ("x",), (), max_tokens=3), thinking=THINK, most_cut_off=1)
    first, again = (measure_task(BYTES, task, kept=tmp_path / "kept.jsonl") for _ in range(2))
    assert again.resumed == 12
    assert again.examples == first.examples
    assert first.examples[0].thought
    without = measure_task(BYTES, replace(task, thinking=None), kept=tmp_path / "kept.jsonl")
    assert without.resumed == 0  # where a thought ends decides where an answer does
    assert structs.asdict(without.examples[0])["thought"] == ""


def test_an_empty_answer_is_empty_and_a_refused_one_refused():
    question = Generate("x", ())
    assert outcome_of(Answer(Prompt([1], "row", 9), text=" ", why="stop"), question, BYTES, judged=False) == "empty"
    assert outcome_of(Answer(Prompt([1], "row", 9), text="a", why="stop"), question, BYTES, judged=False) == "answered"
    refused = outcomes(lambda row: Generate(f"{row['n']} is", (), (), max_tokens=4), score=lambda row, answer: None)
    assert refused.record.details["outcomes"] == {"refused": 12}
    assert "12 answers refused" in refused.record.notes
