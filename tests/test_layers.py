"""The architecture, held to: who may import whom, what importing costs, and which names are public."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_lmeval

PACKAGE = Path(pytest_lmeval.__file__).parent
LAYERS = [
    "errors", "registry", "records", "statistics", "models", "engine", "data", "_options", "tasks", "scoring", "profiling",
    "laws", "_session", "_benchmarking", "measures", "training", "zoo", "report", "gates", "_listing", "_progress", "_hookspec",
    "_frames", "plugin", "__main__",
]  # fmt: skip
PUBLIC = {"errors", "registry", "plugin", "__main__"}  # modules; and packages, whose modules are private
HEAVY = {"torch", "numpy", "datasets", "transformers", "hypothesis", "jinja2", "scipy", "pandas", "tqdm", "safetensors",
         "sklearn", "torchao", "torchmetrics", "sacrebleu", "rouge_score", "msgspec"}  # fmt: skip


def layer_of(module):
    return module.split(".")[1] if "." in module else ""


def imports(path):
    """Modules of this package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytest_lmeval"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("pytest_lmeval"))


def misplaced(path, name):
    own = layer_of(name)
    for imported in imports(path):
        layer = layer_of(imported)
        if layer and layer != own and LAYERS.index(layer) > LAYERS.index(own):
            yield f"{name} imports {imported}, which stands below it"


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("pytest_lmeval", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        if name != "pytest_lmeval":
            yield path, name


def test_a_module_imports_only_what_stands_above_it():
    assert [fault for path, name in modules() for fault in misplaced(path, name)] == []


def test_this_test_can_fail(tmp_path):
    path = tmp_path / "lm.py"
    path.write_text("def late():\n    from pytest_lmeval.measures import Lmeval\n")
    assert list(misplaced(path, "pytest_lmeval.models._model")) == [
        "pytest_lmeval.models._model imports pytest_lmeval.measures.Lmeval, which stands below it"
    ]


def test_models_of_the_zoo_and_families_of_tasks_do_not_know_their_neighbours():
    for path, name in modules():
        folder = name.rpartition(".")[0]
        if folder.rpartition(".")[2] in ("zoo", "tasks"):
            others = {f"{folder}.{sibling.stem}" for sibling in path.parent.glob("*.py")} - {name, f"{folder}._questions"}
            neighbours = [found for found in imports(path) if {found, found.rpartition(".")[0]} & others]
            assert neighbours == [], name


def test_no_file_is_a_drawer_for_everything():
    names = {path.stem.lstrip("_") for path, _ in modules()}
    assert not names & {"utils", "helpers", "common", "base", "manager"}


def loaded_by(code):
    """Heavy packages in sys.modules after running some code in a new process."""
    script = f"import sys\n{code}\nimport json; print(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_plugin_loads_nothing_heavy():
    assert loaded_by("import pytest_lmeval.plugin") == []


def test_this_test_too_can_fail():
    assert loaded_by("import pytest_lmeval.plugin, numpy") == ["numpy"]


def test_a_run_that_uses_nothing_of_it_loads_nothing_heavy(tmp_path):
    (tmp_path / "test_unrelated.py").write_text("def test_nothing():\n    pass\n")
    code = (
        "import os, pytest\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "assert pytest.main(['-q', '-p', 'no:hypothesispytest', '-p', 'no:cacheprovider']) == 0"
    )
    assert loaded_by(code) == []
    assert not (tmp_path / ".lmeval").exists()


def test_importing_the_plugin_costs_less_than_ten_milliseconds_of_processor_time():
    """Processor time, the best of several: not asserted on a clock that other programs share."""
    code = (
        "import pytest, argparse, time; began = time.process_time(); import pytest_lmeval.plugin;"
        "print(time.process_time() - began)"
    )
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5)
    )
    assert seconds < 0.010


def test_public_names_are_there_and_sorted():
    assert list(pytest_lmeval.__all__) == sorted(pytest_lmeval.__all__)
    for name in pytest_lmeval.__all__:
        assert getattr(pytest_lmeval, name).__name__ == name
    with pytest.raises(AttributeError, match=r"has no attribute 'perplexty'\. Did you mean perplexity\?"):
        pytest_lmeval.perplexty  # noqa: B018


def test_what_a_hook_is_told_to_import_is_public():
    from pytest_lmeval._hookspec import pytest_lmeval_report

    assert "from pytest_lmeval import Section, Value" in pytest_lmeval_report.__doc__
    assert "._" not in pytest_lmeval_report.__doc__


def test_a_verb_that_does_not_exist_is_an_error_of_this_package_with_the_near_name():
    from pytest_lmeval.measures import Lmeval
    from pytest_lmeval.measures._context import VerbContext

    with pytest.raises(pytest_lmeval.UnknownVerb, match=r"no verb 'perplexty'\. Did you mean perplexity\?"):
        Lmeval(VerbContext()).perplexty  # noqa: B018
    assert not hasattr(Lmeval(VerbContext()), "perplexty")
    assert issubclass(pytest_lmeval.UnknownVerb, pytest_lmeval.UsageError)


