"""The part of the plugin that compares a run with a baseline; registered where one is given.

A test is judged where it ran, when it ends: a regression is that test failing. The process with the terminal shows the table.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict, replace

from pytest_lmeval._options import is_worker, option, output_folder, test_id
from pytest_lmeval.errors import BaselineError, DocumentError, nearest
from pytest_lmeval.gates._baseline import Baseline, differences, place_of, read
from pytest_lmeval.gates._entry import Entry, entry_of, gated, names_of
from pytest_lmeval.gates._margins import Margins, check_sign, read_marker
from pytest_lmeval.gates._missing_tests import MissingTests
from pytest_lmeval.records._comparison import Comparison
from pytest_lmeval.records._document import BaselineUse, RunDocument
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._value import Value

MARKER = "lmeval_gate"


def margins_of(item: pytest.Item) -> Margins:
    """What the marker nearest to the test says. Raises UsageError, naming the test, for what is no margin."""
    marker = item.get_closest_marker(MARKER)
    try:
        return read_marker(marker.args, marker.kwargs) if marker else Margins()
    except ValueError as error:
        raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.{MARKER}: {error}") from None


def baseline_file(config: pytest.Config) -> Path | None:
    """`--lmeval-baseline`, from where pytest was started; an ini value, from the ini file's folder. None if there is none."""
    if given := config.getoption("lmeval_baseline"):
        return config.invocation_params.dir / str(given)
    return config.rootpath / str(found) if (found := config.getini("lmeval_baseline")) else None


class Gate:
    """log_key    where the fixture `lmeval` keeps what a test recorded
    family     metrics that are gated in the whole run
    elsewhere  how the place of the run differs from that of the baseline
    """

    def __init__(self, config: pytest.Config, file: Path, log_key: pytest.StashKey[Any]) -> None:
        self.config, self.file, self.log_key = config, file, log_key
        self.family = 0
        self.elsewhere: list[str] = []
        if not is_worker(config):
            known = self.baseline  # what is wrong with it is told before the first test, and once
            self.missing_tests = MissingTests(config, known.tests if known else {})
            config.pluginmanager.register(self.missing_tests, "lmeval-missing-tests")

    @cached_property
    def baseline(self) -> Baseline | None:
        try:
            return read(self.file)
        except BaselineError as error:
            raise pytest.UsageError(str(error)) from None

    def known(self, test: str) -> dict[str, Entry]:
        """What the baseline has of a test: name of a record -> entry."""
        return self.baseline.tests.get(test, {}) if self.baseline else {}

    @pytest.hookimpl
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count the metrics that are gated: those that the baseline has of the chosen tests."""
        chosen = [(entry, item) for item in session.items for entry in self.known(test_id(item.nodeid)).values()]
        self.family = sum(len(self._gated(entry, item)) for entry, item in chosen)

    def _gated(self, entry: Entry, item: pytest.Item) -> list[str]:
        try:
            return gated(entry, margins_of(item))
        except pytest.UsageError:
            if not is_worker(self.config):
                raise
            return []  # a worker of xdist cannot end the run: the test will fail

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        try:
            outcome = yield
        except (Exception, pytest.fail.Exception, pytest.skip.Exception):
            self._judge(item, fails=False)  # what it measured is shown beside its own failure
            raise
        if worse := self._judge(item, fails=option(self.config, "lmeval-gate") == "fail"):
            pytest.fail(worse, pytrace=False)
        return outcome

    def _judge(self, item: pytest.Item, *, fails: bool) -> str | None:
        """Put the verdicts into the records of a test. Why it fails, if it `fails` for what got worse, and something did."""
        log = item.stash.get(self.log_key, None)
        try:
            margins = margins_of(item)
            if log is None or not log.records or margins.off:
                return None
            gates = self._rows(log.test, log.records, margins)
        except (pytest.UsageError, DocumentError) as error:
            return str(error)
        if fails:
            gates = [{name: replace(row, failed=row.verdict == "worse") for name, row in gate.items()} for gate in gates]
        log.records[:] = [replace(record, gate=gate or None) for record, gate in zip(log.records, gates, strict=True)]
        item.user_properties += properties(log.records)
        unmade = [name for name in self.known(log.test) if name not in names_of(log.records)]
        notes = [f"the baseline has {name!r} of it, which this run did not record" for name in unmade]
        log.notes += [f"{log.test}: {note}" for note in (*unused_margins(log.records, margins), *notes)]
        worse = [
            (record, name, row) for record in log.records for name, row in (record.gate or {}).items() if row.verdict == "worse"
        ]
        if not worse or not fails:
            return None
        from pytest_lmeval.gates._explain import failure

        accept = f"--from {_readable(output_folder(self.config))} --to {_readable(self.file)}"
        return failure(log.test, worse, baseline=_readable(self.file), accept=accept)

    def _rows(self, test: str, records: Sequence[Record], margins: Margins) -> list[dict[str, Comparison]]:
        from pytest_lmeval.gates._compare import Side, compare, new_rows
        from pytest_lmeval.gates._scores import scores_of

        known, names, folder = self.known(test), names_of(records), output_folder(self.config)
        scores = (self.baseline.scores or {}) if self.baseline else {}
        named = list(zip(names, records, strict=True))
        pairs = [
            (Side(known[name], scores.get((test, name))), Side(entry_of(record), scores_of(record, folder)))
            for name, record in named
            if name in known
        ]
        compared = iter(compare(pairs, margins, self.family))
        rows = [next(compared) if name in known else new_rows(entry_of(record), margins) for name, record in named]
        return [found | speed_rows(record, margins) for record, found in zip(records, rows, strict=True)]

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        reports = self.config.pluginmanager.get_plugin("lmeval-reports")
        records: list[Record] = [record for record in getattr(reports, "records", ()) if record.gate]
        said = [f"not measured: {test} ({reason})" for test, reason in self.missing_tests.found().items()]
        if not (records or said) or self.config.option.collectonly or self.config.get_verbosity() < -1:
            return
        from pytest_lmeval.gates._explain import table
        from pytest_lmeval.report._words import wrapped

        width = terminalreporter._tw.fullwidth
        terminalreporter.section(f"lmeval: against {_readable(self.file)}")
        said += self._notes() if records else []
        lines = table(records, width=width) if records else []
        for line in (*lines, *(piece for note in said for piece in wrapped(note, width))):
            terminalreporter.write_line(line)

    def _notes(self) -> list[str]:
        """What is to be said of the baseline as a whole."""
        if self.baseline is None:
            return [f"there is no {_readable(self.file)} yet, so all is new: lmeval baseline accept writes it"]
        missing = [] if self.baseline.scores is not None else ["its file of examples is missing: only intervals were compared"]
        return missing + ([f"made elsewhere: {', '.join(self.elsewhere)}"] if self.elsewhere else [])

    @pytest.hookimpl(tryfirst=True)
    def pytest_lmeval_report(self, data: RunDocument) -> None:
        """The pages say it too."""
        if self.baseline is not None:
            self.elsewhere = differences(self.baseline.file.environment, place_of(data.environment))
        data.baseline = BaselineUse(_readable(self.file), self.elsewhere)


def properties(records: Sequence[Record]) -> list[tuple[str, object]]:
    """The verdicts as JUnit's properties of the test, where they are seen though nothing failed, beside the numbers."""
    from pytest_lmeval.report._words import visible

    return [
        (visible(f"lmeval {record.lm.spec}, {record.subject}, {name}, {key}"), value)
        for record in records
        for name, row in (record.gate or {}).items()
        for key, value in (("verdict", row.verdict), ("base", row.base), ("margin", row.margin))
        if value is not None
    ]


