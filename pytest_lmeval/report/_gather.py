"""Collect the records of a run, also from xdist workers, and write and show the reports at its end."""

from __future__ import annotations

import json
import time
from html import escape
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lmeval._options import option, output_folder, templates_folder

if TYPE_CHECKING:
    from pytest_lmeval.records._document import Failure, Skipped
    from pytest_lmeval.records._measured import Record

MESSAGE = 4_000  # characters of a failure's message in the reports


class Reports:
    """The reporting part of the plugin, in the process with the terminal.

    A test's records arrive in the attribute `_lmeval` of its report, a JSON string that xdist passes unchanged: {"records",
    "notes", "keys"}. The keys are those of the journal lines that the test wrote or read.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.started = config, time.time()
        self.records: list[Record] = []
        self.notes: list[str] = []
        self.keys: set[str] = set()
        self.skipped: list[Skipped] = []
        self.failures: list[Failure] = []
        self.properties: dict[str, list[tuple[str, object]]] = {}
        self.written: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        folder = output_folder(self.config)
        if option(self.config, "lmeval-fresh") and not self.config.option.collectonly and (folder / "journal.jsonl").exists():
            from pytest_lmeval.records._journal import Journal

            Journal(folder, fresh=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Run first, so that plugins that write JUnit or a report log find the numbers among the properties."""
        log = json.loads(getattr(report, "_lmeval", "{}"))
        self.keys.update(log.get("keys", ()))
        if str(report.outcome) == "rerun":  # pytest-rerunfailures: only the last attempt counts
            return
        records = self._add(report, log) if log else []
        if report.failed and (log or "lmeval" in report.keywords):
            self.failures.append(_failure(report, records))
        report.user_properties += self.properties.get(report.nodeid, [])
        if report.when == "teardown":
            self.properties.pop(report.nodeid, None)

    def _add(self, report: pytest.TestReport, log: dict[str, Any]) -> list[Record]:
        """Add what a test recorded; returns its records."""
        from msgspec.structs import replace

        from pytest_lmeval.records._document import Skipped
        from pytest_lmeval.records._measured import Record
        from pytest_lmeval.records._schema import convert

        self.notes += log["notes"]
        try:
            records = [replace(record, outcome=report.outcome) for record in convert(log["records"], list[Record])]
        except ValueError as error:
            self.notes.append(f"a record of {report.nodeid} does not fit its type, so all of that test are left out: {error}")
            records = []
        self.records += records
        if report.skipped and not records and isinstance(report.longrepr, tuple):
            self.skipped.append(Skipped(report.nodeid, str(report.longrepr[2]).removeprefix("Skipped: ")))
        self.properties[report.nodeid] = _properties(records)
        return records

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if not self.records:
            return
        from pytest_lmeval.report import _write as write

        folder = output_folder(self.config)
        self.written = write.reports(
            folder,
            self.records,
            run=write.run(self.started, self.config.invocation_params.args, int(exitstatus)),
            root=self.config.rootpath,
            skipped=self.skipped,
            failures=self.failures,
            templates=templates_folder(self.config),
            extend=lambda document: self.config.hook.pytest_lmeval_report(config=self.config, data=document),
        )
        if exitstatus not in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            from pytest_lmeval.records._journal import Journal

            Journal(folder).end(self.keys)  # so that the next run measures again

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.records or self.config.get_verbosity() < -1:
            return
        from pytest_lmeval.report import _terminal as terminal
        from pytest_lmeval.report._words import wrapped

        width = terminalreporter._tw.fullwidth
        terminalreporter.section("lmeval")
        notes = [piece for note in self.notes for piece in wrapped(note, width)]
        for line in (*terminal.lines(self.records, width=width), *notes, *self.written):
            terminalreporter.write_line(line)

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, prefix: list[str]) -> None:
        """Link from pytest-html's report to ours."""
        if self.records:
            page = output_folder(self.config).resolve() / "report.html"
            link = f'<a href="{escape(page.as_uri())}">{escape(str(page))}</a>'
            prefix.append(f"<p>lmeval: {len(self.records)} records, {link}</p>")


def _properties(records: list[Record]) -> list[tuple[str, object]]:
    """The headline numbers, as JUnit properties of the test."""
    from pytest_lmeval.report._tables import headlines
    from pytest_lmeval.report._words import visible

    return [
        (visible(f"lmeval {record.lm.spec}, {record.subject}, {name}"), float(record.metrics[name]))
        for record in records
        for name in headlines(record)
    ]


def _failure(report: pytest.TestReport, records: list[Record]) -> Failure:
    """The failed test under the name of its records, with its message and its location."""
    from pytest_lmeval.records._document import Failure

    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(report.longreprtext if crash is None else crash.message)
    if len(message) > MESSAGE:
        message = f"{message[:MESSAGE]}... (the first {MESSAGE:,} of {len(message):,} characters)"
    file, line, _ = report.location
    test = records[0].test if records else report.nodeid
    return Failure(test, message, file, None if line is None else line + 1)
