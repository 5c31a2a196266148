"""Show the package's docstrings, and verbs that are made by a function, as the reference pages need them.

Docstrings of this package list names and what they mean in two columns; Markdown would join them into one paragraph.
"""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

import griffe

ENTRY = re.compile(r"^(\S(?:.*?\S)?) {2,}(\S.*)$")
SEE = re.compile(r" \(see `(?:measure_\w+|laws\._probe\.probe)`[^)]*\)")
CODE = re.compile(r"(def|class|with|from|import|harness =|watch =|assert|replay\() ?")


def as_markdown(docstring: str) -> str:
    """The docstring with its columns as lists, and its code in fences."""
    return "\n\n".join(map(_paragraph, _joined(re.split(r"\n[ ]*\n", docstring.strip("\n")))))


def _joined(paragraphs: list[str]) -> list[str]:
    """Paragraphs; indented ones that follow an indented one belong to it."""
    found: list[str] = []
    for paragraph in paragraphs:
        if found and found[-1].startswith("    ") and paragraph.startswith("    "):
            found[-1] += f"\n\n{paragraph}"
        else:
            found.append(paragraph)
    return found


def _paragraph(text: str) -> str:
    first = text.split("\n")[0]
    if first.startswith(">>> "):
        return f"```pycon\n{text}\n```"
    if first.startswith("    ") or CODE.match(first):
        language = "text" if ENTRY.match(first.strip()) else "python"
        return f"```{language}\n{textwrap.dedent(text)}\n```"
    return _list(text) if ENTRY.match(first) else text


def _list(text: str) -> str:
    lines: list[str] = []
    column = min(entry.start(2) for line in text.split("\n") if (entry := ENTRY.match(line)))
    for line in text.split("\n"):
        name, about = line[: column - 1].strip(), line[column:]
        if line.startswith(" ") or line[column - 1 : column] != " ":
            lines.append(f"  {line.strip()}")
        else:
            lines.append(f"- `{name.strip('`')}`: {about.strip()}")
    return "\n".join(lines)


def _lines(arguments: str) -> str:
    """The arguments of a signature, each on a line."""
    return re.sub(r", (?=[*]|\w+:)", ",\n    ", arguments)


def with_parameters(function: griffe.Function, other: griffe.Function) -> str:
    """The docstring of a function, and what that of another says of its parameters. Both are Markdown already."""
    names = {parameter.name for parameter in function.parameters}
    items = re.split(r"\n(?=- )", "\n".join(part for part in other.docstring.value.split("\n\n") if part.startswith("- `")))
    shared = [item for item in items if names & set(re.findall(r"\w+", item.partition(":")[0]))]
    return "\n\n".join([function.docstring.value, "\n".join(shared)])


class PackageDocstrings(griffe.Extension):
    """Rewrites docstrings, and puts `measure_x` in the place of `x = verb_of("x", measure_x)`.

    A verb whose docstring says "(see `measure_x` for the parameters)" gets what that says of them.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """A docstring as Markdown."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_module_members(self, *, node: ast.AST, mod: griffe.Module, **kwargs: Any) -> None:
        """What verbs look like."""
        self._verbs(node, mod)
        for function in mod.functions.values():
            text = "" if function.docstring is None else function.docstring.value
            if (found := re.search(r"\(see `(measure_\w+)`", text)) and found[1] in mod.members:
                function.docstring.value = with_parameters(function, mod[found[1]])
            if function.docstring is not None:  # what is meant stands on the same page
                function.docstring.value = SEE.sub("", function.docstring.value)

    def on_class_members(self, *, node: ast.AST, cls: griffe.Class, **_: Any) -> None:
        """The fields of a struct with their types, and how a class with `__new__` is called, which griffe does not show."""
        body = getattr(node, "body", ())
        made = [one for one in body if isinstance(one, ast.FunctionDef) and one.name == "__new__"]
        shown = [f"{cls.name}(\n    {_lines(ast.unparse(one.args).partition(', ')[2])},\n)" for one in made]
        if {ast.unparse(base) for base in getattr(node, "bases", ())} & {"StoredStruct", "Struct"}:
            shown = [ast.unparse(one) for one in body if isinstance(one, ast.AnnAssign)]
        if shown and cls.docstring is not None:
            text = "\n".join(shown)
            cls.docstring.value = f"```python\n{text}\n```\n\n{cls.docstring.value}"

    def _verbs(self, node: ast.AST, mod: griffe.Module) -> None:
        """A verb that `verb_of` makes is a function, with the name of the verb; it takes whatever `as_model` does."""
        for statement in getattr(node, "body", ()):
            if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
                continue
            if ast.unparse(statement.value.func) == "verb_of":
                verb, measure = ast.literal_eval(statement.value.args[0]), mod[ast.unparse(statement.value.args[1])]
                parameters = [one for one in measure.parameters if one.name != "runner"]
                parameters[0].annotation = "Any"
                mod[verb] = griffe.Function(
                    verb,
                    lineno=measure.lineno,
                    endlineno=measure.endlineno,
                    parameters=griffe.Parameters(*parameters),
                    returns=measure.returns,
                    docstring=measure.docstring,
                    parent=mod,
                )
