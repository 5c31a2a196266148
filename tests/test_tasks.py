"""Tasks by name, the suites they belong to, and the rows that they refuse."""

import collections
import inspect
import json
import os
import subprocess
import sys

import pytest

from pytest_lmeval import registry, tasks
from pytest_lmeval.data import Rows, corpus
from pytest_lmeval.errors import RegistryError, TaskError
from pytest_lmeval.tasks import Choices, Generate, Suite, find, find_suite, names
from pytest_lmeval.tasks._stdlib import PASSAGE

ALL = names()
SUITES = [name for name, thing, _ in registry.things("tasks") if isinstance(thing, Suite)]
# See `Task.metrics`; here so that a name that is misspelt in a task is found without running it.
METRICS = {
    "accuracy", "accuracy_per_character", "accuracy_per_byte", "accuracy_per_token", "f1", "f1_macro", "matthews",
    "exact_match", "squad_f1", "greedy_match", "perplexity", "has_answer_exact_match", "has_answer_f1", "no_answer_accuracy",
}  # fmt: skip

FIRST = {
    "cola": "matthews",
    "record": "squad_f1",
    "squad": "squad_f1",
    "squadv2": "squad_f1",
    "lambada_openai": "greedy_match",
}


@pytest.mark.parametrize("name", ALL)
def test_a_task_is_found_by_its_name(name):
    task = find(name)
    assert task.name == name
    assert task.style in ("lm_eval", "own") or name.startswith(f"{task.style}:")
    assert set(task.metrics) <= METRICS
    assert (inspect.getdoc(task.ask) or "").strip(), "a page that teaches says what is asked"


@pytest.mark.parametrize("name", ALL)
def test_suites_average_the_metric_that_stands_first(name):
    usual = "accuracy_per_token" if name.startswith("smallbench:") else FIRST.get(name, "accuracy")
    assert find(name).metrics[0] == usual


@pytest.mark.parametrize("name", ALL)
def test_examples_are_never_taken_from_the_split_that_is_asked(name):
    task = find(name)
    if isinstance(task.shots, Rows):
        assert task.shots.split != task.rows.split
        assert task.shots == task.rows.of(task.shots.split)
    else:
        assert task.shots == ()


@pytest.mark.parametrize(
    ("suite", "size", "weighted"),
    [("glue", 8, False), ("superglue", 8, False), ("smallbench", 4, False), ("mmlu", 57, True), ("arc", 2, False)],
)
def test_a_suite_has_all_its_members(suite, size, weighted):
    found = find_suite(suite)
    assert (len({task.name for task in found.tasks}), found.weighted) == (size, weighted)
    assert all(find(task.name) is task for task in found.tasks)


def test_every_suite_is_counted_above():
    assert set(SUITES) == {"glue", "superglue", "smallbench", "mmlu", "arc"}


def test_a_name_is_one_task_and_a_pattern_several():
    assert len(names()) == len(set(names())) == len(set(map(find, names())))
    assert len(names("mmlu_*")) == 57
    assert names("*sst2") == ["sst2", "smallbench:sst2"]


def test_smallbench_asks_otherwise_than_glue():
    row = {"sentence": "Fine .", "label": 1}
    (ours, theirs) = (find(name).ask(row) for name in ("smallbench:sst2", "sst2"))
    assert ours.prompt == "Sentence: Fine .\nSentiment:"
    assert theirs.prompt == "Fine .\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert ours.target == theirs.target == " positive"


