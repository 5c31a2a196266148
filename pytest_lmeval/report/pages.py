"""summary.md and report.html, rendered by Jinja2 from a metrics document. What a model wrote is text, never markup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import PackageLoader, StrictUndefined, select_autoescape
from jinja2.sandbox import SandboxedEnvironment

from pytest_lmeval.report import tables


def environment() -> SandboxedEnvironment:
    sandbox = SandboxedEnvironment(
        loader=PackageLoader("pytest_lmeval.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    sandbox.filters.update(number=tables.number, size=tables.size_of, cell=cell)
    return sandbox


def cell(text: str) -> str:
    """Text for a cell of a Markdown table: on one line, its special characters harmless."""
    text = " ".join(str(text).split())
    for special in "\\`*_[]<>|":
        text = text.replace(special, "\\" + special)
    return text


def render(name: str, document: dict[str, Any]) -> str:
    records = document["records"]
    shown = {name: getattr(tables, name)(records) for name in ("groups", "verdicts", "comparisons", "model_lines")}
    return environment().get_template(name).render(**{"skipped": [], **document}, **shown)


PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "summary.md": lambda document: render("summary.md", document),
    "report.html": lambda document: render("report.html", document),
}
