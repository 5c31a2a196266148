"""Ask tasks: metrics with their intervals, beside chance.

    pytest benchmarks/test_tasks.py                                            what needs no download
    pytest benchmarks/test_tasks.py --lm hf:FOLDER_OR_ID --lmeval-limit 200    the first 200 questions of each task
    pytest benchmarks/test_tasks.py -k smallbench --lmeval-data MIRROR         datasets from a local mirror

Tasks whose datasets cannot be reached are skipped, with the reason.
"""

import pytest

from pytest_lmeval import Choices, CorpusError, Task

pytestmark = pytest.mark.benchmark


def test_continues_documentation(lmeval, lm):
    """Which of four texts continues a passage of Python's documentation?"""
    result = lmeval.task(lm, "stdlib_next")
    assert result.accuracy.low > result.chance


def brackets(row):
    opened = "".join(row)
    closed = "".join({"(": ")", "[": "]"}[bracket] for bracket in reversed(opened))
    return Choices(f"x = {opened}a", (closed, closed.translate(str.maketrans(")]", "])"))), answer=0)


BRACKETS = Task("brackets", [[a, b, c] for a in "([" for b in "([" for c in "(["], brackets)


def test_a_task_of_ones_own(lmeval, lm):
    """A task is rows, and a function from a row to a question."""
    assert lmeval.task(lm, BRACKETS).accuracy >= 0.5


@pytest.fixture
def ask(lmeval, lm):
    def ask(task, **options):
        try:
            return lmeval.task(lm, task, **options)
        except CorpusError as error:
            pytest.skip(str(error))

    return ask


# Small models guess here, so these only refuse worse than guessing. Ask more of yours: `.low > result.chance`.


@pytest.mark.parametrize("task", ["sst2", "rte", "boolq", "mrpc"])
def test_smallbench(ask, task):
    result = ask(f"smallbench:{task}")
    assert result.accuracy_per_token.high > result.chance


@pytest.mark.parametrize("task", ["hellaswag", "arc_easy", "arc_challenge", "piqa"])
def test_understands(ask, task):
    result = ask(task)
    assert result.accuracy_per_character.high > result.chance


@pytest.mark.parametrize("task", ["mmlu_abstract_algebra", "mmlu_college_computer_science"])
def test_knows(ask, task):
    result = ask(task, shots=5)
    assert result.accuracy.high > result.chance


def test_finds_the_last_word(ask):
    assert ask("lambada_openai").perplexity < 100_000  # an untrained model has about its vocabulary's size
