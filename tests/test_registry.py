"""Things are found by name, whichever package registers them, and nothing else is imported."""

import os
import re
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings, strategies as st
from packages import install

from pytest_lmeval import registry
from pytest_lmeval.data import check as check_corpus
from pytest_lmeval.errors import RegistryError, TaskError, UsageError
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.records._metric import Metric, metric
from pytest_lmeval.registry import GROUPS, Entry, PluginWarning, accepted, entries, find, names, resolve, things
from pytest_lmeval.scoring._metrics import metrics_of
from pytest_lmeval.tasks import find as find_task

METRIC = "from pytest_lmeval.records._metric import Metric\nBREVITY = Metric('brevity', interval='proportion')\n"
BROKEN = "raise ImportError('no such thing')\n"


# ------------------------------------------------------------------------------------------- what is our own


@pytest.mark.parametrize("group", GROUPS)
def test_all_of_our_own_can_be_imported_and_have_different_names(group):
    found = [(name, entry) for name, _, entry in things(group) if entry.is_own]
    assert {entry.name for _, entry in found} == {entry.name for entry in entries(group) if entry.is_own}
    assert len(names(group)) == len(set(names(group))) > 0


def test_our_own_come_first_and_name_their_package():
    first = entries("metrics")[0]
    assert first.is_own
    assert str(first) == "pytest-lmeval (pytest_lmeval.scoring._answer_metrics:METRICS)"


def test_an_entry_of_our_own_that_cannot_be_imported_is_an_error():
    with pytest.raises(ModuleNotFoundError):
        registry._loaded(Entry("metrics", "x", "pytest_lmeval.nowhere:X", registry.OWN))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("accuracy_per_b*", ["accuracy_per_byte"]), ("rouge?", ["rouge1", "rouge2", "rougeL"]), ("no*such", [])],
)
def test_a_pattern_selects_names(pattern, found):
    assert names("metrics", pattern) == found


# --------------------------------------------------------------------------------------- of other packages


def test_a_thing_of_another_package_is_found_by_its_name(packages):
    packages("one", METRIC, metrics={"brevity": "one:BREVITY"})
    assert find("metrics", "brevity").interval == "proportion"
    assert metric("brevity") is find("metrics", "brevity")
    assert [entry.package for name, _, entry in things("metrics") if name == "brevity"] == ["one"]
    assert "brevity" in names("metrics")


def test_a_family_holds_things_by_name_and_its_texts_are_imported(packages):
    code = "FAMILY = {'square': 'math:sqrt', 'half': 0.5, 'gone': 'math:nowhere'}\n"
    packages("one", code, exporters={"numbers": "one:FAMILY"})
    assert find("exporters", "square")(9) == 3
    assert find("exporters", "half") == 0.5
    with pytest.raises(RegistryError, match="no export format 'numbers'"):
        find("exporters", "numbers")
    with pytest.warns(PluginWarning, match="one registers the export format 'gone' as math:nowhere"):
        assert [name for name, _, entry in things("exporters") if entry.package == "one"] == ["square", "half"]


def test_a_name_continues_after_its_first_colon(packages):
    packages("one", "def read(): ...\nFAMILY = {'x:y': 1}\n", corpora={"lines": "one:read", "x": "one:FAMILY"})
    assert resolve("corpora", "lines")[1] is None
    assert resolve("corpora", "lines:")[1] == ""
    assert resolve("corpora", "lines:a:b")[1] == "a:b"
    assert resolve("corpora", "x:y") == (1, None)
    assert resolve("corpora", "x:z") is None
    assert find("corpora", "x:y") == 1
    with pytest.raises(RegistryError):
        find("corpora", "lines:a")


# ------------------------------------------------------------------------- a name that is registered twice


def ambiguous(call, *who):
    with pytest.raises(RegistryError, match="is registered by") as error:
        call()
    for name in who:
        assert name in str(error.value)


def test_a_name_of_two_packages_is_refused_and_both_are_named(packages):
    packages("one", METRIC, metrics={"brevity": "one:BREVITY"})
    packages("two", "FAMILY = {'brevity': 2, 'other': 3}", metrics={"brevity": "two:FAMILY"})
    for call in (lambda: find("metrics", "brevity"), lambda: metric("brevity")):
        ambiguous(call, "one (one:BREVITY)", "two (two:FAMILY)", "Remove one of the packages")
    assert find("metrics", "other") == 3
    assert metric("accuracy") is find("metrics", "accuracy")