@pytest.mark.parametrize(
    ("name", "row", "read"),
    [
        ("sst2", {"sentence": "s", "label": 0}, "Sentence: s\nSentiment: negative"),
        ("rte", {"sentence1": "p", "sentence2": "h", "label": 0}, "Premise: p\nHypothesis: h\nRelation: entailment"),
        ("rte", {"sentence1": "p", "sentence2": "h", "label": 1}, "Premise: p\nHypothesis: h\nRelation: not entailment"),
        ("boolq", {"passage": "p", "question": "q", "label": 1}, "Passage: p\nQuestion: q\nAnswer: yes"),
        ("mrpc", {"sentence1": "a", "sentence2": "b", "label": 0}, "Sentence 1: a\nSentence 2: b\nParaphrase: no"),
    ],
)
def test_smallbench_reads_as_it_was_given(name, row, read):
    question = find(f"smallbench:{name}").ask(row)
    assert question.prompt + question.target == read


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find("mmlu"), r'mmlu is a suite of 57 tasks.*`lmeval.suite\(lm, "mmlu"\)`.*such as "mmlu_abstract_algebra"'),
        (lambda: find_suite("boolq"), r'boolq is a task, not a suite. Ask it by `lmeval.task\(lm, "boolq"\)`'),
    ],
)
def test_a_suite_is_no_task_and_a_task_no_suite(call, message):
    with pytest.raises(TaskError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find("bolq"), r"no task 'bolq'. Did you mean boolq\? There are: arc, .*mmlu and 57 more of mmlu, piqa,"),
        (lambda: find("mmlu_astronomie"), r"Did you mean mmlu_astronomy"),
        (lambda: find("smallbench:cola"), r"Did you mean smallbench:boolq"),
        (lambda: find("boolq:1"), r"no task 'boolq:1'. Did you mean boolq\?"),
        (lambda: find_suite("super_glue"), r"Did you mean superglue"),
    ],
)
def test_an_unknown_name_is_told_with_those_there_are(call, message):
    with pytest.raises(RegistryError, match=message):
        call()


def test_the_public_names_of_tasks_are_there():
    assert sorted(tasks.__all__) == tasks.__all__
    assert all(hasattr(tasks, name) for name in tasks.__all__)


def test_two_of_a_family_cannot_have_the_same_name():
    with pytest.raises(TaskError, match="two of boolq, boolq have the same name"):
        tasks.by_name(find("boolq"), find("boolq"))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sst2", {"sentence": "Fine .", "label": -1}),
        ("boolq", {"passage": "p", "question": "q", "label": 2}),
        ("multirc", {"paragraph": "p", "question": "q", "answer": "a", "label": -1}),
        ("hellaswag", {"activity_label": "A", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": ""}),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}),
        ("mmlu_anatomy", {"question": "q", "choices": list("abcd"), "answer": 4}),
        ("mmlu_anatomy", {"question": "q", "choices": list("abcd"), "answer": None}),
    ],
)
def test_a_label_outside_the_choices_is_refused(name, row):
    with pytest.raises(TaskError, match=r"the label is (-1|2|4|None), and there are choices 0 to \d"):
        find(name).ask(row)


def test_a_label_that_numbers_no_choice_would_pass_unseen_without_that():
    """The broken twin: Python's own indexing takes -1 for the last choice."""
    assert (" no", " yes")[-1] == " yes"


def test_an_answer_of_record_that_is_no_entity_is_refused():
    row = {"passage": "p", "query": "@placeholder", "entities": ["Al"], "answers": ["Bo"]}
    with pytest.raises(TaskError, match=r"the answers \['Bo'\] are not all among the entities \['Al'\]"):
        find("record").ask(row)


def test_a_choice_without_text_is_refused():
    row = {"document": "d", "passage": "p", "continuations": [" a", "", " b", " c"], "answer": 0}
    with pytest.raises(TaskError, match="each has text to be scored"):
        find("stdlib_next").ask(row)


@pytest.mark.parametrize(
    ("name", "field", "row"),
    [
        ("boolq", "passage", {"question": "q", "label": 1}),
        ("qnli", "sentence", {"question": "q", "label": 1}),
        ("squad", "context", {"title": "t", "question": "q", "answers": {"text": ["a"]}}),
    ],
)
def test_rows_that_share_a_passage_are_one_group(name, field, row):
    task = find(name)
    first, again, other = (
        task.ask(row | {field: text, "question": text + q}) for text, q in (("a", "?"), ("a", "!"), ("b", "?"))
    )
    assert first.group == again.group != other.group


