"""Check the tasks found by name, their suites, and the rows that they refuse."""

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

SUITES = {"glue": 8, "superglue": 8, "smallbench": 4, "mmlu": 57, "arc": 2}
FIRST = {"cola": "matthews", "lambada_openai": "greedy_match", **dict.fromkeys(("record", "squad", "squadv2"), "squad_f1")}
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
    assert len(names()) == len(set(names())) == len(set(map(find, names())))
    assert (len(MMLU), names("*sst2")) == (57, ["sst2", "smallbench:sst2"])


PAIR, NO_ANSWER = {"sentence1": "p", "sentence2": "h"}, {"title": "t", "context": "c", "question": "q", "answers": {"text": []}}


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("smallbench:sst2", {"sentence": "s", "label": 0}, "Sentence: s\nSentiment:| negative"),
        ("sst2", {"sentence": "s", "label": 1}, "s\nQuestion: Is this sentence positive or negative?\nAnswer:| positive"),
        ("smallbench:rte", {**PAIR, "label": 0}, "Premise: p\nHypothesis: h\nRelation:| entailment"),
        ("smallbench:rte", {**PAIR, "label": 1}, "Premise: p\nHypothesis: h\nRelation:| not entailment"),
        ("smallbench:boolq", {"passage": "p", "question": "q", "label": 1}, "Passage: p\nQuestion: q\nAnswer:| yes"),
        ("smallbench:mrpc", {**PAIR, "label": 0}, "Sentence 1: p\nSentence 2: h\nParaphrase:| no"),
        ("lambada_openai", {"text": "It was only a dream"}, "It was only a| dream"),
        ("squadv2", NO_ANSWER, "Title: t\n\nBackground: c\n\nQuestion: q\n\nAnswer:| unanswerable"),
    ],
)
def test_a_question_and_its_target_read_like_this(name, row, text):
    question = find(name).ask(row)
    assert f"{question.prompt}|{question.target}" == text
    assert name != "lambada_openai" or question.choices == (" dream",)
    assert name != "squadv2" or (isinstance(question, Generate) and question.answers == ("unanswerable", ""))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: find("mmlu"), TaskError, r'a suite of 57 tasks.*`lmeval.suite\(lm, "mmlu"\)`.*as "mmlu_abstract_algebra"'),
        (lambda: find_suite("boolq"), TaskError, r'boolq is a task, not a suite. Ask it by `lmeval.task\(lm, "boolq"\)`'),
        (lambda: find("bolq"), RegistryError, r"Did you mean boolq\? There are: arc, .*mmlu and 57 more of mmlu, piqa,"),
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


HELLASWAG = {"activity_label": "A", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"]}
LABEL = r"the label is (-1|2|4|None), and there are choices 0 to \d"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sst2", {"sentence": "Fine .", "label": -1}, LABEL),
        ("boolq", {"passage": "p", "question": "q", "label": 2}, LABEL),
        ("hellaswag", HELLASWAG | {"label": ""}, LABEL),
        ("mmlu_anatomy", {"question": "q", "choices": list("abcd"), "answer": 4}, LABEL),
        ("mmlu_anatomy", {"question": "q", "choices": list("abcd"), "answer": None}, LABEL),
        ("record", {"passage": "p", "query": "", "entities": ["Al"], "answers": ["Bo"]}, r"\['Bo'\] are not all .* \['Al'\]"),
        ("stdlib_next", {"document": "d", "passage": "p", "continuations": [" a", ""], "answer": 0}, "has text to be scored"),
        ("squad", NO_ANSWER, r"there is no answer, .* asked by the task squadv2"),
    ],
)
def test_a_row_without_a_right_answer_is_refused(name, row, message):
    with pytest.raises(TaskError, match=message):
        find(name).ask(row)


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


def test_a_label_of_hellaswag_may_be_a_text_or_a_number():
    for label in (0, "0", 1, "1"):
        assert find("hellaswag").ask(HELLASWAG | {"label": label}).answers == (int(label),)


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
        assert [len(choice.encode()) for choice in set(question.choices)] == [60] * 4
        assert all(choice[0] == " " and not choice[1].isspace() for choice in question.choices)
        follows = [row["passage"] + continuation in texts[row["document"]] for continuation in row["continuations"]]
        assert follows == [index == row["answer"] for index in range(4)]
        assert not question.prompt[-1].isspace()
    counts = collections.Counter(row["answer"] for row in questions)  # of 200, 50 each, give or take 6
    assert all(25 <= counts[index] <= 75 for index in range(4)), counts


def in_a_new_process(code, result):
    code = f"{code}; import json, sys; print(json.dumps({result}))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=env).stdout)


@pytest.mark.thorough
def test_stdlib_next_is_the_same_in_every_process(questions):
    assert in_a_new_process("from pytest_lmeval.tasks import find", "list(find('stdlib_next').rows())") == questions


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("from pytest_lmeval.tasks import find; find('boolq')", set()),
        ("import numpy, pytest_lmeval.tasks._superglue", {"numpy"}),  # this test can fail
        ("import pytest_lmeval.scoring._metrics", {"numpy"}),
    ],
)
def test_finding_a_task_or_a_metric_imports_nothing_heavy(code, heavy):
    libraries = {"torch", "numpy", "datasets", "transformers", "sklearn", "sacrebleu", "rouge_score", "torchmetrics"}
    assert libraries & set(in_a_new_process(code, "sorted(sys.modules)")) == heavy
