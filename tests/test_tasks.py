"""The tasks that are found by name, the suites they belong to, and the rows that they refuse."""

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
from pytest_lmeval.scoring._answer_metrics import METRICS
from pytest_lmeval.tasks import Choices, Generate, Suite, find, find_suite, names
from pytest_lmeval.tasks._stdlib import PASSAGE

SUITES = {"glue": 8, "superglue": 8, "smallbench": 4, "mmlu": 57, "arc": 2}
FIRST = {
    "cola": "matthews",
    "record": "squad_f1",
    "squad": "squad_f1",
    "squadv2": "squad_f1",
    "lambada_openai": "greedy_match",
}
MMLU = names("mmlu_*")
BY_DEFAULT = [name for name in names() if name not in MMLU[2:]]


@pytest.mark.parametrize("name", [*BY_DEFAULT, *(pytest.param(name, marks=pytest.mark.thorough) for name in MMLU[2:])])
def test_a_task_says_what_it_asks_and_shows_no_examples_of_the_split_it_asks(name):
    task = find(name)
    assert task.name == name
    assert task.style in ("lm_eval", "own") or name.startswith(f"{task.style}:")
    assert (inspect.getdoc(task.ask) or "").strip()
    assert set(task.metrics) <= set(METRICS)
    usual = "accuracy_per_token" if name.startswith("smallbench:") else "accuracy"
    assert task.metrics[0] == FIRST.get(name, usual)
    if isinstance(task.shots, Rows):
        assert task.shots == task.rows.of(task.shots.split) != task.rows
    else:
        assert task.shots == ()


def test_a_suite_has_all_its_members():
    assert {name for name, thing, _ in registry.things("tasks") if isinstance(thing, Suite)} == set(SUITES)
    for name, size in SUITES.items():
        suite = find_suite(name)
        assert (len({task.name for task in suite.tasks}), suite.weighted) == (size, name == "mmlu")
        assert all(find(task.name) is task for task in suite.tasks)


