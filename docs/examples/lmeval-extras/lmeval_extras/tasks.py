"""A task: rows, how a row reads, and the metrics of its answers."""

from __future__ import annotations

from typing import Any

from pytest_lmeval.tasks import Generate, Task

ROWS = [{"name": name} for name in ("Ada", "Alan", "Grace", "Edsger", "Barbara", "Donald", "Frances", "Ken", "Radia", "Tony")]


def greet(row: dict[str, Any]) -> Generate:
    """Is the model brief? What it says is not compared with anything."""
    return Generate(f"A greeting for {row['name']}:", answers=(), max_tokens=24)


greetings = Task("greetings", ROWS, greet, ("brevity",))
