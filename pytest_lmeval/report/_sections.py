"""Sections that packages register for the reports (entry points `pytest_lmeval.reports`).

A section is made by a function of the document and the output folder (None where several runs are compared); it returns None
where it has nothing to show.
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from pytest_lmeval import registry
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import RunDocument, Section


def with_sections(document: RunDocument, folder: Path | None) -> RunDocument:
    """The document as its pages show it: the registered sections come after its own. One that fails is told in `problems`."""
    sections, problems = [*document.sections], [*document.problems]
    for name, make, entry in registry.things("reports"):
        try:
            found = make(document, folder)
            if found is not None and not isinstance(found, Section):
                raise TypeError(f"it returned a {type(found).__name__} and no Section")
            sections += [] if found is None else [schema.checked(found, "what it returned", "Return a Section")]
        except Exception as error:  # noqa: BLE001 - a section of another package may raise anything
            problems.append(f"the section {name!r} of {entry.package} failed and is left out ({type(error).__name__}: {error})")
    return replace(document, sections=sections, problems=problems)
