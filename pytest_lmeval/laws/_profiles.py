"""How hard to look: profiles of our own, so that those of the user's own hypothesis tests are left alone."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """examples     random cases, each tried on every law, after the edge cases
    budget       seconds after which no further case is tried
    derandomize  the same cases in every run
    """

    examples: int
    budget: float
    derandomize: bool


PROFILES = {
    "dev": Profile(examples=40, budget=2.0, derandomize=False),
    "ci": Profile(examples=60, budget=2.0, derandomize=True),
    "nightly": Profile(examples=2000, budget=120.0, derandomize=False),
}


def default_profile() -> str:
    """`ci` where the environment says that this is one, else `dev`."""
    return "ci" if os.environ.get("CI", "").lower() not in ("", "0", "false") else "dev"
