"""Gathering the records of a run, from workers too, and what is done with them when it ends."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from pytest_lmeval.options import option, output_folder


class Reports:
    """Part of the plugin in the process that has the terminal: takes in records, writes the reports, shows the summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.started = config, time.time()
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.keys: set[str] = set()
        self.skipped: list[dict[str, str]] = []
        self.written: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        folder = output_folder(self.config)
        if option(self.config, "lmeval-fresh") and not self.config.option.collectonly and (folder / "journal.jsonl").exists():
            from pytest_lmeval.results.journal import Journal

            Journal(folder, fresh=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if content := getattr(report, "_lmeval", None):
            log = json.loads(content)
            self.keys.update(log["keys"])
            if str(report.outcome) == "rerun":  # by pytest-rerunfailures: only the last attempt of a test counts
                return
            self.records += [{**record, "outcome": report.outcome} for record in log["records"]]
            self.notes += log["notes"]
            if report.skipped and not log["records"] and isinstance(report.longrepr, tuple):
                self.skipped.append({"test": report.nodeid, "reason": str(report.longrepr[2]).removeprefix("Skipped: ")})

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if not self.records:
            return
        from pytest_lmeval.report import write

        folder = output_folder(self.config)
        run = {"started": self.started, "command": self.config.invocation_params.args, "exit_status": int(exitstatus)}
        self.written = write.reports(folder, self.records, run=run, root=self.config.rootpath, skipped=self.skipped)
        if exitstatus not in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            from pytest_lmeval.results.journal import Journal

            Journal(folder).end(self.keys)  # this run came to its end: the next one measures anew

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.records or self.config.get_verbosity() < -1:
            return
        from pytest_lmeval.report import terminal

        terminalreporter.section("lmeval")
        for line in terminal.lines(self.records, width=terminalreporter._tw.fullwidth):
            terminalreporter.write_line(line)
        for line in (*self.notes, *self.written):
            terminalreporter.write_line(line)
