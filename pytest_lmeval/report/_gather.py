"""Collect the records of a run, also from xdist workers, and write and show the reports at its end."""

from __future__ import annotations

import json
import time
from html import escape
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lmeval._options import option, output_folder, share, templates_folder

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_lmeval.records._document import Failure, Skipped
    from pytest_lmeval.records._measured import Record

MESSAGE = 4_000  # characters of a failure's message in the reports
COMMANDS = ("::error ", "::warning ")  # of `_github`, whose parts are escaped


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
        self.tests: dict[str, str] = {}  # that use the fixture `lmeval` -> what became of them, if they recorded nothing
        self.folder: Path | None = None
        self.written: list[str] = []
        self.lost = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        folder = output_folder(self.config)
        if option(self.config, "lmeval-fresh") and not self.config.option.collectonly and (folder / "journal.jsonl").exists():
            from pytest_lmeval.records._journal import Journal

            try:
                Journal(folder, fresh=True)
            except OSError as error:
                why = error.strerror or error
                raise pytest.UsageError(f"--lmeval-fresh: the journal of {folder} cannot be closed ({why}).") from error
        if not (own := share(self.config)).is_whole and not self.config.option.collectonly:
            self._begin(folder, str(own))

    def _begin(self, folder: Path, own: str) -> None:
        """Write to the journal which share of the examples this run scores. Refuses a folder with results of another."""
        from pytest_lmeval.records._journal import Journal

        journal = Journal(folder)
        others = [line.share for line in journal.last_run() if line.share != own]
        if others and not option(self.config, "lmeval-fresh"):
            holds = f"shard {others[0]}" if others[0] else "results of a run without --lmeval-shard"
            raise pytest.UsageError(
                f"--lmeval-shard {own}: {folder} holds {holds}. Give each shard a folder of its own: --lmeval-dir, or "
                "--lmeval-fresh to begin anew in this one."
            )
        try:
            journal.begin(own)
        except OSError as error:
            why = error.strerror or error
            raise pytest.UsageError(f"--lmeval-shard {own}: nothing can be written to {folder} ({why}).") from error

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Run first, so that plugins that write JUnit or a report log find the numbers among the properties."""
        log = json.loads(getattr(report, "_lmeval", "{}"))
        self.keys.update(log.get("keys", ()))
        if str(report.outcome) == "rerun":  # pytest-rerunfailures: only the last attempt counts
            return
        if hasattr(report, "_lmeval_test"):
            self.tests[report.nodeid] = "it ran, and recorded nothing"
        records = self._add(report, log) if log else []
        if report.nodeid in self.tests:  # a report that xdist writes for a crashed worker has no attributes
            self._add_outcome(report, records)
        report.user_properties += self.properties.get(report.nodeid, [])
        if report.when == "teardown":
            self.properties.pop(report.nodeid, None)

    def _add_outcome(self, report: pytest.TestReport, records: list[Record]) -> None:
        from pytest_lmeval.records._document import Skipped
        from pytest_lmeval.records._secrets import masked

        if report.failed:
            self.failures.append(_failure(report, records))
        elif report.skipped and not records and isinstance(report.longrepr, tuple):
            self.skipped.append(Skipped(masked(report.nodeid), masked(str(report.longrepr[2]).removeprefix("Skipped: "))))

    def _add(self, report: pytest.TestReport, log: dict[str, Any]) -> list[Record]:
        """Add what a test recorded; returns its records."""
        from msgspec.structs import replace

        from pytest_lmeval.records._measured import Record
        from pytest_lmeval.records._schema import convert
        from pytest_lmeval.records._secrets import without_secrets

        log = without_secrets(log)
        self.notes += log["notes"]
        try:
            records = [replace(record, outcome=report.outcome) for record in convert(log["records"], list[Record])]
        except ValueError as error:
            self.notes.append(f"a record of {report.nodeid} does not fit its type, so all of that test are left out: {error}")
            records = []
        self.records += records
        self.properties[report.nodeid] = _properties(records)
        return records

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the reports, if a test of this run uses the fixture `lmeval`: also those of a run that recorded nothing."""
        if not self.tests or self.config.getoption("setuponly", False):
            return
        from pytest_lmeval.records._document import Skipped
        from pytest_lmeval.report import _write as write

        if not self.records:
            known = {skipped.test for skipped in self.skipped} | {failure.test for failure in self.failures}
            self.skipped += [Skipped(test, why) for test, why in self.tests.items() if test not in known]
        folder = output_folder(self.config)
        written = write.reports(
            folder,
            self.records,
            run=write.run(self.started, self.config.invocation_params.args, int(exitstatus)),
            root=self.config.rootpath,
            skipped=self.skipped,
            failures=self.failures,
            templates=templates_folder(self.config),
            extend=lambda document: self.config.hook.pytest_lmeval_report(config=self.config, data=document),
        )
        self.folder, self.written, self.lost = written.folder, written.lines, written.folder != folder
        if self.lost and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED  # a run whose results are not where they belong is not green
        if not self.lost and exitstatus not in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            self._end(folder)

    def _end(self, folder: Path) -> None:
        """Close the journal, so that the next run measures again, and delete what killed runs left."""
        from pytest_lmeval.records._journal import Journal, clean

        try:
            if (folder / "journal.jsonl").exists():
                Journal(folder).end(self.keys)
        except OSError as error:
            again = "The next run takes these results from it, unless it is started with --lmeval-fresh"
            self.written.append(f"the journal could not be closed ({error.strerror or error}). {again}.")
        clean(folder)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.written or (self.config.get_verbosity() < -1 and not self.lost):
            return
        from pytest_lmeval.report import _terminal as terminal
        from pytest_lmeval.report._words import safe_lines, wrapped

        width = terminalreporter._tw.fullwidth
        terminalreporter.section("lmeval")
        notes = [piece for note in self.notes for piece in wrapped(note, width)]
        shown = terminal.lines(self.records, width=width) if self.records else ["nothing was measured", ""]
        for line in (*shown, *notes, *self.written):
            terminalreporter.write_line(line if line.startswith(COMMANDS) else safe_lines(line))

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, prefix: list[str]) -> None:
        """Link from pytest-html's report to ours."""
        if self.folder is not None:
            page = self.folder.resolve() / "report.html"
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
    from pytest_lmeval.records._secrets import masked

    crash = getattr(report.longrepr, "reprcrash", None)
    message = masked(str(report.longreprtext if crash is None else crash.message))
    if len(message) > MESSAGE:
        message = f"{message[:MESSAGE]}... (the first {MESSAGE:,} of {len(message):,} characters)"
    file, line, _ = report.location
    test = records[0].test if records else masked(report.nodeid)
    return Failure(test, message, file, None if line is None else line + 1)
