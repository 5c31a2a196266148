"""Compare a run with a baseline: the part of the plugin that is registered if a baseline is given.

The process that runs a test judges it when it ends; the process with the terminal shows the table.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict, replace

from pytest_lmeval._options import is_worker, option, output_folder, test_id
from pytest_lmeval.errors import BaselineError, DocumentError, nearest
from pytest_lmeval.gates._baseline import Baseline, differences, platform_of, read
from pytest_lmeval.gates._entry import Entry, entry_of, gated, names_of
from pytest_lmeval.gates._margins import Margins, check_sign, read_marker
from pytest_lmeval.records._comparison import Comparison
from pytest_lmeval.records._document import BaselineUse, RunDocument, Skipped
from pytest_lmeval.records._measured import Record, withheld_of
from pytest_lmeval.records._metric import metric
from pytest_lmeval.records._secrets import masked
from pytest_lmeval.records._value import Value

MARKER = "lmeval_gate"


def margins_of(item: pytest.Item) -> Margins:
    """The margins of the marker nearest to the test. Raises UsageError, naming the test, for what is no margin."""
    marker = item.get_closest_marker(MARKER)
    try:
        return read_marker(marker.args, marker.kwargs) if marker else Margins()
    except ValueError as error:
        raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.{MARKER}: {error}") from None


def baseline_file(config: pytest.Config) -> Path | None:
    """`--lmeval-baseline`, relative to where pytest started; or the ini value, relative to the ini file. None if neither."""
    if given := config.getoption("lmeval_baseline"):
        return config.invocation_params.dir / str(given)
    return config.rootpath / str(found) if (found := config.getini("lmeval_baseline")) else None


class MissingTests:
    """Finds the `tests` of a baseline that a run did not measure, except those that were left out on purpose: by -k, -m, the
    name of a test, or with their whole file. Registered in the process that has the terminal."""

    def __init__(self, config: pytest.Config, tests: Collection[str]) -> None:
        self.config, self.tests = config, tests
        self.collected: set[str] = set()  # before anything was deselected
        self.chosen: set[str] = set()
        self.outcomes: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected = {test_id(item.nodeid) for item in items}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.chosen = {test_id(item.nodeid) for item in session.items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Take the tests that the workers chose; what they deselected is unknown here."""
        self.chosen = set(map(test_id, ids))
        option = self.config.option
        self.collected = set() if option.keyword or option.markexpr or option.deselect else self.chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = test_id(report.nodeid)
        if report.skipped and isinstance(report.longrepr, tuple):
            self.outcomes[test] = f"skipped: {str(report.longrepr[2]).removeprefix('Skipped: ')}"
        elif report.failed and report.when == "setup":
            self.outcomes[test] = "it failed before it measured anything"
        else:
            self.outcomes.setdefault(test, "it ran, and recorded nothing")

    def found(self) -> dict[str, str]:
        """Test -> why nothing was measured, in the order of the baseline."""
        reports = self.config.pluginmanager.get_plugin("lmeval-reports")
        recorded = {record.test for record in getattr(reports, "records", ())}
        named = any("::" in str(argument) for argument in self.config.args)  # then files are not run as a whole
        files = set() if named else {test.partition("::")[0] for test in self.collected}
        missed = {}
        for test in self.tests:
            if test in self.chosen and test not in recorded:
                missed[test] = self.outcomes.get(test, "it did not run")
            elif test not in self.collected | self.chosen and test.partition("::")[0] in files:
                missed[test] = "no test of this run has this name: it was renamed or removed, or has other parameters"
        return missed

    def pytest_lmeval_report(self, data: RunDocument) -> None:
        reasons = {test: f"in the baseline, and not measured: {reason}" for test, reason in self.found().items()}
        others = [skipped for skipped in data.skipped if skipped.test not in reasons]
        data.skipped = [*others, *(Skipped(test, reason) for test, reason in reasons.items())]


