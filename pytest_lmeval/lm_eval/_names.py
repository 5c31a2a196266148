"""Find the tasks, groups and tags of the installed lm_eval by name: `lm_eval:gsm8k`, `lm_eval:mmlu`, `lm_eval:path/to.yaml`.

lm_eval reads its 14,000 files for six seconds to know their names. That index is kept in the user's cache, until lm_eval or a
folder of its tasks changes; a file of the user's is read alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import msgspec

from pytest_lmeval.errors import TaskError, described, nearest
from pytest_lmeval.lm_eval._code import Code, code_of
from pytest_lmeval.lm_eval._task import PREFIX, lm_eval_task
from pytest_lmeval.records._journal import key_of
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.tasks._suite import Average, Suite
from pytest_lmeval.tasks._task import Task

INSTALL = "pip install 'pytest-lmeval[lm-eval]'"


class Known(msgspec.Struct, frozen=True, array_like=True):
    """What the index holds of one name: its kind (TASK, PY_TASK, GROUP, TAG), its file, and the tasks of a tag."""

    kind: str
    file: str | None
    tasks: tuple[str, ...] = ()


def by_name(name: str) -> Task | Suite:
    """A task of lm_eval, `lm_eval:gsm8k`, or a file of one; a group or a tag is a suite.

    Raises TaskError for a name that lm_eval does not have, with the nearest.
    """
    factory, registry = _factory(), _entries()
    entry = registry.get(name) or _of_file(name)
    if entry is None:
        near = nearest(name, registry)
        raise TaskError(
            f"lm_eval {importlib.metadata.version('lm_eval')} has no task, group or tag {name!r}, and no such file is here."
            f"{near} `lmeval list tasks '{PREFIX}*'` lists all {len(registry):,}."
        )
    with _deferred(factory) as deferred:
        try:
            built = factory.build(entry, overrides=None, registry=registry)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(f"{PREFIX}{name} cannot be read from {entry.yaml_path} ({described(error)}).") from error
    if isinstance(built, deferred):
        return cast("Task", built.task)
    if isinstance(built, list):  # a tag
        return Suite(PREFIX + name, tuple(one.task for one in built), averages=())
    groups = [built, *built.get_all_groups()]
    averages = tuple(average for group in groups for average in _averages(group, whole=group is built))
    return Suite(PREFIX + name, tuple({one.task_name: one.task for one in built.get_all_tasks()}.values()), averages=averages)


def listed() -> list[tuple[str, str]]:
    """The names of all tasks, groups and tags, with their prefix, and what each is. Raises TaskError without lm_eval."""
    _factory()
    kinds = {"GROUP": "a group of tasks", "TAG": "tasks of one tag", "PY_TASK": "a task in Python"}
    return [(PREFIX + name, kinds.get(known.kind, "a task")) for name, known in sorted(_index().items())]


def _averages(group: Any, *, whole: bool) -> Iterator[Average]:
    """The averages that a group declares, each over all its tasks; those of a group inside of another begin with its name."""
    tasks = tuple(PREFIX + one.task_name for one in group.get_all_tasks())
    for wanted in group.aggregate_metric_list or []:
        yield Average(
            metric=wanted.metric,
            tasks=tasks,
            weighted=wanted.weight_by_size,
            filters=None if wanted.filter_list is None else tuple(wanted.filter_list),
            within="" if whole else group.name,
        )


def _of_file(name: str) -> Any:
    """lm_eval's entry for a YAML file of the user's; None if there is no such file."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        entry = TaskIndex.entry_from_path(Path(name))
        if entry is not None and not isinstance(entry.name, str):  # lm_eval takes the tasks of a group for its name
            entry.name = load_yaml(entry.yaml_path, resolve_func=False)["group"]
        return entry
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise TaskError(f"{name}{where} is no task of lm_eval ({described(error)}).") from error


def _factory() -> Any:
    """lm_eval's own maker of tasks and groups. Raises TaskError where lm_eval is not installed, or is another version."""
    try:
        from lm_eval.tasks._factory import TaskFactory
    except ImportError as error:
        raise TaskError(f"tasks named {PREFIX}NAME are those of lm_eval 0.4.13 ({described(error)}): {INSTALL}.") from error
    return TaskFactory()


@contextlib.contextmanager
def _deferred(factory: Any) -> Iterator[Any]:
    """While it lasts, the factory builds tasks that are not loaded: their data are read when they are asked."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import _factory as module

    class Deferred(ConfigurableTask):  # type: ignore[misc]
        """A task of lm_eval that is not loaded, and how to load it."""

        def __init__(
            self, config: dict[str, Any], load: Callable[[], Any] | None = None, code: Callable[[], Code] | None = None
        ) -> None:
            self._name = str(config["task"])
            made = load or functools.partial(ConfigurableTask, config=config)
            self.task = lm_eval_task(PREFIX + self._name, made, code or functools.partial(code_of, None, config))

        @property
        def task_name(self) -> str:
            return self._name

    build = factory._build_task

    def deferred(entry: Any, overrides: dict[str, Any] | None = None) -> Deferred:
        name = (overrides or {}).get("task", entry.name)
        code = functools.partial(code_of, entry.yaml_path, overrides)
        return Deferred({"task": name}, functools.partial(build, entry, overrides), code)

    with mock.patch.object(factory, "_build_task", deferred), mock.patch.object(module, "ConfigurableTask", Deferred):
        yield Deferred


def _entries() -> dict[str, Any]:
    """The index as lm_eval's factory takes it."""
    from lm_eval.tasks._index import Entry, Kind

    return {
        name: Entry(name, Kind[known.kind], known.file and Path(known.file), tags=set(known.tasks))
        for name, known in _index().items()
    }


@functools.cache
def _index() -> dict[str, Known]:
    """All names of the installed lm_eval, from the cache if it holds them."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = sorted((folder, os.stat(folder).st_mtime_ns) for folder, _, _ in os.walk(root))
    key = key_of(version=importlib.metadata.version("lm_eval"), folders=folders)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pytest-lmeval"
    file = home / "lm_eval-names.json"
    with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError):
        kept_key, kept = msgspec.json.decode(file.read_bytes(), type=tuple[str, dict[str, Known]])
        if kept_key == key:
            return kept
    from lm_eval.tasks._index import TaskIndex

    found = {
        name: Known(entry.kind.name, entry.yaml_path and str(entry.yaml_path), tuple(sorted(entry.tags)))
        for name, entry in TaskIndex.build([root]).items()
    }
    with contextlib.suppress(OSError), replacing(file) as new:  # without a cache it is read again
        new.write_bytes(msgspec.json.encode((key, found)))
    return found