@pytest.mark.parametrize(
    ("call", "builtin", "said"),
    [
        ("perplexity()", TypeError, "perplexity cannot be called so: missing a required argument: 'lm'. It has lm, "),
        ("record()", TypeError, "record cannot be called so: missing a required argument: 'lm'. It has lm, subject."),
        ("latency('demo', *range(12))", TypeError, "latency cannot be called so: too many positional arguments. It has lm, b"),
        ("latency('demo', seq_length=3)", TypeError, "latency has no keyword 'seq_length'. Did you mean seq_len?"),
        ("equivalence('demo', profile='nightley')", ValueError, "no profile 'nightley'. Did you mean nightly? There are"),
        ("record('demo', 's', a=float('nan'))", ValueError, "a=nan cannot be recorded: "),
        ("record('demo', 's', a='x')", ValueError, "a='x' cannot be recorded: a value and the ends of its interval are"),
        ("record('demo', 5, a=1)", ValueError, "the subject of a record is a text that says what was measured; got 5"),
        ("Value(0.5, unit=3)", ValueError, "the unit of a value is a text"),
        ("task('demo', 5)", ValueError, "a task is a Task, or the name of one; got 5"),
        ("suite('demo', 5)", ValueError, "a suite is a Suite, or the name of one; got 5"),
        ("Series([1], [1, 2])", ValueError, "has 1 and 2"),
    ],
)
def test_a_call_that_is_none_is_an_error_of_this_package_and_the_builtin_one(call, builtin, said):
    with pytest.raises(pytest_lmeval.UsageError, match=re.escape(said)) as refused:
        eval(f"pytest_lmeval.{call}", {"pytest_lmeval": pytest_lmeval})
    assert isinstance(refused.value, builtin)


def test_every_verb_is_public_and_the_method_of_the_fixture_is_that_function():
    from pytest_lmeval import registry
    from pytest_lmeval.measures import Lmeval
    from pytest_lmeval.measures._context import VerbContext

    lmeval = Lmeval(VerbContext())
    for name, function, _ in registry.things("verbs"):
        assert getattr(pytest_lmeval, name) is function
        assert getattr(lmeval, name).__wrapped__ is function
    typed = re.findall(
        r"^        (\w+) = staticmethod\(public\.\1\)$", (PACKAGE / "measures" / "__init__.py").read_text(), re.M
    )
    assert typed == sorted(registry.names("verbs"))


def test_every_error_of_the_tree_is_public():
    from pytest_lmeval import errors

    assert set(errors.__all__) <= set(pytest_lmeval.__all__)


def test_public_names_have_their_types(tmp_path):
    """For whoever checks types: a name that is imported late would be Any, and a wrong call of it would pass."""
    file = tmp_path / "wrong.py"
    file.write_text("from pytest_lmeval import Metric, records\nMetric('x', nonsense=3)\nrecords.load(3)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), str(file)], capture_output=True, text=True
    )
    assert 'Unexpected keyword argument "nonsense" for "Metric"' in done.stdout
    assert 'Argument 1 to "load" has incompatible type "int"' in done.stdout


def test_what_is_private_looks_private():
    """So no module has the name of a verb either, which `pytest_lmeval.latency` would lead to in place of the function."""
    for path, name in modules():
        assert path.stem.startswith("_") or name.partition(".")[2] in PUBLIC, name


def test_every_error_that_is_raised_on_purpose_has_one_base():
    from pytest_lmeval import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.LmevalError)
        assert name in (errors.__doc__ or "")
    defined = {
        f"{name}.{node.name}"
        for path, name in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(getattr(base, "id", "").endswith(("Error", "Exception")) for base in node.bases)
        and name != "pytest_lmeval.errors"
    }
    assert defined <= {"pytest_lmeval.laws._harness.Raised", "pytest_lmeval.profiling._child.CannotMoveError"}  # never leave it


def test_values_are_really_frozen():
    """No dict or list that a method of a frozen value changes: what a value says must not depend on who asked first."""
    from pytest_lmeval.models._model import Model

    assert "remembered" not in Model.__dataclass_fields__


MAY_STEP = {
    "models": "what a step is",
    "engine": "reads",
    "training._loop": "with gradients: the loss of a batch",
    "profiling._work": "with gradients: what a training step costs",
}


def steppers(paths):
    """Modules in which something steps a model."""
    for path, name in paths:
        called = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        methods = (function for function in called if isinstance(function, ast.Attribute))
        stepped = {ast.unparse(method.value) for method in methods if method.attr in ("step", "step_fn")}
        if any(not re.search(r"\boptimizer$|\bengine$|^Engine\(", receiver) for receiver in stepped):
            yield name.removeprefix("pytest_lmeval.")


def test_nothing_but_the_engine_steps_a_model():
    found = list(steppers(modules()))
    assert [name for name in found if not {name, name.partition(".")[0]} & set(MAY_STEP)] == []
    assert {"engine._engine", "training._loop"} <= set(found)


def test_a_loop_over_steps_elsewhere_would_be_found(tmp_path):
    path = tmp_path / "loop.py"
    path.write_text(
        "def read(pieces, state=None):\n    for piece in pieces:\n        _, state = reference.step(piece, state)\n"
    )
    assert list(steppers([(path, "pytest_lmeval.measures._loop")])) == ["measures._loop"]