def test_a_question_without_an_answer_is_answered_by_saying_so():
    row = {"title": "t", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}
    question = find("squadv2").ask(row)
    assert isinstance(question, Generate)
    assert question.answers == ("unanswerable", "")
    assert question.prompt + question.target == "Title: t\n\nBackground: c\n\nQuestion: q\n\nAnswer: unanswerable"


def test_a_question_of_squad_without_an_answer_is_refused():
    row = {"title": "t", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}
    with pytest.raises(TaskError, match=r"there is no answer, .* asked by the task squadv2"):
        find("squad").ask(row)


@pytest.mark.parametrize("label", [0, "0", 1, "1"])
def test_a_label_of_hellaswag_may_be_a_text_or_a_number(label):
    row = {"activity_label": "A", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": label}
    assert find("hellaswag").ask(row).answers == (int(label),)


def test_the_word_of_lambada_is_the_only_choice():
    question = find("lambada_openai").ask({"text": "It was only a dream"})
    assert (question.prompt, question.choices, question.answers) == ("It was only a", (" dream",), (0,))


@pytest.fixture(scope="module")
def questions():
    return list(find("stdlib_next").rows())


def test_stdlib_next_asks_what_it_says(questions):
    assert 150 <= len(questions) <= 200
    for row in questions:
        question = find("stdlib_next").ask(row)
        assert isinstance(question, Choices)
        assert 200 <= len(question.prompt.encode()) <= 500
        assert {len(choice.encode()) for choice in question.choices} == {60}
        assert len(set(question.choices)) == 4
        assert all(choice[0] == " " and not choice[1].isspace() for choice in question.choices)


def test_the_right_continuation_stands_where_the_passage_ends(questions):
    texts = {document.name: document.text for document in corpus("stdlib", "test").documents()}
    for row in questions:
        text = texts[row["document"]]
        follows = [row["passage"] + continuation in text for continuation in row["continuations"]]
        assert follows == [place == row["answer"] for place in range(4)]


def test_answers_of_stdlib_next_are_spread_over_the_places(questions):
    """Four places of 200: 50 each, give or take 6; a place that was favoured would be seen."""
    places = collections.Counter(row["answer"] for row in questions)
    assert all(25 <= places[place] <= 75 for place in range(4)), places


def test_a_passage_is_asked_once(questions):
    assert len({row["passage"] for row in questions}) == len(questions)


def test_a_passage_ends_with_a_word_and_the_rest_begins_with_one():
    text = "word " * 60
    (passage, continuation) = PASSAGE.match(text).groups()
    assert text.startswith(passage + continuation)
    assert passage.endswith("word")
    assert continuation.startswith(" word")


def in_a_new_process(code, seed="0"):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
    )
    return json.loads(done.stdout)


def test_stdlib_next_is_the_same_in_every_process(questions):
    code = "import json; from pytest_lmeval.tasks import find; print(json.dumps(list(find('stdlib_next').rows())))"
    assert in_a_new_process(code, seed="7") == questions


def loaded_by(code):
    return in_a_new_process(f"{code}; import json, sys; print(json.dumps(sorted(sys.modules)))")


def test_finding_a_task_loads_nothing_heavy():
    modules = loaded_by("from pytest_lmeval.tasks import find; find('boolq')")
    assert "pytest_lmeval.tasks._superglue" in modules
    assert not {"torch", "numpy", "datasets", "transformers"} & set(modules)


def test_this_test_can_fail():
    modules = loaded_by("import numpy, pytest_lmeval.tasks._glue")
    assert {"numpy", "pytest_lmeval.tasks._glue"} <= set(modules)
