"""The numbers of a run are sent to services that track them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from documents import document, perplexity_of, task_of, write_run

from pytest_lmeval.__main__ import main
from pytest_lmeval.report._loggers import numbers

BESIDE = "t.py::test_task (demo, brackets)/accuracy"
NAMES = ("mlflow", "trackio", "wandb")


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", document(task_of()))
    (folder / "report.html").write_text("<html></html>")
    return folder


def test_a_number_has_its_interval_beside_it_if_it_has_one():
    assert numbers(document(task_of())) == {BESIDE: 0.5, f"{BESIDE}_low": 0.4, f"{BESIDE}_high": 0.6}
    found = numbers(document(perplexity_of()))
    assert [name.rpartition("/")[2] for name in found if "nll" in name] == ["nll"]


@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_is_missing_is_named_with_its_extra(run, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["render", str(run), "--format", name]) == 2
    assert f"pip install 'pytest-lmeval[{name}]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_report_are_sent_and_nothing_else(run, monkeypatch, name):
    """A recorder in place of the library, which is no dependency of these tests: it shows what is called, not that it works."""
    calls = []

    class Recorder(ModuleType):
        id = name = run_id = "1"

        def __getattr__(self, attribute):
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return lambda *args, **options: calls.append((attribute, *args)) or self

        def __enter__(self):
            return SimpleNamespace(info=self)

        def __exit__(self, *error):
            """The run ends."""

    library = Recorder(name)
    library.summary = SimpleNamespace(update=library.log)
    monkeypatch.setitem(sys.modules, name, library)
    before = sorted(run.iterdir())
    assert main(["render", str(run), "--format", name]) == 0
    sent = [call for call in calls if call[0] in ("log", "log_metrics")]
    assert [sorted(value for value in values.values()) for _, values in sent] == [[0.4, 0.5, 0.6]]
    assert [call[1] for call in calls if call[0] in ("log_artifact", "save")] == [str(run / "report.html")]
    assert sorted(run.iterdir()) == before
