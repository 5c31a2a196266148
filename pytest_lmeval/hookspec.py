"""The hook that a project's conftest.py may implement to put something of its own into the reports."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookspec
def pytest_lmeval_report(config: pytest.Config, data: dict[str, Any]) -> None:
    """Called once, when a run has ended and its numbers are saved, before the pages are rendered.

    data  what `metrics.json` holds, to be changed in place: metrics of a record, and `data["sections"]`, tables and texts
          that stand in `summary.md` and `report.html` under a title of their own

        # conftest.py
        def pytest_lmeval_report(config, data):
            for record in data["records"]:
                if seconds := record["cost"]["seconds"]:
                    record["metrics"]["euros"] = {"value": seconds * 0.0008, "unit": "EUR", "higher_is_better": False}
            data["sections"].append(
                {"title": "Energy", "text": "Read at the meter.", "columns": ["machine", "Wh"], "rows": [["ci-3", 12.5]]}
            )

    What one raises, and what is no JSON, is told at the end of the run and costs only what the hook would have added.
    """