def unused_margins(records: Sequence[Record], margins: Margins) -> list[str]:
    """Margins of the marker that match no gated metric, and why, in words."""
    metrics = {name: value for record in records for name, value in record.metrics.items()}
    costs = {name for record in records for name, cost in asdict(record.cost).items() if cost is not None}
    speeds = {word for name, value in metrics.items() for word in _speed_words(name, value)}
    entries = [entry_of(record) for record in records]
    kept = {name for entry in entries for name in (*entry.metrics, *entry.costs)} | {"verdict"}
    found = []
    for name, margin in margins.given.items():
        if name not in {*metrics, *costs, *speeds, "verdict"}:
            near = nearest(name, [*metrics, *costs, *speeds])
            has = (", ".join(metrics) or "no metric") + (near and f".{near}")
            found.append(f"the marker {MARKER} names {name}, which the test does not record; it records {has}")
        elif margin is None or name in speeds:
            continue
        elif name not in kept:
            found.append(
                f"the marker {MARKER} names {name}, which is another one in every run of the same code: it is not gated"
            )
        elif name in metrics:
            if (better := metrics[name].higher_is_better) is None:
                found.append(f"the marker {MARKER} names {name}, and neither direction of it is better: it is not gated")
            elif wrong := check_sign(name, margin, better):
                found.append(f"the marker {MARKER}: {wrong}; it was taken for the latter")
    return found


def speed_rows(record: Record, margins: Margins) -> dict[str, Comparison]:
    """The speeds that the marker names: kept for a comparison of runs side by side, and not judged here."""
    rows = {}
    for name, value in record.metrics.items():
        margin = next((margins.given[word] for word in _speed_words(name, value) if word in margins.given), None)
        if margin is not None:
            note = "speed is judged by lmeval compare-runs"
            rows[name] = Comparison(verdict="not judged", new=float(value), margin=str(margin), note=note)
    return rows


def _speed_words(name: str, value: Value) -> tuple[str, ...]:
    """The words by which a marker may mean a metric, if that is a speed."""
    declared = metric(name, value)
    return (name, *declared.aliases) if declared.aspect == "speed" else ()


def _readable(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
