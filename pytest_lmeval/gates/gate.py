"""The part of the plugin that compares a run with a baseline; registered where one is given.

A test is judged where it ran, when it ends: a regression is that test failing. The process with the terminal shows the table.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from pytest_lmeval.errors import BaselineError
from pytest_lmeval.gates.baseline import ENVIRONMENT, Baseline, read
from pytest_lmeval.gates.entry import entry_of, gated, names_of
from pytest_lmeval.gates.margins import NOT_JUDGED, SPEED_NAMES, Margins, check_sign, is_speed, read_marker
from pytest_lmeval.gates.unmeasured import Unmeasured
from pytest_lmeval.options import is_worker, option, output_folder, test_id

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
    """log_key  where the fixture `lmeval` keeps what a test recorded"""

    def __init__(self, config: pytest.Config, file: Path, log_key: pytest.StashKey[Any]) -> None:
        self.config, self.file, self.log_key = config, file, log_key
        self.family = 0
        if not is_worker(config):
            known = self.baseline  # what is wrong with it is told before the first test, and once
            self.unmeasured = Unmeasured(config, known.tests if known else {})
            config.pluginmanager.register(self.unmeasured, "lmeval-unmeasured")

    @cached_property
    def baseline(self) -> Baseline | None:
        try:
            return read(self.file)
        except BaselineError as error:
            raise pytest.UsageError(str(error)) from None

    @pytest.hookimpl
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many metrics are gated: those that the baseline has of the chosen tests."""
        tests = self.baseline.tests if self.baseline else {}
        chosen = [(entry, item) for item in session.items for entry in tests.get(test_id(item.nodeid), {}).values()]
        self.family = sum(len(self._gated(entry, item)) for entry, item in chosen)

    def _gated(self, entry: dict[str, Any], item: pytest.Item) -> list[str]:
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
        except pytest.UsageError as error:
            return str(error)
        if log is None or not log.records or margins.off:
            return None
        from pytest_lmeval.gates.explain import failure

        records = [record.to_json() for record in log.records]
        gates = self._rows(log.test, records, margins)
        worse = [
            (record, name, row)
            for record, gate in zip(records, gates, strict=True)
            for name, row in gate.items()
            if row["verdict"] == "worse"
        ]
        for *_, row in worse if fails else ():
            row["failed"] = True
        log.records[:] = [replace(record, gate=gate or None) for record, gate in zip(log.records, gates, strict=True)]
        item.user_properties += properties(records, gates)
        remarks = unheard(records, margins) + self._unmade(log.test, records)
        log.notes += [f"{log.test}: {remark}" for remark in remarks]
        accept = f"--from {_readable(output_folder(self.config))} --to {_readable(self.file)}"
        return failure(log.test, worse, baseline=_readable(self.file), accept=accept) if worse and fails else None

    def _unmade(self, test: str, records: list[dict[str, Any]]) -> list[str]:
        known = self.baseline.tests.get(test, {}) if self.baseline else {}
        return [
            f"the baseline has {name!r} of it, which this run did not record" for name in set(known) - set(names_of(records))
        ]

    def _rows(self, test: str, records: list[dict[str, Any]], margins: Margins) -> list[dict[str, dict[str, Any]]]:
        from pytest_lmeval.gates.compare import Side, compare, new_rows
        from pytest_lmeval.gates.scores import scores_of

        known = self.baseline.tests.get(test, {}) if self.baseline else {}
        scores = (self.baseline.scores or {}) if self.baseline else {}
        names, entries = names_of(records), [entry_of(record) for record in records]
        rows = [{} if name in known else new_rows(entry, margins) for name, entry in zip(names, entries, strict=True)]
        old = [place for place, name in enumerate(names) if name in known]
        pairs = [
            (
                Side(known[names[place]], scores.get((test, names[place]))),
                Side(entries[place], scores_of(records[place], output_folder(self.config))),
            )
            for place in old
        ]
        for place, found in zip(old, compare(pairs, margins, self.family), strict=True):
            rows[place] = found
        for record, found in zip(records, rows, strict=True):
            found |= speed_rows(record, margins)
        return rows

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        reports = self.config.pluginmanager.get_plugin("lmeval-reports")
        records = [record for record in getattr(reports, "records", ()) if record.get("gate")]
        missed = [f"not measured: {test} ({reason})" for test, reason in self.unmeasured.found().items()]
        if not (records or missed) or self.config.option.collectonly or self.config.get_verbosity() < -1:
            return
        from pytest_lmeval.gates.explain import table
        from pytest_lmeval.report.words import wrapped

        width = terminalreporter._tw.fullwidth
        terminalreporter.section(f"lmeval: against {_readable(self.file)}")
        said = [*missed, *(self._remarks(records) if records else ())]
        pieces = (piece for remark in said for piece in wrapped(remark, width))
        for line in (*(table(records, width=width) if records else ()), *pieces):
            terminalreporter.write_line(line)

    def _remarks(self, records: list[dict[str, Any]]) -> list[str]:
        """What is to be said of the baseline as a whole."""
        if self.baseline is None:
            return [f"there is no {_readable(self.file)} yet, so all is new: python -m pytest_lmeval baseline accept writes it"]
        lines = [] if self.baseline.scores is not None else ["its file of examples is missing: only intervals were compared"]
        if unlike := self._made_elsewhere(records):
            lines.append(f"made elsewhere: {', '.join(unlike)}")
        return lines

    def _made_elsewhere(self, records: list[dict[str, Any]]) -> list[str]:
        if self.baseline is None:
            return []
        from pytest_lmeval.records.environment import describe

        device = ", ".join(sorted({record["lm"]["device"] for record in records}))
        now = describe(root=self.config.rootpath, device=device, threads=_threads(), seed=0)
        return list(other_environment(self.baseline.environment, now))

    @pytest.hookimpl(tryfirst=True)
    def pytest_lmeval_report(self, data: dict[str, Any]) -> None:
        """The pages say it too."""
        data["baseline"] = {"file": _readable(self.file), "unlike": self._made_elsewhere(data["records"])}


