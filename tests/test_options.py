"""Options are checked, and what they name is looked up, before tests are collected; nothing else is looked up."""

import contextlib
import re
import sys
from fnmatch import fnmatch

import pytest

from pytest_lmeval import _options, data  # noqa: F401 - before pytester, which unloads what a test imports
from pytest_lmeval.errors import SpecError
from pytest_lmeval.laws._run_probe import PROFILES
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._sources import resolve_device

COLLECTED = """
import sys

def pytest_collection_finish(session):
    heavy = {"torch", "numpy", "datasets", "transformers", "hypothesis", "pytest_lmeval.registry"} & set(sys.modules)
    print("looked up with", sorted(heavy), flush=True)
"""


@pytest.fixture
def collect(project):
    """Run pytest in a process that has imported nothing before."""
    project.makepyfile(test_nothing="def test_nothing(): pass")
    project.makeconftest(COLLECTED)
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-s")
    return lambda *options: project.run(*command, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lmeval-tokens=many", "--lmeval-tokens takes a positive number such as 500, 200k or 1M; got 'many'."),
        ("--lmeval-budget=soon", "--lmeval-budget is a number of tokens, not of seconds*got 'soon'*Write 200k*"),
        ("--lmeval-budget=60", "--lmeval-budget is a number of tokens, not of seconds*"),
        ("--lmeval-budget=0.0001k", "--lmeval-budget is a number of tokens, not of seconds*"),
        ("--lmeval-budget=2s", "--lmeval-budget is a number of tokens, not of seconds*"),
        ("--lmeval-budget=2.5", "--lmeval-budget is a number of tokens, not of seconds*"),
        ("--lmeval-batch=atuo", "--lmeval-batch takes a positive number or auto; got 'atuo'. Did you mean auto?"),
        ("--lmeval-batch=0", "--lmeval-batch takes a positive number or auto; got '0'.*"),
        ("--lmeval-chat=yes", "--lmeval-chat takes auto, on or off; got 'yes'.*"),
        ("--lmeval-chat-template-kwargs=thinking", "--lmeval-chat-template-kwargs takes a JSON object*got 'thinking'*"),
        ("--lmeval-chat-template-kwargs=[1]", "--lmeval-chat-template-kwargs takes a JSON object*"),
        ("--lmeval-profile=hard", "--lmeval-profile takes dev, ci or nightly; got 'hard'.*"),
        ("--lmeval-limit=0", "--lmeval-limit takes a positive number*"),
        ("--lmeval-seq-len=abc", "--lmeval-seq-len takes a positive number; got 'abc'."),
        ("--lmeval-bits=3", "--lmeval-bits takes 32, 16, 8 or 4; got '3'.*"),
        ("--lm=demo --lm=zoo:mambo@bf16", "--lm: unknown model spec 'zoo:mambo'* Did you mean zoo:mamba?*"),
        ("--lmeval-device=cpu:0", "--lmeval-device takes auto, cpu, cuda, cuda:N or mps; got 'cpu:0'. Did you mean cpu?"),
        ("--lmeval-device=cuda:99", "--lmeval-device: device 'cuda:99' is not there*"),
        ("--lmeval-data=nowhere/at/all", "--lmeval-data names no folder: nowhere/at/all"),
        ("--lmeval-corpus=text:nowhere.txt", "*text:nowhere.txt: there is no file or folder 'nowhere.txt' (looked from *"),
        ("--lmeval-corpus=stdlib --lmeval-corpus=wikitext", "*no corpus 'wikitext'. Did you mean wikitext-2?*"),
        ("-c zoo.ini", "--lm: unknown model spec 'zoo:mambo'* Did you mean zoo:mamba?*"),
    ],
)
def test_an_option_that_makes_no_sense_or_names_nothing_is_refused(pytester, options, message):
    pytester.path.joinpath("zoo.ini").write_text("[pytest]\nlm = zoo:mambo\n")
    with pytest.raises(pytest.UsageError) as refused:
        _options.check(pytester.parseconfig(*options.split()))
    assert fnmatch(str(refused.value), message)


