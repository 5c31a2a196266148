"""Render summary.md and report.html by Jinja2 from a document. What a model wrote is text, never markup.

A folder of templates of one's own extends these block by block: its `report.html` begins with
`{% extends "lmeval/report.html" %}` and replaces the blocks that it names. A template sees the fields of the document
(`records`, `run`, `sections`, ...) and what `_shown` makes of them. Templates run in a sandbox, and a name that does not exist
is an error with its line.
"""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import (
    BaseLoader,
    ChoiceLoader,
    FileSystemLoader,
    PackageLoader,
    PrefixLoader,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    TemplateSyntaxError,
    select_autoescape,
)
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from pytest_lmeval.records import _history as history, _schema as schema
from pytest_lmeval.records._document import NamedRun, RunDocument
from pytest_lmeval.records._history import Line
from pytest_lmeval.report import (
    _changes as changes,
    _examples as examples,
    _figures as figures,
    _grids as grids,
    _overview as overview,
    _tables as tables,
    _words as words,
)

PAGES = ("summary.md", "report.html")
OWN = Path(__file__).parent


@cache
def environment(templates: Path | None = None) -> SandboxedEnvironment:
    """The sandbox that templates run in.

    templates  a folder whose templates come before ours; ours are also there as `lmeval/NAME`
    """
    ours = PackageLoader("pytest_lmeval.report")
    loaders: list[BaseLoader] = [PrefixLoader({"lmeval": ours}), ours]
    sandbox = SandboxedEnvironment(
        loader=ChoiceLoader([FileSystemLoader(templates), *loaders] if templates else loaders),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        finalize=lambda value: words.visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    sandbox.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    sandbox.filters.update(number=words.number, size=words.size_of, interval=words.interval)
    sandbox.filters.update(cell=cell, code=code, fenced=fenced, fields=fields)
    sandbox.globals["asset"] = partial(asset, templates)
    return sandbox


def cell(text: Any) -> str:
    """Text for a cell of a Markdown table: on one line, its special characters harmless."""
    line = " ".join(words.visible(str(text)).split())
    for special in "\\`*_[]<>|":
        line = line.replace(special, "\\" + special)
    return line


def code(text: Any) -> str:
    """Text between the backticks of Markdown."""
    return " ".join(words.visible(str(text)).replace("`", "'").split())


def fenced(text: Any) -> str:
    """A block of code in Markdown, its fence longer than any run of backticks in it."""
    text = words.visible(str(text))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def fields(value: Any) -> dict[str, Any]:
    """The fields of a record's part that are known."""
    return {name: found for name, found in schema.to_plain(value).items() if found is not None}


def asset(templates: Path | None, name: str) -> Markup:
    """A style or script as it is, from the folder of templates or from ours."""
    folders = (*([templates] if templates else []), OWN / "templates", OWN / "vendor")
    found = [file for folder in folders if (file := folder / name).is_file()]
    if not found:
        raise TemplateNotFound(name, f"there is no style or script {name!r}")
    return Markup(_text(found[0]))


@cache
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def render(
    name: str,
    document: RunDocument,
    *,
    folders: Sequence[Path] = (),
    templates: Path | None = None,
    sort: str | None = None,
) -> str:
    """A page of a document.

    folders    for each record the output folder that its examples lie in, or one for all; none: examples are not read
    templates  a folder of templates that come before ours
    sort       a metric that models side by side are sorted by

    Raises what a template raises; `where` says where.
    """
    template = environment(templates).get_template(name)
    context = msgspec.structs.asdict(document) | _shown(document, sort)
    if name.endswith(".html"):
        context |= _shown_in_html(document, list(folders))
    return template.render(context)


def _shown(document: RunDocument, sort: str | None) -> dict[str, Any]:
    records = document.records
    certificates, certified = overview.certificates(records)
    return {
        "overview": overview.overview(document),
        "groups": tables.groups(records),
        "verdicts": tables.verdicts(records),
        "model_lines": tables.model_lines(records),
        "side_by_side": tables.side_by_side(records, sort),
        "changes": changes.changes(records),
        "differences": changes.differences(records),
        "machine_differences": document.baseline.differences if document.baseline else [],
        "grids": grids.grids(records, sort),
        "certificates": certificates,
        "certified": certified,
        "laws": overview.laws(certificates),
        "runs": document.runs or [NamedRun(label="", run=document.run, environment=document.environment)],
    }


def _shown_in_html(document: RunDocument, folders: list[Path]) -> dict[str, Any]:
    records = document.records
    folders = folders * len(records) if len(folders) == 1 else folders
    answered, notes = examples.example_tables(records, folders) if folders else ([], [])
    lines: list[Line] = []
    for folder in dict.fromkeys(folders):
        more, said = history.read(folder)
        lines, notes = lines + more, notes + said
    drawn = figures.figures(records, lines)
    data = {"figures": drawn, "examples": answered}
    return {
        "data": data,
        "figures": drawn,
        "examples": answered,
        "notes": [*document.problems, *notes],
        "facts": overview.facts([run.environment for run in document.runs] or [document.environment]),
        # Known only once all that a model wrote is fixed, so that nothing it wrote can carry it.
        "nonce": hashlib.sha256(json.dumps([data, schema.to_plain(document)]).encode()).hexdigest()[:32],
    }


def where(error: Exception) -> str:
    """What went wrong in a template, with its name and line."""
    kind = "" if type(error) is TemplateSyntaxError else f"{type(error).__name__}: "
    if isinstance(error, TemplateSyntaxError):
        return f"{error.filename or error.name}, line {error.lineno}: {kind}{error.message}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.endswith(".py")]
    frames = [frame for frame in frames if frame.filename.endswith((".html", ".md"))]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    said = error.message if isinstance(error, TemplateError) and error.message else str(error)
    return f"{place}{kind}{said}"