def test_a_name_is_one_task_and_a_pattern_several():
    assert len(names()) == len(set(names())) == len(set(map(find, names())))
    assert len(names("mmlu_*")) == 57
    assert names("*sst2") == ["sst2", "smallbench:sst2"]


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("smallbench:sst2", {"sentence": "s", "label": 0}, "Sentence: s\nSentiment: negative"),
        ("sst2", {"sentence": "s", "label": 1}, "s\nQuestion: Is this sentence positive or negative?\nAnswer: positive"),
        ("smallbench:rte", {"sentence1": "p", "sentence2": "h", "label": 0}, "Premise: p\nHypothesis: h\nRelation: entailment"),
        (
            "smallbench:rte",
            {"sentence1": "p", "sentence2": "h", "label": 1},
            "Premise: p\nHypothesis: h\nRelation: not entailment",
        ),
        ("smallbench:boolq", {"passage": "p", "question": "q", "label": 1}, "Passage: p\nQuestion: q\nAnswer: yes"),
        ("smallbench:mrpc", {"sentence1": "a", "sentence2": "b", "label": 0}, "Sentence 1: a\nSentence 2: b\nParaphrase: no"),
        ("lambada_openai", {"text": "It was only a dream"}, "It was only a dream"),
        (
            "squadv2",
            {"title": "t", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}},
            "Title: t\n\nBackground: c\n\nQuestion: q\n\nAnswer: unanswerable",
        ),
    ],
)
def test_a_question_with_its_target_reads_like_this(name, row, text):
    question = find(name).ask(row)
    assert question.prompt + question.target == text
    if name == "squadv2":
        assert isinstance(question, Generate)
        assert question.answers == ("unanswerable", "")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: find("mmlu"),
            TaskError,
            r'mmlu is a suite of 57 tasks.*`lmeval.suite\(lm, "mmlu"\)`.*such as "mmlu_abstract_algebra"',
        ),
        (lambda: find_suite("boolq"), TaskError, r'boolq is a task, not a suite. Ask it by `lmeval.task\(lm, "boolq"\)`'),
        (
            lambda: find("bolq"),
            RegistryError,
            r"no task 'bolq'. Did you mean boolq\? There are: arc, .*mmlu and 57 more of mmlu, piqa,",
        ),
        (lambda: find("mmlu_astronomie"), RegistryError, "Did you mean mmlu_astronomy"),
        (lambda: find("smallbench:cola"), RegistryError, "Did you mean smallbench:boolq"),
        (lambda: find("boolq:1"), RegistryError, r"no task 'boolq:1'. Did you mean boolq\?"),
        (lambda: find_suite("super_glue"), RegistryError, "Did you mean superglue"),
        (lambda: tasks.by_name(find("boolq"), find("boolq")), TaskError, "two of boolq, boolq have the same name"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_one(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_public_names_of_tasks_are_there():
    assert sorted(tasks.__all__) == tasks.__all__
    assert all(hasattr(tasks, name) for name in tasks.__all__)


LABEL = r"the label is (-1|2|4|None), and there are choices 0 to \d"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sst2", {"sentence": "Fine .", "label": -1}, LABEL),
        ("boolq", {"passage": "p", "question": "q", "label": 2}, LABEL),
        ("hellaswag", {"activity_label": "A", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": ""}, LABEL),
        ("mmlu_anatomy", {"question": "q", "choices": list("abcd"), "answer": 4}, LABEL),
        ("mmlu_anatomy", {"question": "q", "choices": list("abcd"), "answer": None}, LABEL),
        (
            "record",
            {"passage": "p", "query": "@placeholder", "entities": ["Al"], "answers": ["Bo"]},
            r"the answers \['Bo'\] are not all among the entities \['Al'\]",
        ),
        (
            "stdlib_next",
            {"document": "d", "passage": "p", "continuations": [" a", "", " b", " c"], "answer": 0},
            "each has text to be scored",
        ),
        (
            "squad",
            {"title": "t", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}},
            r"there is no answer, .* asked by the task squadv2",
        ),
    ],
)
def test_a_row_without_a_right_answer_is_refused(name, row, message):
    with pytest.raises(TaskError, match=message):
        find(name).ask(row)


def test_a_label_of_minus_one_would_pass_without_that_check():
    """The broken twin: Python's own indexing takes -1 for the last choice."""
    assert (" no", " yes")[-1] == " yes"


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


def test_stdlib_next_asks_for_the_continuation_of_a_passage(questions):
    assert 150 <= len(questions) <= 200
    assert len({row["passage"] for row in questions}) == len(questions)
    texts = {document.name: document.text for document in corpus("stdlib", "test").documents()}
    for row in questions:
        question = find("stdlib_next").ask(row)
        assert isinstance(question, Choices)
        assert 200 <= len(question.prompt.encode()) <= 500
        assert {len(choice.encode()) for choice in question.choices} == {60}
        assert len(set(question.choices)) == 4
        assert all(choice[0] == " " and not choice[1].isspace() for choice in question.choices)
        follows = [row["passage"] + continuation in texts[row["document"]] for continuation in row["continuations"]]
        assert follows == [index == row["answer"] for index in range(4)]


def test_stdlib_next_favours_no_index_of_the_right_answer(questions):
    """Four indices of 200 questions: 50 each, give or take 6."""
    counts = collections.Counter(row["answer"] for row in questions)
    assert all(25 <= counts[index] <= 75 for index in range(4)), counts


def test_a_passage_ends_with_a_word_and_the_rest_begins_with_one():
    text = "word " * 60
    (passage, continuation) = PASSAGE.match(text).groups()
    assert text.startswith(passage + continuation)
    assert passage.endswith("word")
    assert continuation.startswith(" word")


def in_a_new_process(code, seed="0"):
    env = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)


def test_stdlib_next_is_the_same_in_every_process(questions):
    code = "import json; from pytest_lmeval.tasks import find; print(json.dumps(list(find('stdlib_next').rows())))"
    assert in_a_new_process(code, seed="7") == questions


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("from pytest_lmeval.tasks import find; find('boolq')", set()),
        ("import numpy, pytest_lmeval.tasks._superglue", {"numpy"}),  # this test can fail
        ("import pytest_lmeval.scoring._metrics", {"numpy"}),
    ],
)
def test_finding_a_task_or_a_metric_imports_nothing_heavy(code, heavy):
    modules = set(in_a_new_process(f"{code}; import json, sys; print(json.dumps(sorted(sys.modules)))"))
    libraries = {"sklearn", "sacrebleu", "rouge_score", "torchmetrics"}
    assert modules & {"torch", "numpy", "datasets", "transformers", *libraries} == heavy
