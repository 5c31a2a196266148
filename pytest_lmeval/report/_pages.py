"""Render summary.md and report.html with Jinja2 from a document. Text from models is escaped.

A user's folder of templates extends these block by block: its `report.html` begins with `{% extends "lmeval/report.html" %}`
and replaces the blocks that it names. A template sees the fields of the document (`records`, `run`, `sections`, ...) and those
of `_shown`. Templates run in a sandbox; an unknown name is an error with its line.
"""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from pytest_lmeval import registry
from pytest_lmeval.records import _history as history, _schema as schema
from pytest_lmeval.records._document import NamedRun, RunDocument, Section
from pytest_lmeval.records._history import Line
from pytest_lmeval.records._replacing import inside
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
INVISIBLE = "\u200b"  # of no width; in a text of others it is escaped
LINKED = re.compile(r"@(?=\w)|[#!](?=\d)|\bGH-(?=\d)|www(?=\.)|(?:https?|ftp|mailto|xmpp):", re.IGNORECASE)


@cache
def environment(templates: Path | None = None) -> SandboxedEnvironment:
    """Make the sandbox that templates run in.

    templates  folder of templates that replace ours of the same name, which are also found as `lmeval/NAME`
    """
    ours = jinja2.PackageLoader("pytest_lmeval.report")
    loaders: list[jinja2.BaseLoader] = [jinja2.PrefixLoader({"lmeval": ours}), ours]
    own = [jinja2.FunctionLoader(partial(template_of, templates))] if templates else []
    sandbox = SandboxedEnvironment(
        loader=jinja2.ChoiceLoader([*own, *loaders]),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: words.visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    sandbox.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    sandbox.filters.update(number=words.number, size=words.size_of, interval=words.interval)
    sandbox.filters.update(cell=cell, code=code, heading=heading, fenced=fenced, fields=fields)
    sandbox.globals["asset"] = partial(asset, templates)
    return sandbox


def cell(text: Any) -> str:
    """Escape text for a cell of a Markdown table, on one line."""
    line = _without_links(text).replace("&", "&amp;")
    for special in "\\`*_[]<>|~":
        line = line.replace(special, "\\" + special)
    return line.replace(INVISIBLE, f"&#{ord(INVISIBLE)};")


def heading(text: Any) -> str:
    """Escape text for HTML within Markdown, on one line."""
    return escape(_without_links(text)).replace(INVISIBLE, f"&#{ord(INVISIBLE)};")


def _without_links(text: Any) -> str:
    """One line with an invisible character in what GitHub and GitLab would link: @mentions, addresses, #123, GH-123, URLs."""
    return LINKED.sub(lambda found: found[0] + INVISIBLE, words.one_line(" ".join(str(text).split())))


def code(text: Any) -> str:
    """Escape text for backticks in Markdown."""
    return " ".join(words.visible(str(text)).replace("`", "'").split())


def fenced(text: Any) -> str:
    """A code block in Markdown; its fence is longer than any row of backticks in it."""
    text = words.visible(str(text))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def fields(value: Any) -> dict[str, Any]:
    """The fields of a stored type that are not None."""
    return {name: found for name, found in schema.to_plain(value).items() if found is not None}


def asset(templates: Path | None, name: str) -> Markup:
    """A style (.css) or script (.js), unescaped, from the folder of templates or from ours, and from nowhere else."""
    if name.endswith((".css", ".js")):
        with suppress(FileNotFoundError):
            if templates is not None:
                return Markup(_text(inside(templates, name)))
        own = [file for folder in ("templates", "vendor") if (file := OWN / folder / name).is_file()]
        if own and name == Path(name).name:
            return Markup(_text(own[0]))
    raise jinja2.TemplateNotFound(name, f"there is no style or script {name!r}")


@cache
def _text(file: Path) -> str:
    """A file that cannot end the element that it stands in."""
    return re.sub(r"</(?=script|style)", r"<\\/", file.read_text(encoding="utf-8"), flags=re.IGNORECASE)


def template_of(folder: Path, name: str) -> tuple[str, str, None] | None:
    """The text and path of a template in the user's folder; None if it has none of that name."""
    try:
        file = inside(folder, name)
    except FileNotFoundError:
        return None
    return file.read_text(encoding="utf-8"), str(folder / name), None


def render(
    name: str,
    document: RunDocument,
    *,
    folders: Sequence[Path] = (),
    templates: Path | None = None,
    sort: str | None = None,
) -> str:
    """Render a page of a document.

    folders    output folder of each record, with its examples, or one for all; none: examples are not read
    templates  folder of templates that extend ours
    sort       metric by which models side by side are sorted

    Raises what a template raises; `where` locates it.
    """
    template = environment(templates).get_template(name)
    context = msgspec.structs.asdict(document) | _shown(document, sort)
    if name.endswith(".html"):
        context |= _shown_in_html(document, list(folders))
    return template.render(context)


def with_sections(document: RunDocument, folder: Path | None) -> RunDocument:
    """Add the sections that packages register (entry points `pytest_lmeval.reports`) after the document's own.

    folder  output folder, or None for a comparison of runs

    Each is a function of document and folder that returns a `Section`, or None to show nothing. Those that fail are named in
    `problems`.
    """
    sections, problems = [*document.sections], [*document.problems]
    for name, make, entry in registry.things("reports"):
        try:
            found = make(document, folder)
            if found is not None and not isinstance(found, Section):
                raise TypeError(f"it returned a {type(found).__name__} and no Section")
            sections += [] if found is None else [schema.checked(found, "the returned section", "Return a Section")]
        except Exception as error:  # noqa: BLE001 - a section of another package may raise anything
            problems.append(f"the section {name!r} of {entry.package} failed and is left out ({type(error).__name__}: {error})")
    return msgspec.structs.replace(document, sections=sections, problems=problems)


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
        "laws": list(dict.fromkeys(law for _, certificate in certificates for law in certificate.laws)),
        "runs": document.runs or [NamedRun(label="", run=document.run, environment=document.environment)],
    }


def _shown_in_html(document: RunDocument, folders: list[Path]) -> dict[str, Any]:
    records = document.records
    folders = folders * len(records) if len(folders) == 1 else folders
    found, notes = examples.example_tables(records, folders) if folders else ([], [])
    lines: list[Line] = []
    for folder in dict.fromkeys(folders):
        more, broken = history.read(folder)
        lines, notes = lines + more, notes + broken
    drawn = figures.figures(records, lines)
    data = {"figures": drawn, "examples": found}
    return {
        "data": data,
        **data,
        "notes": [*document.problems, *notes],
        "facts": overview.facts([run.environment for run in document.runs] or [document.environment]),
        # A hash of all text from models, so that none of it can contain the nonce.
        "nonce": hashlib.sha256(json.dumps([data, schema.to_plain(document)]).encode()).hexdigest()[:32],
    }


def where(error: Exception) -> str:
    """The error of a template with its file and line."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.filename or error.name}, line {error.lineno}: {error.message}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith((".html", ".md"))]
    location = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    message = error.message if isinstance(error, jinja2.TemplateError) and error.message else str(error)
    return f"{location}{type(error).__name__}: {message}"
