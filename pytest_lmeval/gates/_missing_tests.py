"""Tests of the baseline of which a run measured nothing: skipped, renamed, ended early. Unsaid, they would pass for gated.

Tests that were left out on purpose (by -k, -m, the name of a test, or with their whole file) are not mentioned.
"""

from __future__ import annotations

from collections.abc import Collection

import pytest

from pytest_lmeval._options import test_id
from pytest_lmeval.records._document import RunDocument, Skipped

GONE = "no test of this run is called so: it was renamed or removed, or has other parameters"
ENDED = "it did not run"
NOTHING = "it ran, and recorded nothing"


class MissingTests:
    """Part of the plugin in the process that has the terminal. `tests`: those of the baseline."""

    def __init__(self, config: pytest.Config, tests: Collection[str]) -> None:
        self.config, self.tests = config, tests
        self.collected: set[str] = set()  # before anything was deselected
        self.chosen: set[str] = set()
        self.became: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected = {test_id(item.nodeid) for item in items}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.chosen = {test_id(item.nodeid) for item in session.items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Take what the workers chose; what they deselected is not known here."""
        self.chosen = set(map(test_id, ids))
        option = self.config.option
        self.collected = set() if option.keyword or option.markexpr or option.deselect else self.chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = test_id(report.nodeid)
        if report.skipped and isinstance(report.longrepr, tuple):
            self.became[test] = f"skipped: {str(report.longrepr[2]).removeprefix('Skipped: ')}"
        elif report.failed and report.when == "setup":
            self.became[test] = "it failed before it measured anything"
        else:
            self.became.setdefault(test, NOTHING)

    def found(self) -> dict[str, str]:
        """Test -> why nothing was measured, in the order of the baseline."""
        reports = self.config.pluginmanager.get_plugin("lmeval-reports")
        recorded = {record.test for record in getattr(reports, "records", ())}
        named = any("::" in str(argument) for argument in self.config.args)  # such a run has only a part of a file
        files = set() if named else {test.partition("::")[0] for test in self.collected}
        missed = {}
        for test in self.tests:
            if test in self.chosen and test not in recorded:
                missed[test] = self.became.get(test, ENDED)
            elif test not in self.collected | self.chosen and test.partition("::")[0] in files:
                missed[test] = GONE
        return missed

    def pytest_lmeval_report(self, data: RunDocument) -> None:
        told = {skipped.test for skipped in data.skipped}
        reasons = {test: f"in the baseline, and not measured: {reason}" for test, reason in self.found().items()}
        data.skipped += [Skipped(test, reason) for test, reason in reasons.items() if test not in told]