def properties(records: list[dict[str, Any]], gates: list[dict[str, dict[str, Any]]]) -> list[tuple[str, object]]:
    """The verdicts as JUnit's properties of the test, where they are seen though nothing failed, beside the numbers."""
    from pytest_lmeval.report.words import visible

    return [
        (visible(f"lmeval {record['lm']['spec']}, {record['subject']}, {name}, {key}"), row[key])
        for record, gate in zip(records, gates, strict=True)
        for name, row in gate.items()
        for key in ("verdict", "base", "margin")
        if row.get(key) is not None
    ]


def unheard(records: list[dict[str, Any]], margins: Margins) -> list[str]:
    """What the marker says that nothing can be made of."""
    metrics = {name: metric for record in records for name, metric in record["metrics"].items()}
    costs = {name for record in records for name, cost in record["cost"].items() if cost is not None}
    speeds = {name for record in records for name in speed_rows(record, margins)}
    kept = {name for record in records for part in ("metrics", "costs") for name in entry_of(record)[part]} | {"verdict"}
    found = []
    for name, margin in margins.given.items():
        if name not in {*metrics, *costs, *speeds, "verdict"}:
            has = ", ".join(metrics) or "no metric"
            found.append(f"the marker {MARKER} names {name}, which the test does not record; it records {has}")
        elif margin is not None and name not in kept | speeds:
            found.append(
                f"the marker {MARKER} names {name}, which is another one in every run of the same code: it is not gated"
            )
        elif margin is not None and name in metrics and not is_speed(name, metrics[name]["unit"]):
            if (better := metrics[name]["higher_is_better"]) is None:
                found.append(f"the marker {MARKER} names {name}, and neither direction of it is better: it is not gated")
            elif wrong := check_sign(name, margin, better):
                found.append(f"the marker {MARKER}: {wrong}; it was taken for the latter")
    return found


def speed_rows(record: dict[str, Any], margins: Margins) -> dict[str, dict[str, Any]]:
    """The speeds that the marker names: kept for a comparison of runs side by side, and not judged here."""
    values = {name: metric["value"] for name, metric in record["metrics"].items() if is_speed(name, metric["unit"])}
    row = {"verdict": NOT_JUDGED, "base": None, "note": "speed is judged by compare-runs"}
    rows = {}
    for name, margin in margins.given.items():
        found = next((values[other] for other in (name, *SPEED_NAMES.get(name, ())) if other in values), None)
        if found is not None and margin is not None:
            rows[name] = {**row, "new": found, "margin": str(margin)}
    return rows


def other_environment(base: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How the place differs, in words."""
    old, new = ({key: place.get(key) for key in ENVIRONMENT if key != "packages"} for place in (base, now))
    for place, flat in ((base, old), (now, new)):
        flat.update(place.get("packages") or {})
    unlike = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)}, is {new.get(key)}" for key in unlike]


def _threads() -> int | None:
    import sys

    return sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None


def _readable(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
