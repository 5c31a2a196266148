"""The architecture: which module may import which, what an import costs, which names are public, who may step a model."""

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_lmeval
from pytest_lmeval import errors, registry

PACKAGE = Path(pytest_lmeval.__file__).parent
LAYERS = [
    "errors", "registry", "records", "statistics", "models", "engine", "data", "_options", "tasks", "scoring", "profiling",
    "laws", "_ranks", "_session", "_benchmarking", "measures", "lm_eval", "training", "zoo", "report", "gates", "merging",
    "pushing", "watching", "_asking", "_listing", "_progress", "_hookspec", "_frames", "_ranked", "plugin", "__main__",
]  # fmt: skip
PUBLIC = {"errors", "registry", "plugin", "__main__"}  # modules; and packages, whose modules are private
HEAVY = {"torch", "numpy", "datasets", "transformers", "hypothesis", "jinja2", "scipy", "pandas", "tqdm", "safetensors",
         "sklearn", "numba", "torchao", "torchmetrics", "sacrebleu", "rouge_score", "msgspec"}  # fmt: skip


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path):
    """Modules of this package that a file imports, wherever in the file."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytest_lmeval"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("pytest_lmeval"))


def misplaced(path, name):
    own = name.split(".")[1]
    for imported in imports(path):
        _, _, layer = imported.partition(".")
        layer = layer.partition(".")[0]
        if layer and layer != own and LAYERS.index(layer) > LAYERS.index(own):
            yield f"{name} imports {imported} of a higher layer"


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("pytest_lmeval", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        if name != "pytest_lmeval":
            yield path, name


def test_a_module_imports_only_lower_layers(tmp_path):
    assert [fault for path, name in modules() for fault in misplaced(path, name)] == []
    late = tmp_path / "lm.py"
    late.write_text("def late():\n    from pytest_lmeval.measures import Lmeval\n")
    assert list(misplaced(late, "pytest_lmeval.models._model")) == [
        "pytest_lmeval.models._model imports pytest_lmeval.measures.Lmeval of a higher layer"
    ]


def test_zoo_models_and_task_families_do_not_import_each_other():
    for path, name in modules():
        folder = name.rpartition(".")[0]
        if folder.rpartition(".")[2] in ("zoo", "tasks"):
            declared = {f"{folder}.{part}" for part in ("_checks", "_questions", "_task", "_suite", "_rows")}
            shared = {*declared, f"{name}_kernels"}
            others = {f"{folder}.{sibling.stem}" for sibling in path.parent.glob("*.py")} - {name} - shared
            assert [found for found in imports(path) if {found, found.rpartition(".")[0]} & others] == [], name


def test_modules_are_private_and_named_after_what_they_do():
    """Private also because `pytest_lmeval.latency` is a verb and must not be a module."""
    for path, name in modules():
        assert path.stem.startswith("_") or name.partition(".")[2] in PUBLIC, name
        assert path.stem.lstrip("_") not in {"utils", "helpers", "common", "base", "manager"}


def loaded_by(*statements):
    """Modules that a new process has loaded after each statement."""
    script = "import sys, json\n" + "".join(f"{code}\nprint(json.dumps([*sys.modules]))\n" for code in statements)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


def test_importing_the_plugin_loads_few_and_no_heavy_modules():
    before, plugin, numpy = loaded_by("import pytest, argparse", "import pytest_lmeval.plugin", "import numpy")
    assert len(plugin - before) < 20
    assert plugin & HEAVY == set()
    assert numpy & HEAVY == {"numpy"}


def test_a_run_that_does_not_use_the_plugin_loads_nothing_heavy(tmp_path):
    (tmp_path / "test_unrelated.py").write_text("def test_nothing():\n    pass\n")
    arguments = ["-q", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    (loaded,) = loaded_by(f"import os, pytest; os.chdir({str(tmp_path)!r}); assert pytest.main({arguments}) == 0")
    assert loaded & HEAVY == set()
    assert not (tmp_path / ".lmeval").exists()


def test_public_names_exist_and_are_sorted():
    assert list(pytest_lmeval.__all__) == sorted(pytest_lmeval.__all__)
    for name in pytest_lmeval.__all__:
        assert getattr(pytest_lmeval, name).__name__ == name
    with pytest.raises(AttributeError, match=r"has no attribute 'perplexty'\. Did you mean perplexity\?"):
        pytest_lmeval.perplexty  # noqa: B018


@pytest.mark.thorough
def test_type_checkers_see_the_types_of_public_names(tmp_path):
    """A lazily imported name without a stub would be Any, and a wrong call of it would pass."""
    file = tmp_path / "wrong.py"
    file.write_text("from pytest_lmeval import Metric, records\nMetric('x', nonsense=3)\nrecords.load(3)\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), str(file)]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    assert 'Unexpected keyword argument "nonsense" for "Metric"' in found
    assert 'Argument 1 to "load" has incompatible type "int"' in found


def test_the_documentation_of_the_hook_imports_only_public_names():
    from pytest_lmeval._hookspec import pytest_lmeval_report

    assert "from pytest_lmeval import Section, Value" in pytest_lmeval_report.__doc__
    assert "._" not in pytest_lmeval_report.__doc__


@pytest.fixture
def lmeval():
    from pytest_lmeval.measures import Lmeval
    from pytest_lmeval.measures._context import VerbContext

    return Lmeval(VerbContext())


def test_an_unknown_verb_is_an_error_of_this_package_with_the_nearest_name(lmeval):
    with pytest.raises(pytest_lmeval.UnknownVerb, match=r"no verb 'perplexty'\. Did you mean perplexity\?"):
        lmeval.perplexty  # noqa: B018
    assert not hasattr(lmeval, "perplexty")
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
def test_a_wrong_call_is_an_error_of_this_package_and_the_builtin_one(call, builtin, said):
    with pytest.raises(pytest_lmeval.UsageError, match=re.escape(said)) as refused:
        eval(f"pytest_lmeval.{call}", {"pytest_lmeval": pytest_lmeval})
    assert isinstance(refused.value, builtin)


def test_every_verb_is_public_and_the_method_of_the_fixture_is_that_function(lmeval):
    for name, function, _ in registry.things("verbs"):
        assert getattr(pytest_lmeval, name) is function
        assert getattr(lmeval, name).__wrapped__ is function
    source = (PACKAGE / "measures" / "__init__.py").read_text()
    assert re.findall(r"^        (\w+) = staticmethod\(public\.\1\)$", source, re.M) == sorted(registry.names("verbs"))


def test_every_error_is_public_documented_and_of_one_base():
    assert set(errors.__all__) <= set(pytest_lmeval.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.LmevalError)
        assert name in (errors.__doc__ or "")
    defined = {
        f"{name}.{node.name}"
        for path, name in modules()
        for node in nodes(path)
        if isinstance(node, ast.ClassDef)
        and any(getattr(base, "id", "").endswith(("Error", "Exception")) for base in node.bases)
        and name != "pytest_lmeval.errors"
    }
    never_leave = {
        "laws._harness.Raised",
        "measures._context.ElsewhereError",
        "models._hub._Passing",
        "models._servers._client._Passing",
        "profiling._child.CannotMoveError",
    }
    assert defined <= {f"pytest_lmeval.{name}" for name in never_leave}


MAY_STEP = {
    "models": "what a step is",
    "engine": "reads",
    "training._questions": "with gradients: the loss of questions",
    "training._text_objective": "with gradients: the loss of crops of a text",
    "profiling._work": "with gradients: what a training step costs",
}


def steppers(paths):
    """Modules that step a model."""
    for path, name in paths:
        called = (node.func for node in nodes(path) if isinstance(node, ast.Call))
        methods = (function for function in called if isinstance(function, ast.Attribute))
        stepped = {ast.unparse(method.value) for method in methods if method.attr in ("step", "step_fn", "packed_step")}
        if any(not re.search(r"\boptimizer$|\bengine$|^Engine\(", receiver) for receiver in stepped):
            yield name.removeprefix("pytest_lmeval.")


def test_only_the_engine_steps_a_model(tmp_path):
    found = list(steppers(modules()))
    assert [name for name in found if not {name, name.partition(".")[0]} & set(MAY_STEP)] == []
    assert {"engine._engine", "training._questions", "training._text_objective"} <= set(found)
    loop = tmp_path / "loop.py"
    loop.write_text(
        "def read(pieces, state=None):\n    for piece in pieces:\n        _, state = reference.step(piece, state)\n"
    )
    assert list(steppers([(loop, "pytest_lmeval.measures._loop")])) == ["measures._loop"]
