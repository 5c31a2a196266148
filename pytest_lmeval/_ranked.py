"""Run pytest in several processes that torchrun started: the same tests in all, one terminal, one report, one outcome a test.

The first process writes the files and has the terminal; the others write nothing but their own unfinished work. Nothing waits
for another process in a finalizer: processes agree after a test, and after its teardown.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Generator
from types import FrameType
from typing import Any

import pytest

from pytest_lmeval._ranks import Ranks
from pytest_lmeval.errors import RankError

WRITERS = {  # options of pytest and of plugins that write files -> what turns them off
    "xmlpath": None, "log_file": None, "report_log": None, "htmlpath": None, "benchmark_json": None, "benchmark_save": None,
    "benchmark_autosave": False, "benchmark_histogram": None, "json_report_file": None, "cov_source": None,
}  # fmt: skip
MESSAGE = 600  # characters of a failure that another process shows


class RankHooks:
    """Implementations of pytest's hooks in a process of several."""

    def __init__(self, config: pytest.Config, ranks: Ranks) -> None:
        self.config, self.ranks, self.ended = config, ranks, False
        self.not_collected: list[str] = []
        if not ranks.is_first:
            self._write_nothing()
        signal.signal(signal.SIGTERM, self._interrupt)  # torchrun sends it to all others when one has died

    def _write_nothing(self) -> None:
        """Leave every file that several processes would write at once to the first."""
        for name, off in WRITERS.items():
            if getattr(self.config.option, name, off) != off:
                setattr(self.config.option, name, off)
        if (folder := getattr(self.config.option, "basetemp", None)) is not None:
            self.config.option.basetemp = f"{folder}-rank{self.ranks.rank}"
        cache: Any = getattr(self.config, "cache", None)
        if cache is not None:
            cache.set = lambda key, value: None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Leave the terminal to the first."""
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and not self.ranks.is_first:
            terminal._tw._file = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """End as at Ctrl-C: the first process still writes its report."""
        if not self.ended:
            self.ended = True
            raise KeyboardInterrupt("SIGTERM: another rank of this run has died, or it was stopped")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.not_collected.append(f"{report.nodeid}: {_said(report)}")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Refuse to run where the ranks have not collected the same tests: they would wait for one another for ever."""
        names = [item.nodeid for item in session.items]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        try:
            found = self.ranks.together("the collection of tests", (len(names), digest, self.not_collected))
        except RankError as error:
            raise pytest.UsageError(str(error)) from None
        for rank, (count, theirs, not_collected) in enumerate(found):
            if theirs != digest:
                failed = dict.fromkeys([*self.not_collected, *not_collected])
                why = f" Not collected: {'; '.join(failed)}" if failed else ""
                raise pytest.UsageError(
                    f"rank {self.ranks.rank} collected {len(names)} tests and rank {rank} {count}, or others. All run the same "
                    f"tests in the same order. Do not let parameters depend on the rank, on time or on a set's order.{why}"
                )

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        """Agree on the outcome of a test: if it failed on one rank, it failed."""
        report = yield
        if report.when == "call" or (report.when == "setup" and not report.passed) or report.when == "teardown":
            phase = "teardown" if report.when == "teardown" else "end"
            own = None if report.passed else f"{report.outcome}: {_said(report)}"
            try:
                said = self.ranks.end(f"the {phase} of {item.nodeid}", own)
            except RankError as error:
                pytest.exit(str(error), returncode=pytest.ExitCode.TESTS_FAILED)
            others = {rank: text for rank, text in enumerate(said) if text is not None and rank != self.ranks.rank}
            worst = next((rank for rank, text in others.items() if text.startswith("failed")), next(iter(others), None))
            if worst is not None and (report.passed or (report.skipped and others[worst].startswith("failed"))):
                outcome, _, text = others[worst].partition(": ")
                report.outcome = outcome
                message = f"on rank {worst} of {self.ranks.world}: {text}"
                path, line, _ = item.location
                report.longrepr = message if outcome == "failed" else (path, line, f"Skipped: {message}")
        return report

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Name the ranks that are lost, in the reports of the first."""
        reports: Any = self.config.pluginmanager.get_plugin("lmeval-reports")
        if self.ended and reports is not None and (lost := self.ranks.lost()):
            ranks = ", ".join(map(str, lost))
            reports.notes.append(
                f"rank {ranks} of {self.ranks.world} is lost: it was killed, or ran out of memory. What is finished is kept; "
                "start the run again, and it goes on from there."
            )

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is written, and the exit status is that of the tests
        self.ranks.leave()


def _said(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The message of a test that did not pass."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")[:MESSAGE]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longreprtext if crash is None else crash.message)[:MESSAGE]
