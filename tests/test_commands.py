"""The command line lists, refuses in words, and shows its help without heavy imports."""

import subprocess
import sys
from argparse import Namespace
from importlib.metadata import version

import pytest
from documents import register

from pytest_lmeval import _listing as listing, registry
from pytest_lmeval.__main__ import main
from pytest_lmeval.records._metric import Metric


def quits(*arguments):
    with pytest.raises(SystemExit) as quit_:
        main(arguments)
    return quit_.value.code


def test_help_describes_every_command(capsys):
    assert quits("--help") == 0
    shown = capsys.readouterr().out
    for entry in registry.entries("commands"):
        line = entry.load().__doc__.partition("\n")[0].rpartition("`: ")[2]
        assert "".join([entry.name, *line.split()]) in "".join(shown.split())
    assert quits() == 0
    assert capsys.readouterr().out == shown
    assert quits("render", "--help") == 0
    assert "bencher, github-action-benchmark, mlflow, trackio, wandb" in " ".join(capsys.readouterr().out.split())


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from pytest_lmeval.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'jinja2', 'msgspec'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"


def test_the_version_is_printed(capsys):
    assert quits("--version") == 0
    assert capsys.readouterr().out.strip() == version("pytest-lmeval")


def test_a_misspelt_command_is_refused_with_the_nearest(capsys):
    assert main(["rendr"]) == 2
    assert capsys.readouterr().err.startswith("there is no command 'rendr'. Did you mean render? There are: baseline, compare,")


def test_a_command_that_fails_prints_its_reason_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest_lmeval", "render", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{tmp_path}/metrics.json cannot be read (No such file or directory).")
    assert "Traceback" not in done.stderr


def test_metrics_are_listed_with_unit_direction_aspect_and_definition(capsys):
    assert main(["list", "metrics", "bits*"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split("  ")[0] == "bits_per_byte"
    for word in ("bits/byte", "lower is better", "quality", "nats / ln 2"):
        assert word in line


class Described:
    """The docstring of the class."""

    about = "what this one is"


def test_other_things_are_listed_with_their_description_and_package(monkeypatch, capsys):
    family = {"ours": main, "described": Described()}
    register(monkeypatch, tasks={"pytest-lmeval": {"FAMILY": family}, "other-package": {"theirs": 3}})
    assert main(["list", "tasks"]) == 0
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "ours Run a command; the exit status is 2 if it is refused, and the reason is printed.",
        "described what this one is",
        "theirs int other-package",
    ]
    assert main(["list", "tasks", "o*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["list", "tasks", "x*"]) == 1
    assert capsys.readouterr().err == "no task is called 'x*'.\n"


def test_without_a_group_the_groups_are_counted_and_an_unknown_one_is_refused(monkeypatch, capsys):
    two = {"pytest-lmeval": {"SEVERAL": {"one": Metric("one"), "two": Metric("two")}}}
    register(monkeypatch, **{group: two if group == "metrics" else {} for group in registry.GROUPS})
    assert listing.main(Namespace(group=None, pattern="*")) == 0
    assert capsys.readouterr().out.split()[:4] == ["metrics", "2", "tasks", "0"]
    monkeypatch.undo()
    assert main(["list", "metrcs"]) == 2
    assert capsys.readouterr().err.startswith("there is no group 'metrcs'. Did you mean metrics? There are: metrics, tasks,")


def test_a_command_that_cannot_be_imported_is_refused_without_a_traceback(packages, capsys):
    packages("broken", "raise ImportError('no such thing')", commands={"slow": "broken"})
    with pytest.warns(registry.PluginWarning, match="no such thing"):
        assert main(["slow"]) == 2
    assert capsys.readouterr().err.startswith("the command 'slow' is registered by broken (broken), which cannot be imported")
    assert quits("--help") == 0
    assert " slow" in capsys.readouterr().out


FAILS = """
from pytest_lmeval.errors import LmevalError
def add_arguments(parser): pass
def main(arguments): raise LmevalError("there is nothing to do")
"""


def test_the_refusal_of_another_packages_command_is_printed(packages, capsys):
    packages("fails", FAILS, commands={"fails": "fails"})
    assert main(["fails"]) == 2
    assert capsys.readouterr().err == "there is nothing to do\n"


def test_a_command_of_two_packages_is_refused_and_both_are_named(monkeypatch, capsys):
    register(monkeypatch, commands={"pytest-lmeval": {"list": listing}, "other-package": {"list": main}})
    assert main(["list"]) == 2
    assert (
        "the command 'list' is registered by pytest-lmeval (pytest-lmeval:list) and by other-package" in capsys.readouterr().err
    )


def test_tasks_are_asked_without_a_file_of_tests_and_what_cannot_be_asked_is_told_once_without_a_traceback(pytester):
    done = pytester.run(
        sys.executable,
        "-m",
        "pytest_lmeval",
        "run",
        "--tasks",
        "stdlib_nxt,stdlib_next,",
        "--limit=2",
        "--",
        "--lmeval-budget",
        "1k",
    )
    assert done.ret == 1, done.stderr.str()
    done.stdout.fnmatch_lines(["*no task 'stdlib_nxt'. Did you mean stdlib_next?*"])
    done.stdout.fnmatch_lines(["*test_answers?stdlib_next?*", "*stdlib_next, 0-shot*"])
    done.stdout.fnmatch_lines(["*1 failed, 1 passed*"])
    whole = [line for line in done.outlines if "Did you mean" in line and not line.startswith("FAILED")]  # the summary cuts it
    assert len(whole) == 1
    assert not [line for line in done.outlines if "RegistryError" in line or "__init__.py:" in line]


def test_a_run_of_no_tasks_is_refused(capsys):
    assert main(["run", "--tasks", " ,"]) == 2
    assert "names no task" in capsys.readouterr().err
