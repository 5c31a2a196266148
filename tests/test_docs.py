"""The documentation is true: its code runs, what it names exists, and it leaves nothing public out."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_layers import LAYERS

import pytest_lmeval
from pytest_lmeval import _options, errors, registry
from pytest_lmeval.models._identity import facts
from pytest_lmeval.report._words import model_line

PACKAGE = Path(pytest_lmeval.__file__).parent
PROJECT = PACKAGE.parent
DOCS = PROJECT / "docs"
EXTRAS = DOCS / "examples/lmeval-extras"
PAGES = [PROJECT / "README.md", *sorted(set(DOCS.rglob("*.md")) - set(EXTRAS.rglob("*")))]
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


def blocks(page, language):
    """(title, text) of a page's blocks. A `python` block is run; a `py` block needs a download, and is not."""
    found = BLOCK.findall(page.read_text())
    return [(title, text) for own, title, text in found if own == language and "--8<--" not in text]


def files_of(page):
    """The files that a page consists of: blocks with the same title are one file, those without one are `test_page.py`."""
    files = {}
    for title, text in blocks(page, "python"):
        name = title or "test_page.py"
        files[name] = files.get(name, "") + text
    if "test_page.py" in files:
        files["test_page.py"] += "\n\ndef test_page_is_run_when_it_is_imported():\n    pass\n"
    return files


START = [PROJECT / "README.md", DOCS / "index.md"]


@pytest.mark.parametrize(
    "pages",
    [
        pytest.param(START, id="start", marks=pytest.mark.thorough),
        pytest.param([page for page in PAGES if page.parent == DOCS and page not in START], id="concepts"),
        pytest.param([page for page in PAGES if page.parent.name == "guides"], id="guides", marks=pytest.mark.thorough),
        pytest.param([page for page in PAGES if page.parent.name == "extending"], id="extending"),
    ],
)
def test_the_code_of_pages_runs_and_prints_what_they_say(pages, project):
    for page in pages:
        for name, text in files_of(page).items():
            file = project.path / f"page_{page.stem}" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    install_extras(project.path / "site")
    options = ("-q", "-s", "-p", "no:cacheprovider", "-o", "pythonpath=site", "--import-mode=importlib")
    result = project.runpytest_subprocess(*options)
    assert result.ret == 0, result.stdout.str()
    assert set(result.parseoutcomes()) == {"passed"}  # nothing was skipped
    said = without_numbers(result.stdout.str())
    texts = [text for page in pages for title, text in blocks(page, "text") if title == "prints"]
    assert [text for text in texts if without_numbers(text) not in said] == []


def test_the_sample_output_is_that_of_the_demo_model_which_ships():
    line = model_line(facts(pytest_lmeval.load("demo")))
    assert [page.name for page in START if line not in page.read_text()] == []


def without_numbers(text):
    """The words of a text: what a machine rounds otherwise, and where lines break, is not compared."""
    return " ".join(re.sub(r"\d[\d.,e+-]*", "#", text).split())


def install_extras(folder):
    """What `pip install docs/examples/lmeval-extras` puts into a folder, without pip."""
    metadata = folder / "lmeval_extras-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "lmeval_extras").symlink_to(EXTRAS / "lmeval_extras")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lmeval-extras\nVersion: 0.1.0\n")
    points = re.findall(r'^\[project.entry-points."(.*)"\]\n(\w+) = "(.*)"$', (EXTRAS / "pyproject.toml").read_text(), re.M)
    (metadata / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {target}\n" for group, name, target in points))


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, "py")])
def test_code_that_is_not_run_is_python(page):
    for _, text in blocks(page, "py"):
        compile(text, page.name, "exec")


def test_the_extending_guide_quotes_the_example_package():
    quoted = [text.strip() for page in (DOCS / "extending").glob("*.md") for _, text in blocks(page, "toml")]
    assert len(quoted) == len(registry.GROUPS) + 1  # and how a package begins
    assert [text for text in quoted if text not in (EXTRAS / "pyproject.toml").read_text()] == []


def test_the_page_of_what_is_stable_names_every_extension_point_and_only_those():
    named = set(re.findall(r"^\| `pytest_lmeval\.(\w+)` \|", (DOCS / "stable.md").read_text(), re.M))
    assert set(registry.GROUPS) <= named
    assert named - set(registry.GROUPS) == {"engine", "laws", "tasks", "records", "errors", "registry"} - set(registry.GROUPS)


def test_the_page_of_the_architecture_has_every_layer_in_order():
    table = (DOCS / "architecture.md").read_text().partition("| layer |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == LAYERS


def test_the_reference_has_every_public_name():
    shown = {"pytest_lmeval.errors"} & set(re.findall(r"^::: (\S+)$", (DOCS / "reference/errors.md").read_text(), re.M))
    assert shown, "the page of errors shows the whole module"
    names = re.findall(r"^::: pytest_lmeval\S*?\.(\w+)$", "\n".join(page.read_text() for page in REFERENCE), re.M)
    modules = [
        importlib.import_module(f"pytest_lmeval.{name}") for name in ("engine", "laws", "tasks", "tasks.scores", "records")
    ]
    public = {name for module in (pytest_lmeval, *modules) for name in module.__all__} - set(errors.__all__)
    assert sorted(public - set(names)) == []


@pytest.mark.thorough
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path)
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a notice about the future of MkDocs, no warning about the pages
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    loads = re.compile(
        r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//|(?:url\(|@import)\s*["']?(?:https?:)?//"""
    )
    assert [file for file in (*pages, *tmp_path.rglob("*.css")) if loads.search(file.read_text())] == []
    verbs, declared = ((tmp_path / f"reference/{name}.html").read_text() for name in ("verbs", "pytest"))
    assert re.search(r"<li>\s*(<p>)?<code>positions</code>", verbs), "columns of a docstring are a list"
    assert 'id="pytest_lmeval.latency"' in verbs, "a verb that is made by a function is documented"
    assert [name for name in _options.OPTIONS if f"<code>--{name}</code>" not in declared] == []
    assert all(f'id="{fixture}"' in declared for fixture in ("lm", "load_lm", "corpus", "lmeval"))


FILES = {path.name for path in PROJECT.rglob("*.py")}
MODULES: dict[str, list[str]] = {}  # the modules that are called so, whatever package they are in
for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PROJECT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    MODULES.setdefault(parts[-1], []).append(".".join(parts))
OUTPUTS = (".html", ".json", ".jsonl", ".md", ".safetensors")
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
