"""Specify the hook by which a project's conftest.py adds to the reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_lmeval.records._document import RunDocument


@pytest.hookspec
def pytest_lmeval_report(config: pytest.Config, data: RunDocument) -> None:
    """Change the data of a run after its numbers are saved and before its pages are rendered; called once.

    data  the contents of `metrics.json` (a `pytest_lmeval.records.RunDocument`), to be changed in place: the metrics of a
          record, and `sections`, tables and texts with a title of their own in `summary.md` and `report.html`. A record
          is frozen, so replace it: `data.records[0] = msgspec.structs.replace(data.records[0], subject="...")`

        # conftest.py
        from pytest_lmeval import Section, Value

        def pytest_lmeval_report(config, data):
            for record in data.records:
                if record.cost.seconds:
                    record.metrics["euros"] = Value(record.cost.seconds * 0.0008, "EUR", higher_is_better=False)
            data.sections.append(Section(title="Energy", columns=["machine", "Wh"], rows=[["ci-3", 12.5]]))

    If a hook raises, or leaves data that cannot be written or read back, the run says so at its end and ignores all changes of
    the hooks.
    """
