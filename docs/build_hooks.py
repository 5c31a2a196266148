"""Fill pages of the reference with what the plugin declares: its options and settings, fixtures and markers.

A page holds `<!-- options -->`, `<!-- fixtures -->` or `<!-- markers -->` where the list belongs.
"""

from __future__ import annotations

import ast
import html
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from pytest_lmeval import _options, plugin


class Recorder:
    """Takes what `_options.add` gives to pytest's parser."""

    def __init__(self) -> None:
        self.options: dict[str, str] = {}
        self.settings: dict[str, Any] = {}

    def getgroup(self, *_: Any) -> Recorder:
        return self

    def addoption(self, name: str, *, help: str, **_: Any) -> None:  # noqa: A002 - pytest's name for it
        self.options[name] = help

    def addini(self, name: str, _help: str, *, default: Any = None, **_: Any) -> None:
        self.settings[name] = default


def options() -> str:
    """A table of the options, with the setting of the ini file and the default of each."""
    recorder: Any = Recorder()
    _options.add(recorder)
    rows = ["| option | setting in the ini file | default | |", "|---|---|---|---|"]
    for name, text in recorder.options.items():
        setting = name.removeprefix("--").replace("-", "_")
        rows.append(f"| `{name}` | `{setting}` | {_shown(recorder.settings[setting])} | {html.escape(text)} |")
    return "\n".join(rows)


def _shown(default: Any) -> str:
    text = " ".join(default) if isinstance(default, list) else str(default).lower()
    return f"`{text}`" if text else ""


def fixtures() -> str:
    """A section for each fixture: its docstring."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(plugin))):
        if isinstance(node, ast.FunctionDef) and any("pytest.fixture" in ast.unparse(one) for one in node.decorator_list):
            scope = "session" if any("session" in ast.unparse(one) for one in node.decorator_list) else "test"
            about, _, example = (ast.get_docstring(node) or "").partition("\n\n")
            code = f"\n\n```python\n{textwrap.dedent(example)}\n```" if example else ""
            found.append(f"### `{node.name}`\n\n{about} (One for each {scope}.){code}")
    return "\n\n".join(sorted(found))


def markers() -> str:
    """A list of the markers that the plugin registers."""
    return "\n".join(f"- `{name}`: {about}" for name, about in sorted(_markers()))


def _markers() -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(inspect.getsource(plugin))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("addinivalue_line"):
            name, _, about = str(ast.literal_eval(node.args[1])).partition(": ")
            if not name.startswith("benchmark"):
                yield name, about


FILLED: dict[str, Callable[[], str]] = {"options": options, "fixtures": fixtures, "markers": markers}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    return re.sub(r"<!-- (options|fixtures|markers) -->", lambda found: FILLED[found[1]](), markdown)
