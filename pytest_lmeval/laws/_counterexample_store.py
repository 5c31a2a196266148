"""Keep cases that broke a law in a file of JSON lines, {"lm": spec, "law": ..., "case": {...}}, to be tried first next time.

The spec identifies the model, since fixing it changes its fingerprint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import ArgumentError, nearest
from pytest_lmeval.laws._strategies import MOST_ROWS, Case
from pytest_lmeval.records._journal import warn
from pytest_lmeval.records._replacing import append
from pytest_lmeval.records._secrets import masked

MANY = 1 << 31  # more than any number of tokens
MOST = 20  # the newest cases of a model and law


class CounterexampleStore:
    """A file of counterexamples; without a path, nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def cases(self, spec: str, longest: int | None = None) -> dict[str, list[Case]]:
        """By law, this model's counterexamples, newest first, once each; unreadable lines are ignored, since users may edit the
        file. Warns of cases with more than `longest` tokens in a sequence, and leaves them out."""
        if self.path is None or not self.path.is_file():
            return {}
        found: dict[str, dict[Case, None]] = {}
        too_long = 0
        for line in reversed(self.path.read_text(encoding="utf-8", errors="replace").splitlines()):
            try:
                entry = json.loads(line)
                if entry["lm"] == masked(spec):
                    case = case_of(entry["case"])
                    if max(case.length, case.before) > (longest or MANY) or case.rows > MOST_ROWS:
                        too_long += 1
                    elif case.length > 1:
                        found.setdefault(entry["law"], {})[case] = None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
        if too_long:
            warn(
                f"{self.path}: {too_long} cases of {spec} have more than {longest or MANY} tokens or {MOST_ROWS} rows and are "
                "not tried; pytest_lmeval.replay tries one."
            )
        return {law: list(stored)[:MOST] for law, stored in found.items()}

    def add(self, spec: str, law: str, case: dict[str, Any]) -> None:
        """Append a case, unless it is stored already; in one write, so that parallel workers can share the file."""
        if self.path is None or case_of(case) in self.cases(spec).get(law, []):
            return
        line = json.dumps({"lm": masked(spec), "law": law, "case": case}) + "\n"
        try:
            append(self.path, line.encode())
        except OSError as error:
            warn(f"the counterexample is not kept for the next run: {self.path} cannot be written ({error}).")


def case_of(choices: dict[str, Any]) -> Case:
    """The case of `Case.choices`. Raises ArgumentError if they describe none."""
    fields = Case.__dataclass_fields__
    for name in choices:
        if name not in fields:
            raise ArgumentError(f"a case has no {name!r}.{nearest(name, fields)} It has {', '.join(fields)}.")
    if "length" not in choices:
        raise ArgumentError(f"a case needs its length, in tokens; got {', '.join(choices) or 'nothing'}.")
    cuts = choices.get("cuts", ())
    case = Case(**{**choices, "cuts": (cuts,) if isinstance(cuts, int) else tuple(cuts)})
    numbers = (case.length, case.seed, case.rows, case.padding, case.before, *case.cuts)
    if not all(type(number) is int and 0 <= number < MANY for number in numbers):
        raise ArgumentError(f"a case is made of numbers of tokens; got {choices}.")
    if case.length < 1 or any(size < 1 for size in case.sizes):
        raise ArgumentError(f"a sequence of {case.length} tokens cannot be cut at {case.cuts}.")
    return case
