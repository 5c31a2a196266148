"""The document of a run: the content of `metrics.json`, schema version 2.

Until 1.0 fields may be added but not renamed; a reader keeps unknown fields in `more`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, field

from pytest_lmeval.errors import DocumentError
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._replacing import inside
from pytest_lmeval.records._schema import MORE, StoredStruct

SCHEMA: Literal[2] = 2
NAME = "metrics.json"
REMEDY = "Run the tests again to write a new one"


class Run(StoredStruct, frozen=True, kw_only=True):
    """One run of pytest.

    started      ISO 8601, UTC
    command      as typed, with secrets masked
    exit_status  None: it did not end, and its results were taken from the journal (see `report._render`)
    """

    id: str = ""
    started: str = ""
    seconds: float | None = None
    command: str = ""
    exit_status: int | None = None


class Environment(StoredStruct, frozen=True, kw_only=True):
    """Machine and software of a run, as far as they decide whether two numbers are comparable.

    packages  name -> version
    dirty     tracked files differ from the commit
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


class Skipped(StoredStruct, frozen=True):
    """A test that was skipped, and the reason."""

    test: str
    reason: str


class Failure(StoredStruct, frozen=True):
    """A failed test, its message and its location in the source."""

    test: str
    message: str
    file: str | None = None
    line: int | None = None


class Section(StoredStruct, frozen=True):
    """A part of the report that a project or a package adds: title, text and table."""

    title: str
    text: str = ""
    columns: list[str] = []
    rows: list[list[Any]] = []


class BaselineUse(StoredStruct, frozen=True):
    """The baseline `file` of a run, and how the run's machine differs from the baseline's."""

    file: str = ""
    differences: list[str] = []


class NamedRun(StoredStruct, frozen=True, kw_only=True):
    """One of several runs that are compared."""

    label: str
    headline: str = ""
    run: Run = Run()
    environment: Environment = Environment()


class RunDocument(Struct, kw_only=True):
    """A run. The hook `pytest_lmeval_report` may change it in place before the pages are rendered.

    problems  what is left out, and why
    runs      the runs of a comparison (`report._compare.merge`); never in a file, which holds one run
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
    more: dict[str, Any] = field(default_factory=dict, name=MORE)  # as in `StoredStruct`, which is frozen


def load(path: Path) -> RunDocument:
    """Read a document from a file, or from the `metrics.json` of a folder.

    Raises DocumentError if the file is missing, truncated or of another schema version, or if a value does not fit its type,
    with its location in the file. Nothing is repaired.
    """
    file = path / NAME if path.is_dir() else path
    try:
        raw = (inside(path, NAME) if path.is_dir() else file).read_bytes()
    except OSError as error:
        raise DocumentError(
            f"{file} cannot be read ({error.strerror or error}). A run writes {NAME} into --lmeval-dir, by default .lmeval."
        ) from error
    plain = schema.parse(raw, str(file), REMEDY)
    if not isinstance(plain, dict) or not {"schema", "records"} & set(plain):
        raise DocumentError(f"{file} holds no list of records, so it is not a {NAME} of pytest-lmeval.")
    schema.check_version(plain.get("schema"), SCHEMA, str(file), REMEDY)
    document = schema.build(plain, RunDocument, str(file), REMEDY)
    document.runs = []
    return document


def dump(document: RunDocument) -> str:
    """Return the text of `metrics.json`. Raises ValueError for a number that is not finite."""
    plain = schema.to_plain(document)
    plain.pop("runs", None)
    return schema.text_of(plain)
