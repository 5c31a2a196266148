"""The pages of docs/ say what is so: their code runs, and what they name is there."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_lmeval
from pytest_lmeval import registry

PACKAGE = Path(pytest_lmeval.__file__).parent
PROJECT = PACKAGE.parent
DOCS = PROJECT / "docs"
PAGES = [pytest.param(page, id=page.stem) for page in sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
    assert code
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_what_is_stable_names_every_extension_point_and_only_those():
    named = set(re.findall(r"^\| `pytest_lmeval\.(\w+)` \|", (DOCS / "stable.md").read_text(), re.M))
    assert set(registry.GROUPS) <= named
    assert named - set(registry.GROUPS) == {"engine", "laws", "tasks", "records", "errors", "registry"} - set(registry.GROUPS)


FILES = {path.name for path in PROJECT.rglob("*.py")}
MODULES: dict[str, list[str]] = {}  # the modules that are called so, whatever package they are in
for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PROJECT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    MODULES.setdefault(parts[-1], []).append(".".join(parts))
OUTPUTS = (".html", ".json", ".jsonl", ".md")
LIBRARIES = {"_moshi"}  # modules that are called as the library is that they are about


def resolves(dotted: str) -> bool:
    """Whether it is a group of entry points, a module, or something in one; fields of a class may have no default."""
    if dotted.removeprefix("pytest_lmeval.") in registry.GROUPS:
        return True
    first, *names = dotted.split(".")
    for found in map(importlib.import_module, MODULES.get(first, [])):
        for name in names:
            if f"{found.__name__}.{name}" in MODULES.get(name, []):
                found = importlib.import_module(f"{found.__name__}.{name}")
            elif hasattr(found, name):
                found = getattr(found, name)
            elif name not in getattr(found, "__annotations__", {}):
                break
        else:
            return True
    return False


def stale(text: str) -> list[str]:
    """Backticked names of files and modules, `some_file.py` and `module.name`, that lead nowhere."""
    spans = re.findall(r"`([^`\n]+)`", text)
    files = [file for span in spans for file in re.findall(r"[\w/]+\.py\b", span) if file.split("/")[-1] not in FILES]
    dotted = [span for span in spans if re.fullmatch(r"\w+(\.\w+)+", span) and not span.endswith((".py", *OUTPUTS))]
    ours = [span for span in dotted if {span.split(".")[0], "_" + span.split(".")[0]} & MODULES.keys() - LIBRARIES]
    return files + [span for span in ours if not resolves(span)]


@pytest.mark.parametrize("folder", ["pytest_lmeval", "docs", "."])
def test_backticked_modules_exist(folder):
    root = PROJECT / folder
    paths = [*root.rglob("*.py"), *root.rglob("*.md")] if folder != "." else [*root.glob("*.md")]
    assert not {str(path.relative_to(PROJECT)): names for path in paths if (names := stale(path.read_text()))}


def test_names_that_lead_nowhere_are_noticed():
    text = "`nowhere.py` `scoring._metrics.METRICS` `paired.holm` `identity.precision` `records._certificate.Nothing`"
    assert stale(text) == [name.strip("`") for name in text.split()]
    assert not stale("`_plan.py` `tests/test_docs.py` `laws.Case` `_paired.holm` `tasks.Choices.group` `pytest_lmeval.metrics`")