class Gate:
    """Judges the tests of a run. `log_key`: where the fixture `lmeval` keeps the records of a test; `family`: number of metrics
    gated in the whole run; `changes`: how its platform differs from that of the baseline."""

    def __init__(self, config: pytest.Config, file: Path, log_key: pytest.StashKey[Any]) -> None:
        self.config, self.file, self.log_key = config, file, log_key
        self.family = 0
        self.changes: list[str] = []
        if not is_worker(config):
            known = self.baseline  # reports its faults before the first test, and once
            self.missing_tests = MissingTests(config, known.tests if known else {})
            config.pluginmanager.register(self.missing_tests, "lmeval-missing-tests")

    @cached_property
    def baseline(self) -> Baseline | None:
        try:
            return read(self.file)
        except BaselineError as error:
            raise pytest.UsageError(str(error)) from None

    def known(self, test: str) -> dict[str, Entry]:
        """The baseline of a test: record name -> entry."""
        return self.baseline.tests.get(test, {}) if self.baseline else {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count the gated metrics that the baseline has of the chosen tests."""
        for item in session.items:
            if entries := self.known(test_id(item.nodeid)):
                try:
                    margins = margins_of(item)
                except pytest.UsageError:
                    if not is_worker(self.config):
                        raise
                    continue  # a worker of xdist cannot end the run: the test will fail
                self.family += sum(len(gated(entry, margins)) for entry in entries.values())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        try:
            outcome = yield
        except (Exception, pytest.fail.Exception, pytest.skip.Exception):
            self._judge(item, fails=False)  # show what it measured beside its own failure
            raise
        if worse := self._judge(item, fails=option(self.config, "lmeval-gate") == "fail"):
            pytest.fail(worse, pytrace=False)
        return outcome

    def _judge(self, item: pytest.Item, *, fails: bool) -> str | None:
        """Put the verdicts into the records of a test. Returns why it fails, if `fails` and something got worse."""
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
        notes = unused_margins(log.records, margins)
        missing = [name for name in self.known(log.test) if name not in names_of(log.records)]
        notes += [f"the baseline has {name!r} of it, which this run did not record" for name in missing]
        log.notes += [f"{log.test}: {note}" for note in notes]
        worse = [(record, name, row) for record, name, row in _rows_of(log.records) if row.verdict == "worse"]
        if not worse or not fails:
            return None
        from pytest_lmeval.gates._explain import failure

        accept = f"--from {_readable(output_folder(self.config))} --to {_readable(self.file)}"
        return failure(log.test, worse, baseline=_readable(self.file), accept=accept)

    def _rows(self, test: str, records: Sequence[Record], margins: Margins) -> list[dict[str, Comparison]]:
        from pytest_lmeval.gates._compare import Side, compare, new_rows
        from pytest_lmeval.gates._scores import scores_of

        known, folder = self.known(test), output_folder(self.config)
        scores = (self.baseline.scores or {}) if self.baseline else {}
        named = list(zip(names_of(records), records, strict=True))
        pairs = [
            (Side(known[name], scores.get((test, name))), Side(entry_of(record), scores_of(record, folder)))
            for name, record in named
            if name in known
        ]
        compared = iter(compare(pairs, margins, self.family))
        rows = [next(compared) if name in known else new_rows(entry_of(record), margins) for name, record in named]
        rows = [_with_reasons(record, found) for record, found in zip(records, rows, strict=True)]
        return [found | speed_rows(record, margins) for record, found in zip(records, rows, strict=True)]

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        reports = self.config.pluginmanager.get_plugin("lmeval-reports")
        records: list[Record] = [record for record in getattr(reports, "records", ()) if record.gate]
        notes = [f"not measured: {test} ({reason})" for test, reason in self.missing_tests.found().items()]
        if not (records or notes) or self.config.option.collectonly or self.config.get_verbosity() < -1:
            return
        from pytest_lmeval.gates._explain import table
        from pytest_lmeval.report._words import wrapped

        width = terminalreporter._tw.fullwidth
        terminalreporter.section(f"lmeval: against {_readable(self.file)}")
        lines = table(records, width=width) if records else []
        if records and self.baseline is None:
            notes.append(f"there is no {_readable(self.file)} yet, so everything is new: lmeval baseline accept writes it")
        elif records and self.baseline and self.baseline.scores is None:
            notes.append("its file of examples is missing: only intervals were compared")
        if records and self.changes:
            notes.append(f"made on another platform: {', '.join(self.changes)}")
        for note in notes:
            lines += wrapped(note, width)
        for line in lines:
            terminalreporter.write_line(line)

    @pytest.hookimpl(tryfirst=True)
    def pytest_lmeval_report(self, data: RunDocument) -> None:
        if self.baseline is not None:
            self.changes = differences(self.baseline.file.environment, platform_of(data.environment))
        data.baseline = BaselineUse(_readable(self.file), self.changes)


def _with_reasons(record: Record, rows: dict[str, Comparison]) -> dict[str, Comparison]:
    """The rows, where a number that is missing says why it was not measured."""
    why = withheld_of(record)
    return {
        name: replace(row, note=why[name]) if row.verdict == "missing" and name in why else row for name, row in rows.items()
    }


def _rows_of(records: Sequence[Record]) -> Iterator[tuple[Record, str, Comparison]]:
    return ((record, name, row) for record in records for name, row in (record.gate or {}).items())


def properties(records: Sequence[Record]) -> list[tuple[str, object]]:
    """The verdicts as JUnit properties of the test, visible even if it passes."""
    from pytest_lmeval.report._words import visible

    return [
        (masked(visible(f"lmeval {record.lm.spec}, {record.subject}, {name}, {key}")), value)
        for record, name, row in _rows_of(records)
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
        names = f"the marker {MARKER} names {name}, which"
        if name not in {*metrics, *costs, *speeds, "verdict"}:
            near = nearest(name, [*metrics, *costs, *speeds])
            recorded = ", ".join(metrics) or "no metric"
            found.append(f"{names} the test does not record; it records {recorded}" + (near and f".{near}"))
        elif margin is None or name in speeds:
            continue
        elif name not in kept:
            found.append(f"{names} differs between runs of the same code: it is not gated")
        elif name in metrics:
            if (better := metrics[name].higher_is_better) is None:
                found.append(f"{names} has no better direction: it is not gated")
            elif wrong := check_sign(name, margin, better):
                found.append(f"the marker {MARKER}: {wrong}; it was taken for the latter")
    return found


def speed_rows(record: Record, margins: Margins) -> dict[str, Comparison]:
    """The speeds that the marker names: stored for `lmeval compare-runs`, and not judged here."""
    rows = {}
    for name, value in record.metrics.items():
        margin = next((margins.given[word] for word in _speed_words(name, value) if word in margins.given), None)
        if margin is not None:
            note = "speed is judged by lmeval compare-runs"
            rows[name] = Comparison(verdict="not judged", new=float(value), margin=str(margin), note=note)
    return rows


def _speed_words(name: str, value: Value) -> tuple[str, ...]:
    """The names by which a marker may mean a metric of speed; none for other metrics."""
    declared = metric(name, value)
    return (name, *declared.aliases) if declared.aspect == "speed" else ()


def _readable(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
