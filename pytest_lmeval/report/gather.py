"""Gathering the records of a run, from workers too, and what is done with them when it ends."""

from __future__ import annotations

import json
import time
from html import escape
from typing import Any

import pytest

from pytest_lmeval.options import option, output_folder, templates_folder

MESSAGE = 4_000  # characters of a failure's message that the reports take


class Reports:
    """Part of the plugin in the process that has the terminal: takes in records, writes the reports, shows the summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.started = config, time.time()
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.keys: set[str] = set()
        self.skipped: list[dict[str, str]] = []
        self.failures: list[dict[str, Any]] = []
        self.properties: dict[str, list[tuple[str, object]]] = {}
        self.written: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        folder = output_folder(self.config)
        if option(self.config, "lmeval-fresh") and not self.config.option.collectonly and (folder / "journal.jsonl").exists():
            from pytest_lmeval.records.journal import Journal

            Journal(folder, fresh=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """First of all plugins, so that those that write JUnit or a report log find the numbers among the properties."""
        if content := getattr(report, "_lmeval", None):
            log = json.loads(content)
            self.keys.update(log["keys"])
            if str(report.outcome) == "rerun":  # by pytest-rerunfailures: only the last attempt of a test counts
                return
            self.records += [{**record, "outcome": report.outcome} for record in log["records"]]
            self.notes += log["notes"]
            if report.skipped and not log["records"] and isinstance(report.longrepr, tuple):
                self.skipped.append({"test": report.nodeid, "reason": str(report.longrepr[2]).removeprefix("Skipped: ")})
            self.properties[report.nodeid] = _properties(log["records"])
        if report.failed and (content or "lmeval" in report.keywords):
            self.failures.append(_failure(report, log["records"] if content else []))
        report.user_properties += self.properties.get(report.nodeid, [])
        if report.when == "teardown":
            self.properties.pop(report.nodeid, None)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if not self.records:
            return
        from pytest_lmeval.report import write

        folder = output_folder(self.config)
        self.written = write.reports(
            folder,
            self.records,
            run={"started": self.started, "command": self.config.invocation_params.args, "exit_status": int(exitstatus)},
            root=self.config.rootpath,
            skipped=self.skipped,
            failures=self.failures,
            templates=templates_folder(self.config),
            extend=lambda document: self.config.hook.pytest_lmeval_report(config=self.config, data=document),
        )
        if exitstatus not in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            from pytest_lmeval.records.journal import Journal

            Journal(folder).end(self.keys)  # this run came to its end: the next one measures anew

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.records or self.config.get_verbosity() < -1:
            return
        from pytest_lmeval.report import terminal
        from pytest_lmeval.report.words import wrapped

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


def _properties(records: list[dict[str, Any]]) -> list[tuple[str, object]]:
    """The numbers that a summary shows, as JUnit's properties of the test."""
    from pytest_lmeval.report.tables import headlines
    from pytest_lmeval.report.words import visible

    return [
        (visible(f"lmeval {record['lm']['spec']}, {record['subject']}, {name}"), record["metrics"][name]["value"])
        for record in records
        for name in headlines(record)
    ]


def _failure(report: pytest.TestReport, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Which test failed, by the name that its records have, where it stands, and what it says."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(report.longreprtext if crash is None else crash.message)
    if len(message) > MESSAGE:
        message = f"{message[:MESSAGE]}... (the first {MESSAGE:,} of {len(message):,} characters)"
    file, line, _ = report.location
    test = records[0]["test"] if records else report.nodeid
    return {"test": test, "message": message, "file": file, "line": None if line is None else line + 1}
