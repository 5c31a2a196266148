"""What a run leaves behind: the content of `metrics.json`, schema version 2.

Until 1.0 fields may be added, and are never renamed; a reader keeps those that it does not know (`more`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, field

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._schema import MORE, Kept

SCHEMA: Literal[2] = 2
NAME = "metrics.json"
AGAIN = "Run the tests again: that writes the file anew"


class Run(Kept, frozen=True, kw_only=True):
    """started      ISO 8601, UTC
    command      as it was typed
    exit_status  of pytest
    """

    id: str = ""
    started: str = ""
    seconds: float | None = None
    command: str = ""
    exit_status: int | None = None


class Environment(Kept, frozen=True, kw_only=True):
    """Where a run happened: enough to know whether two numbers may be compared.

    packages  name -> version
    dirty     whether tracked files differed from the commit
    """

    python: str = ""
    torch: str | None = None
    device: str = ""
    cpu: str = ""
    cores: int | None = None
    threads: int | None = None
    platform: str = ""
    packages: dict[str, str] = {}
    commit: str | None = None
    dirty: bool | None = None
    seed: int | None = None


class Skipped(Kept, frozen=True):
    """A test that measured nothing, and why."""

    test: str
    reason: str


class Failure(Kept, frozen=True):
    """A test that failed, what it said, and where it stands."""

    test: str
    message: str
    file: str | None = None
    line: int | None = None


class Section(Kept, frozen=True):
    """A part of the report that a project or a package adds: a title, a text, a table."""

    title: str
    text: str = ""
    columns: list[str] = []
    rows: list[list[Any]] = []


class BaselineUse(Kept, frozen=True):
    """file         what the run was compared with
    differences  how the place of the run differs from that of the baseline
    """

    file: str = ""
    differences: list[str] = []


class NamedRun(Kept, frozen=True, kw_only=True):
    """One of several runs that are shown side by side."""

    label: str
    headline: str = ""
    run: Run = Run()
    environment: Environment = Environment()


class RunDocument(Struct, kw_only=True):
    """A run. The hook `pytest_lmeval_report` may change it in place before the pages are rendered.

    sections  what a project or a package adds to the pages
    problems  what was left out, and why
    runs      of several runs side by side (`report._merge`); never in a file, which is of one run
    """

    schema: Literal[2] = SCHEMA
    run: Run = Run()
    environment: Environment = Environment()
    records: list[Record] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    baseline: BaselineUse | None = None
    problems: list[str] = field(default_factory=list)
    runs: list[NamedRun] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict, name=MORE)  # as in `Kept`, which is frozen


def load(path: Path) -> RunDocument:
    """The document of a file, or of the `metrics.json` in a folder.

    Raises DocumentError where the file is missing, cut off, of another schema version, or holds something that is not as it
    was written: with the place in the file, and what stands there. Nothing is repaired.
    """
    file = path / NAME if path.is_dir() else path
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DocumentError(
            f"{file} cannot be read ({error.strerror or error}). A run writes {NAME} into the folder of --lmeval-dir, by "
            "default .lmeval."
        ) from error
    plain = schema.parse(raw, str(file), AGAIN)
    if not isinstance(plain, dict) or not {"schema", "records"} & set(plain):
        raise DocumentError(f"{file} holds no list of records, so it is no {NAME} of pytest-lmeval.")
    schema.check_version(plain.get("schema"), SCHEMA, str(file), AGAIN)
    document = schema.build(plain, RunDocument, str(file), AGAIN)
    document.runs = []
    return document


def dump(document: RunDocument) -> str:
    """The text of `metrics.json`. Raises ValueError for a number that is not finite."""
    plain = schema.to_plain(document)
    plain.pop("runs", None)
    return schema.text_of(plain)
