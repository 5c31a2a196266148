"""The example package (docs/examples/lmeval-extras), installed as users do: everything that it adds is found and works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packages import forget

from pytest_lmeval import corpus, load, registry, tasks
from pytest_lmeval.__main__ import main
from pytest_lmeval.errors import CorpusError, SpecError
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._metric import metric

EXTRAS = Path(__file__).parents[1] / "docs/examples/lmeval-extras"
ADDED = {
    "metrics": ["brevity", "words_per_second"],
    "tasks": ["greetings"],
    "corpora": ["counting"],
    "models": ["uniform"],
    "verbs": ["words_per_second"],
    "reports": ["brevity"],
    "exporters": ["csv"],
    "commands": ["slowest"],
}
TESTS = """
def test_is_brief(lmeval, lm):
    result = lmeval.task(lm, "greetings")
    assert 0 <= result.brevity <= 1 and result.brevity.n == 10

def test_knows_nothing(lmeval, corpus):
    assert abs(lmeval.perplexity("uniform", corpus("counting:200")).perplexity - 256) < 1e-3

def test_reads(lmeval, lm):
    lmeval.words_per_second(lm)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that it is installed in; needs no network."""
    source, folder = tmp_path_factory.mktemp("source") / "lmeval-extras", tmp_path_factory.mktemp("site")
    shutil.copytree(EXTRAS, source)  # pip builds in the folder
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    command = (sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(source))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def environment(installed, monkeypatch):
    """This process and its children find the package."""
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(str(installed))
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("group", registry.GROUPS)
def test_the_example_adds_one_of_each(group):
    assert [name for name, _, entry in registry.things(group) if entry.package == "lmeval-extras"] == ADDED[group]


@pytest.mark.usefixtures("environment")
def test_its_additions_do_what_its_guide_says():
    said = Example(id="1", number=0, prompt="Hello", output="Hello to you, too, Ada!")
    assert metric("brevity").score(said) == 1
    assert metric("words_per_second").aspect == "speed"
    assert tasks.find("greetings").metrics == ("brevity",)
    assert next(corpus("counting:3").documents()).text == "2000000 2000001 2000002 "
    with pytest.raises(CorpusError, match="counting:many: 'many' is no number"):
        corpus("counting:many")
    assert (load("uniform").vocab_size, load("uniform:50@bf16").vocab_size) == (256, 50)
    with pytest.raises(SpecError, match="uniform:x: 'x' is no size"):
        load("uniform:x")


@pytest.mark.usefixtures("environment")
def test_only_its_family_is_in_capitals():
    added = [entry for group in registry.GROUPS for entry in registry.entries(group) if entry.package == "lmeval-extras"]
    assert [entry.name for entry in added if entry.may_be_family] == ["extras"]


@pytest.mark.usefixtures("environment")
def test_its_verb_times_the_second_reading_and_waits_for_the_gpu(monkeypatch):
    from lmeval_extras import verbs

    done = []
    model = SimpleNamespace(
        device=torch.device("cuda"),
        tokenizer=SimpleNamespace(encode=lambda text: ([1], [0])),
        step=lambda ids: done.append("read"),
    )
    monkeypatch.setattr(verbs, "as_model", lambda lm: lm)
    monkeypatch.setattr(verbs, "record", lambda lm, subject, **metrics: metrics)
    monkeypatch.setattr(verbs.torch, "tensor", lambda ids, device: ids)
    monkeypatch.setattr(verbs.torch.cuda, "synchronize", lambda device: done.append("waited"))
    assert verbs.words_per_second(model)["words_per_second"] > 0
    assert done == ["read", "waited", "read", "waited"]


@pytest.mark.usefixtures("environment")
def test_a_run_uses_its_additions(project, capsys):
    project.makepyfile(test_extras=TESTS)
    # in a process of its own: a fork has another sys.path
    result = project.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--lm", "tiny:Tiny")
    result.assert_outcomes(passed=3)
    output = project.path / ".lmeval"
    summary = (output / "summary.md").read_text()
    for text in ("Brevity", "The share of outputs of at most five words.", "words/s"):
        assert text in summary
    assert main(["render", str(output), "--format", "csv"]) == 0
    lines = (output / "metrics.csv").read_text().splitlines()
    assert lines[0] == "test,model,metric,value"
    assert any("brevity" in line for line in lines)
    capsys.readouterr()
    assert main(["slowest", str(output)]) == 0
    assert "task of greetings" in capsys.readouterr().out
    assert main(["slowest", "nowhere"]) == 2
    assert re.match(r"nowhere.* cannot be read \(No such file or directory\)", capsys.readouterr().err)


@pytest.mark.usefixtures("environment")
def test_its_additions_are_listed_with_our_own(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "slowest" in capsys.readouterr().out
    for group, names in ADDED.items():
        assert main(["list", group]) == 0
        listed = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [line[0] for line in listed if line[-1] == "lmeval-extras"] == names