def test_our_name_in_the_family_of_another_package_is_refused_and_all_others_are_found(packages):
    packages("one", f"{METRIC}FAMILY = {{'accuracy': BREVITY, 'brevity': BREVITY}}", metrics={"one": "one:FAMILY"})
    for call in (lambda: find("metrics", "accuracy"), lambda: metric("accuracy")):
        ambiguous(call, "pytest-lmeval (pytest_lmeval.scoring._answer_metrics:METRICS)", "one (one:FAMILY)")
    assert metric("brevity").name == "brevity"
    assert metric("perplexity").margin == "0.5%"


@pytest.mark.parametrize(
    ("made", "message"), [("len", "of the type builtin"), ("Metric('verbosity')", "the metric 'verbosity'")]
)
def test_a_registered_metric_that_is_none_is_refused_by_its_name_only(packages, made, message):
    packages("one", f"{METRIC}OTHER = {{'brevity': {made}}}", metrics={"one": "one:OTHER"})
    with pytest.raises(RegistryError, match=f"one .one:OTHER. registers the metric 'brevity', and that is {message}"):
        metric("brevity")
    assert metric("accuracy").name == "accuracy"


def test_our_name_is_refused_to_other_packages(packages):
    packages("one", "TASKS = {'boolq': 1}\nboolq = 2", tasks={"boolq": "one:boolq"}, corpora={"stdlib": "one:boolq"})
    ambiguous(lambda: find_task("boolq"), "pytest-lmeval (pytest_lmeval.tasks._superglue:REGISTERED)", "one (one:boolq)")
    ambiguous(lambda: find("corpora", "stdlib"), "pytest-lmeval", "one (one:boolq)")
    ambiguous(lambda: resolve("corpora", "stdlib:x"), "pytest-lmeval", "one (one:boolq)")


def test_a_name_in_the_families_of_two_packages_is_refused(packages):
    for name in ("one", "two"):
        packages(name, "FAMILY = {'same': 1}", tasks={f"of_{name}": f"{name}:FAMILY"})
    ambiguous(lambda: find("tasks", "same"), "one (one:FAMILY)", "two (two:FAMILY)")


def test_an_unknown_group_is_refused_with_the_nearest():
    for call in (lambda: find("metrisc", "accuracy"), lambda: names("metrisc")):
        with pytest.raises(RegistryError, match=r"no group 'metrisc'\. Did you mean metrics\?"):
            call()


def test_a_metric_of_a_family_is_found_by_its_full_name(packages):
    packages("one", f"{METRIC}FAMILY = {{'brevity_*': Metric('brevity_*', score=len)}}", metrics={"one": "one:FAMILY"})
    assert [found.name for found in metrics_of(["brevity_7"], "own")] == ["brevity_7"]
    with pytest.raises(TaskError, match=re.escape("there is no metric 'brevity_*'")):
        metrics_of(["brevity_*"], "own")


def test_a_verb_of_another_package_is_called_with_its_own_keywords(packages):
    packages("one", "def loud(lm, volume=3):\n    return volume\n", verbs={"loud": "one:loud"})
    lmeval = Lmeval(VerbContext())
    assert lmeval.loud("demo", volume=4) == 4
    with pytest.raises(UsageError, match=r"loud has no keyword 'volum'\. Did you mean volume\? It has lm, volume"):
        lmeval.loud("demo", volum=4)


def test_a_corpus_that_is_registered_twice_is_refused_before_anything_is_read(packages):
    packages("one", "def read(rest, split): ...", corpora={"stdlib": "one:read"})
    ambiguous(lambda: check_corpus("stdlib"), "pytest-lmeval", "one (one:read)")


# ------------------------------------------------------------------------------ what cannot be imported


def test_a_family_whose_names_are_no_strings_is_left_out_with_a_warning(packages):
    packages("one", "JUNK = {1: 2}", metrics={"junk": "one:JUNK"})
    with pytest.warns(PluginWarning, match="one:JUNK is a family with a name that is not a string: 1"):
        assert "accuracy" in names("metrics")