def test_names_that_exist_or_may_exist_pass_without_importing_torch(project, collect):
    project.mkpydir("below")
    project.mkdir("a@int8")
    project.mkdir("a,compile=yes")
    project.path.joinpath("notes.txt").touch()
    project.mkdir("parts").joinpath("beside.py").touch()  # pytest puts the folders of test files on sys.path
    specs = ("demo", "zoo:mamba@int8", "tiny:Tiny", "below.models:build", "beside:build", "hf:gpt2", "hf:OWNER/NAME@bf16")
    specs += ("demo,compile=True@int8", "tiny:Tiny,compile=eager", "hf:./a@int8,compile=True", "hf:./a,compile=yes")
    given = [f"--lm={spec}" for spec in (*specs, "hf:./a@int8")]
    result = collect(*given, "--lmeval-corpus=wikitext-2", "--lmeval-corpus=text:notes.txt", "--lmeval-corpus=OWNER/NAME")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["looked up with [[]'pytest_lmeval.registry'[]]"])


def test_without_options_nothing_is_looked_up(collect):
    result = collect()
    assert result.ret == 0
    result.stdout.fnmatch_lines(["looked up with [[][]]"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("demmo", r"unknown model spec 'demmo'.* Did you mean demo\?"),
        ("gpt2", r"Did you mean hf:gpt2\?"),
        ("demo@bf6", r"demo@bf6: unknown precision @bf6; .* Did you mean bf16\?"),
        ("demo,compiel=True", r"demo,compiel=True: there is no option 'compiel' .* compile\. Did you mean compile\?"),
        ("demo,compile=yes@int8", "compile=yes is no value of that option; write compile=True, or compile=BACKEND"),
        ("demo,compile=", "compile= is no value of that option; write compile=True"),
        ("demo,compile", "'compile' is no option, which is written NAME=VALUE: compile=True"),
        ("demo,compile=True,compile=eager", "the option compile is given twice"),
        ("demo@int8,compile=True", "options stand before the precision: write demo,compile=True@int8"),
        ("hf:./a@b,compile=True", "unknown precision @b"),
        ("demo@bf6,compile=True", r"unknown precision @bf6; .* Did you mean bf16\?"),
        ("hf:./checkpiont,compile=True", r"there is no folder \./checkpiont \(looked from .*\). Did you mean checkpoint\?"),
        ("hf:./checkpiont", r"there is no folder \./checkpiont \(looked from .*\). Did you mean checkpoint\?"),
        ("hf:checkpoint/one/last", "there is no folder checkpoint/one/last"),
        ("hf:~/no_such", "there is no folder ~/no_such"),
        ("hf:", "hf: names no model"),
        ("no_such_module.models:build", "and there is no module 'no_such_module'"),
        ("zooo:mamba", r"Did you mean zoo:mamba\?"),
        ("pytest:", "unknown model spec 'pytest:'"),
    ],
)
def test_a_spec_that_names_nothing_is_refused(tmp_path, monkeypatch, spec, message):
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=message):
        specs.check(spec)


def test_the_choices_of_an_option_are_those_of_the_code_that_takes_them():
    assert set(_options.CHOICES["lmeval-profile"]) == {"", *PROFILES}
    assert set(_options.CHOICES["lmeval-bits"]) == {"", *map(str, specs.BITS)}
    for name in _options.DEVICES:
        with contextlib.suppress(SpecError):  # this machine need not have it
            assert name in ("auto", resolve_device(name).type)
    with pytest.raises(SpecError, match="unknown device") as refused:
        resolve_device("gpu")
    assert re.findall(r"\w+(?=,| and|\.)", str(refused.value).partition("are ")[2]) == ["auto", "cpu", "cuda", "N", "mps"]


@pytest.mark.parametrize("folder", [".hidden", "env/lib", "node_modules/one", "lib/site-packages"])
@pytest.mark.parametrize("name", ["no_such_utils.py", "no_such_utils/__init__.py"])
def test_an_installed_module_is_not_the_projects(tmp_path, folder, name):
    (tmp_path / "env").mkdir()
    (tmp_path / "env/pyvenv.cfg").touch()
    file = tmp_path / folder / name
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(SpecError, match="no module 'no_such_utils'"):
        specs.check("no_such_utils:load", [tmp_path])
    (tmp_path / "src/no_such_utils").mkdir(parents=True)
    (tmp_path / "src/no_such_utils/__init__.py").touch()
    specs.check("no_such_utils:load", [tmp_path])


def test_a_spec_is_checked_from_the_folder_where_it_is_loaded(tmp_path, monkeypatch):
    with pytest.raises(SpecError, match="no module 'own_models'"):
        specs.check("own_models:build")
    (tmp_path / "own_models.py").touch()
    specs.check("own_models:build", [tmp_path])
    monkeypatch.chdir(tmp_path)
    specs.check("own_models:build")
