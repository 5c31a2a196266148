"""Gather the records of a run, from workers too, and write and show the reports when it ends."""

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

MESSAGE = 4_000  # characters of a failure's message that the reports take


class Reports:
    """Part of the plugin in the process that has the terminal.

    A test's records reach it as the attribute `_lmeval` of its report, a string of JSON that crosses from an xdist worker
    unchanged: {"records", "notes", "keys"}, the keys being those of the journal's lines that the test wrote or was served from.
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
        """First of all plugins, so that those that write JUnit or a report log find the numbers among the properties."""
        log = json.loads(getattr(report, "_lmeval", "{}"))
        self.keys.update(log.get("keys", ()))
        if str(report.outcome) == "rerun":  # by pytest-rerunfailures: only the last attempt of a test counts
            return
        records = self._take_in(report, log) if log else []
        if report.failed and (log or "lmeval" in report.keywords):
            self.failures.append(_failure(report, records))
        report.user_properties += self.properties.get(report.nodeid, [])
        if report.when == "teardown":
            self.properties.pop(report.nodeid, None)

    def _take_in(self, report: pytest.TestReport, log: dict[str, Any]) -> list[Record]:
        """Keep what a test has recorded; returns its records."""
        from msgspec.structs import replace

        from pytest_lmeval.records._document import Skipped
        from pytest_lmeval.records._measured import Record
        from pytest_lmeval.records._schema import convert

        self.notes += log["notes"]
        try:
            records = [replace(record, outcome=report.outcome) for record in convert(log["records"], list[Record])]
        except ValueError as error:
            self.notes.append(f"what {report.nodeid} recorded is left out, since no record is so: {error}")
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

            Journal(folder).end(self.keys)  # this run came to its end: the next one measures anew

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
        """A link in pytest-html's report to ours."""
        if self.records:
            page = output_folder(self.config).resolve() / "report.html"
            link = f'<a href="{escape(page.as_uri())}">{escape(str(page))}</a>'
            prefix.append(f"<p>lmeval: {len(self.records)} records, {link}</p>")


def _properties(records: list[Record]) -> list[tuple[str, object]]:
    """The numbers that a summary shows, as JUnit's properties of the test."""
    from pytest_lmeval.report._tables import headlines
    from pytest_lmeval.report._words import visible

    return [
        (visible(f"lmeval {record.lm.spec}, {record.subject}, {name}"), float(record.metrics[name]))
        for record in records
        for name in headlines(record)
    ]


def _failure(report: pytest.TestReport, records: list[Record]) -> Failure:
    """Which test failed, by the name that its records have, where it stands, and what it says."""
    from pytest_lmeval.records._document import Failure

    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(report.longreprtext if crash is None else crash.message)
    if len(message) > MESSAGE:
        message = f"{message[:MESSAGE]}... (the first {MESSAGE:,} of {len(message):,} characters)"
    file, line, _ = report.location
    test = records[0].test if records else report.nodeid
    return Failure(test, message, file, None if line is None else line + 1)
