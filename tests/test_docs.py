"""The pages of docs/ say what is so: their code runs, and what they name is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_lmeval
from pytest_lmeval import registry

DOCS = Path(pytest_lmeval.__file__).parents[1] / "docs"
BLOCKS = [
    pytest.param(block, id=f"{page.stem} {number}")
    for page in sorted(DOCS.glob("*.md"))
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S), start=1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_docs_runs(block, tmp_path):
    done = subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_is_code_in_the_docs():
    assert BLOCKS


def test_the_page_of_what_is_stable_names_every_extension_point_and_only_those():
    named = set(re.findall(r"^\| `pytest_lmeval\.(\w+)` \|", (DOCS / "stable.md").read_text(), re.M))
    assert set(registry.GROUPS) <= named
    assert named - set(registry.GROUPS) == {"laws", "tasks", "records", "errors", "registry"} - set(registry.GROUPS)
