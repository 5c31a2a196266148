"""The hook that a project's conftest.py may implement to put something of its own into the reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_lmeval.records._document import RunDocument


@pytest.hookspec
def pytest_lmeval_report(config: pytest.Config, data: RunDocument) -> None:
    """Called once, when a run has ended and its numbers are saved, before the pages are rendered.

    data  what `metrics.json` holds (a `pytest_lmeval.records.RunDocument`), to be changed in place: the metrics of a record,
          and its `sections`, tables and texts that stand in `summary.md` and `report.html` under a title of their own. A
          record itself is replaced: `data.records[0] = msgspec.structs.replace(data.records[0], subject="...")`

        # conftest.py
        from pytest_lmeval import Section, Value

        def pytest_lmeval_report(config, data):
            for record in data.records:
                if record.cost.seconds:
                    record.metrics["euros"] = Value(record.cost.seconds * 0.0008, "EUR", higher_is_better=False)
            data.sections.append(Section(title="Energy", columns=["machine", "Wh"], rows=[["ci-3", 12.5]]))

    Where a hook raises, or leaves something that cannot be written or read back, the run says so at its end, and uses nothing
    of what the hooks changed.
    """