def test_a_package_that_cannot_be_imported_is_left_out_with_one_warning(packages):
    packages("one", METRIC, metrics={"brevity": "one:BREVITY"})
    packages("broken", BROKEN, metrics={"length": "broken:LENGTH"})
    with pytest.warns(PluginWarning, match="broken registers the metric 'length' as broken:LENGTH.*ImportError: no such thing"):
        assert metric("brevity").interval == "proportion"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "length" not in names("metrics")
        with pytest.raises(
            RegistryError, match=r"'length' is registered by broken \(broken:LENGTH\), which cannot be imported"
        ):
            find("metrics", "length")
        assert metric("length", None) == Metric("length", higher_is_better=None)


def test_where_warnings_are_errors_the_run_continues(tmp_path):
    install(tmp_path, "broken", BROKEN, metrics={"length": "broken:LENGTH"}, corpora={"lines": "broken:read"})
    install(tmp_path, "lower", "family = {'a': 1}", tasks={"lower": "lower:family"})
    code = "from pytest_lmeval.registry import names, things; "
    code += "print(len(names('metrics')), *[e.name for _, _, e in things('tasks')][-1:])"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 50
    assert done.stdout.split()[1] != "lower"
    assert done.stderr.count("PluginWarning: broken registers the metric") == 1
    assert "lower:family is a mapping, and a family must be in capitals" in done.stderr


def python(code, folder):
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


# ----------------------------------------------------------------------------------- nothing is imported


def test_finding_a_name_imports_only_packages_that_may_have_it(packages):
    for name in ("one", "two", "three"):
        packages(
            name,
            f"{METRIC}brevity = BREVITY",
            metrics={f"of_{name}": f"{name}:brevity"},
            corpora={f"text_{name}": f"{name}:read"},
        )
    assert find("metrics", "accuracy").name == "accuracy"
    assert resolve("corpora", "text:notes.txt")[1] == "notes.txt"
    assert {"text_one", "text_two", "text_three"} <= set(names("corpora"))
    assert not {"one", "two", "three"} & set(sys.modules)
    assert find("metrics", "of_two").name == "brevity"
    assert {"one", "two", "three"} & set(sys.modules) == {"two"}
    packages("four", METRIC, metrics={"brevity": "four:BREVITY"})
    find("metrics", "accuracy")
    assert {"one", "two", "three", "four"} & set(sys.modules) == {"two", "four"}  # what is in capitals may be a family


def test_looking_for_names_imports_no_torch(tmp_path):
    done = python(
        "import sys; from pytest_lmeval import registry as r; [r.names(g) for g in ('tasks', 'corpora', 'models', 'verbs')]; "
        "r.resolve('corpora', 'wikitext-2'); r.resolve('tasks', 'mmlu'); assert 'torch' not in sys.modules",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------ what is not there


@pytest.mark.parametrize(
    ("group", "name", "message"),
    [
        ("metrics", "acuracy", r"no metric 'acuracy'\. Did you mean accuracy\? There are: accuracy, .* more of costs"),
        (
            "exporters",
            "benchr",
            r"Did you mean bencher\? There are: bencher, github-action-benchmark, mlflow, trackio, wandb\.$",
        ),
        ("corpora", "wikitext-2:a:b:c", r"Did you mean wikitext-2\?"),
        ("models", "zoo:mambo", r"no model source 'zoo:mambo'\. Did you mean zoo:mamba\?"),
        ("verbs", "perplexty", r"no verb 'perplexty'\. Did you mean perplexity\?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(group, name, message):
    assert issubclass(RegistryError, LookupError)
    with pytest.raises(RegistryError, match=message):
        raise registry.unknown(group, name)


@settings(max_examples=30)
@given(st.text(max_size=20))
def test_any_text_may_be_an_unknown_name(name):
    if name not in names("exporters"):
        with pytest.raises(RegistryError, match="There are: bencher"):
            find("exporters", name)


# --------------------------------------------------------------------------- what a function is called with


def test_a_function_gets_the_options_that_it_has_parameters_for():
    options = {"dtype": 1, "spec": 2}
    assert accepted(lambda rest, dtype: 0, **options) == {"dtype": 1}
    assert accepted(lambda rest, *, spec=3, dtype=4: 0, **options) == options
    assert accepted(lambda rest, **more: 0, **options) == {}
    assert accepted(lambda dtype, /: 0, **options) == {}
    assert accepted(dict.fromkeys, **options) == accepted(print, **options) == {}
