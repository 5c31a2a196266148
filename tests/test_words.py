"""Names and prose use the field's words: what this project once called otherwise does not come back."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
FILES = [path for folder in ("pytest_lmeval", "tests", "benchmarks") for path in sorted((PROJECT / folder).rglob("*.py"))]

STANDARD = {
    "borders": "boundaries",
    "volatile": "mutable_buffers",
    "hearing": "run_probe",
    "trial": "harness",
    "yardstick": "reference",
    "twin": "float64_copy",
    "untouched": "preserve_weights",
    "nursery": "fork_server",
    "toys": "tiny_models",
    "desk": "context",
    "shelf": "prefix_cache",
    "remarks": "notes",
    "unheard": "missing_tests",
    "solution": "target",
    "remembered": "memo",
    "doors": "entry points",
    "boards": "example_tables",
    "unmoved": "unchanged",
    "slowing": "slowdown",
}
QUESTION = re.compile(r"(What|How|Which|Who|Where|When|Why|Is|Are|Did|Does)\b")


def names_in(tree: ast.AST) -> set[str]:
    """The words of all names that the code defines: functions, classes, arguments, variables."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {word.lower() for name in found for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def complaints(text: str) -> list[str]:
    tree = ast.parse(text)
    first = (ast.get_docstring(tree) or "").split("\n")[0]
    asks = [f"the module's docstring asks where it should say: {first}"] if QUESTION.match(first) else []
    return asks + [f"{word} is called {STANDARD[word]}" for word in sorted(names_in(tree) & STANDARD.keys())]


@pytest.mark.parametrize("folder", ["pytest_lmeval", "tests", "benchmarks"])
def test_names_and_docstrings_use_the_standard_words(folder):
    paths = [path for path in FILES if path.is_relative_to(PROJECT / folder)]
    assert paths
    assert not {path.name: found for path in paths if (found := complaints(path.read_text()))}


def test_a_word_of_the_old_dialect_is_noticed():
    text = '"""What steps a model."""\ndef step(borders):\n    yardstick_of = 1\n'
    assert [found.split()[0] for found in complaints(text)] == ["the", "borders", "yardstick"]
