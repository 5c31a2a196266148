"""Keep what a probe tried in a file for each model, so that later runs add to it.

The key holds all that a law could depend on: the model's fingerprint, precision, device, the versions of the packages, the code
of the laws and the engine, and the length of the sequences; whatever changes starts anew. A hash finds damage, not forgery:
stored cases count only after a case of each law was replayed (`_run_probe.run_probe`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from pytest_lmeval import engine
from pytest_lmeval.errors import ArgumentError
from pytest_lmeval.laws._counterexample_store import case_of
from pytest_lmeval.laws._strategies import Case
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._environment import processor, versions_of
from pytest_lmeval.records._journal import key_of, warn
from pytest_lmeval.records._replacing import replacing

MOST = 4000  # cases of a law that are stored; those of its floor come first
PACKAGES = "pytest-lmeval torch transformers numpy"
PARTS = [(precision, outcome) for precision in ("own", "in_float32") for outcome in ("kept", "broken")]

Cases: TypeAlias = dict[str, list[Case]]  # by law


@dataclass(frozen=True)
class Tried:
    """The cases that each law was tried on, in one precision: those that did not break it, and those that did."""

    kept: Cases = field(default_factory=dict)
    broken: Cases = field(default_factory=dict)

    def __add__(self, other: Tried) -> Tried:
        return Tried(_joined(self.kept, other.kept), _joined(self.broken, other.broken))


def _joined(one: Cases, other: Cases) -> Cases:
    return {law: list(dict.fromkeys([*one.get(law, []), *other.get(law, [])]))[:MOST] for law in {**one, **other}}


@dataclass(frozen=True)
class Evidence:
    """What the model and its copy in float32 (of a 16-bit model) were tried on, in so many runs."""

    own: Tried = Tried()
    in_float32: Tried = Tried()
    runs: int = 0

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.own + other.own, self.in_float32 + other.in_float32, self.runs + other.runs)


class EvidenceStore:
    """The file at `path` with what was tried of a model; `key` holds all that a law of it could depend on. Without a path,
    nothing is kept."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self.key = path, key

    @classmethod
    def of(cls, folder: Path | None, lm: Model, longest: int) -> EvidenceStore:
        """The file of a model in a folder of such files."""
        lasting = lm.module is not None or getattr(lm.source, "fingerprint", None)  # others are new in every run
        if folder is None or not lasting:
            return cls(None, {})
        key = _key(lm, longest)
        return cls(folder / f"{key['lm']}-{key_of(**key)[:8]}.json", key)

    def load(self) -> Evidence:
        """The evidence of earlier runs. Warns of a file that is damaged, or of another model, and ignores it."""
        if self.path is None or not self.path.is_file():
            return Evidence()
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            digest = stored.pop("sha256")
            if digest != _digest(stored):
                raise ValueError("its content does not have its hash: it was damaged, or edited")
            if stored["key"] != self.key:
                raise ValueError("it is of another model, or was made with other versions")
            parts = {
                part: {
                    law: [found for case in some if (found := case_of(case)).length > 1] for law, some in stored[part].items()
                }
                for part in map("-".join, PARTS)
            }
            own, in_float32 = (
                Tried(parts[f"{precision}-kept"], parts[f"{precision}-broken"]) for precision in ("own", "in_float32")
            )
            return Evidence(own, in_float32, int(stored["runs"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArgumentError, RecursionError) as error:
            warn(f"the certificate {self.path} is not used ({type(error).__name__}: {error}); every law is tried anew.")
            return Evidence()

    def save(self, evidence: Evidence) -> None:
        """Replace the file. Warns if it cannot be written."""
        if self.path is None:
            return
        parts = {
            f"{precision}-{outcome}": {
                law: [case.choices() for case in some] for law, some in getattr(getattr(evidence, precision), outcome).items()
            }
            for precision, outcome in PARTS
        }
        plain = json.loads(json.dumps({"key": self.key, "runs": evidence.runs, **parts}))
        try:
            with replacing(self.path) as new:
                new.write_text(json.dumps({**plain, "sha256": _digest(plain)}), encoding="utf-8")
        except OSError as error:
            warn(f"the certificate is not kept for the next run: {self.path} cannot be written ({error}).")


def join_files(files: Sequence[Path], to: Path) -> None:
    """Write what several processes tried of one model to one file. Warns of a file that is damaged, and leaves it out."""
    key: dict[str, Any] = {}
    for file in files:
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            key = key or dict(json.loads(file.read_text(encoding="utf-8"))["key"])
    whole = Evidence()
    for file in files:
        whole = whole + EvidenceStore(file, key).load()
    EvidenceStore(to, key).save(whole)


def _key(lm: Model, longest: int) -> dict[str, Any]:
    return {
        "lm": fingerprint(lm),
        "dtype": str(lm.dtype),
        "device": torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else f"{lm.device} {processor()}",
        "longest": longest,
        "packages": versions_of(PACKAGES),
        "code": _code(),
    }


@functools.cache
def _code() -> str:
    """A hash of the sources of the laws and of the engine."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(engine.__file__).parent):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
