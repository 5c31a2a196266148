"""Parse and check model specs, `NAME[:REST][,OPTION=VALUE ...][@PRECISION]`, without importing torch.

NAME is in the registry (group `models`), or NAME:REST is `module.path:callable`. The options are in `_spec_options.OPTIONS`.
"""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytest_lmeval import registry
from pytest_lmeval.errors import SpecError, nearest
from pytest_lmeval.models._spec_options import OPTIONS, SERVED

FLOATS = ("fp32", "bf16", "fp16")
PACKED = ("int8", "int4")
KNOWN = (*FLOATS, *PACKED)
INSTALLED = ("node_modules", "site-packages")  # folders of other projects
BITS = {32: "fp32", 16: "bf16", 8: "int8", 4: "int4"}


@dataclass(frozen=True)
class Spec:
    """A parsed spec; as text, it is as it was written, with the precision.

    name       what is looked up: `NAME` or `NAME:REST`
    precision  the suffix, or "" for none
    options    the values of its options, by name
    written    the spec without the precision
    """

    name: str
    precision: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    written: str = ""

    def __str__(self) -> str:
        return f"{self.written}@{self.precision}" if self.precision else self.written


def parse(spec: str, bits: int | None = None) -> Spec:
    """The parts of a spec; without a suffix, the precision is that of `bits`, if they are given.

    >>> spec = parse("demo,compile=True@int8")
    >>> spec.name, spec.options, spec.precision
    ('demo', {'compile': 'inductor'}, 'int8')
    >>> parse("demo", 4).precision, parse("demo@fp32", 4).precision, parse("hf:./a@b/c").precision
    ('int4', 'fp32', '')

    An existing file or folder wins: if `./model@int8` exists, `hf:./model@int8` has no suffix, and if `./a,b=c` exists,
    `hf:./a,b=c` has no option. The same holds for paths in options, `adapter=./a,b`.

    Raises SpecError for an unknown precision or option, and for a value that an option cannot have.
    """
    if not isinstance(spec, str):
        raise SpecError(f"a spec is a text such as demo, zoo:mamba or hf:FOLDER; got {spec!r}.")
    if bits and bits not in BITS:
        raise SpecError(f"bits is {bits!r}; it is one of {', '.join(map(str, BITS))}.")
    written, at, precision = spec.rpartition("@")
    if not at or precision not in KNOWN or _names_path(spec) or _ends_with_path(spec):
        written, precision = spec, ""
    name, given = written, list[tuple[str, str]]()
    while not _names_path(name) and (found := _last_option(name)):
        name, given = found[0], [found[1:], *given]
    if not _names_path(name):
        _refuse_misplaced(spec, name, given, precision)
    parsed = Spec(name, precision or (BITS[bits] if bits else ""), _options(spec, name, given), written)
    if name.partition(":")[0] in SERVED and parsed.precision in PACKED:
        raise SpecError(
            f"{parsed}: the suffix says in which precision a server computes, @{', @'.join(FLOATS)}, so that the tolerance of "
            f"the laws is known. Weights are not packed there: leave @{parsed.precision} out, and serve a packed checkpoint."
        )
    return parsed


def _last_option(text: str) -> tuple[str, str, str] | None:
    """The text before the last option, its name and its value; None without one. A value is an existing path if it can be."""
    commas = [place for place, character in enumerate(text) if character == ","]
    for place in commas:  # the longest first
        option, equals, value = text[place + 1 :].partition("=")
        if equals and option in OPTIONS and OPTIONS[option].path and _exists(value):
            return text[:place], option, value
    before, comma, last = text.rpartition(",")
    option, equals, value = last.partition("=")
    return (before, option, value) if comma and equals and option.isidentifier() else None


def _ends_with_path(text: str) -> bool:
    """Whether the last option has a value that is an existing path."""
    found = _last_option(text)
    return found is not None and found[1] in OPTIONS and OPTIONS[found[1]].path and _exists(found[2])


def _refuse_misplaced(spec: str, name: str, given: list[tuple[str, str]], precision: str) -> None:
    """Raise SpecError for a name that ends with an unknown precision, one before the options, or an option without a value."""
    before, at, last = name.rpartition("@")
    if at and last in KNOWN and given and not precision:
        options = ",".join(f"{option}={value}" for option, value in given)
        raise SpecError(f"{spec}: options stand before the precision: write {before},{options}@{last}.")
    if at and last not in KNOWN and "/" not in last and ":" not in last:
        raise SpecError(f"{spec}: unknown precision @{last}; known are @{', @'.join(KNOWN)}.{nearest(last, KNOWN)}")
    _, comma, last = name.rpartition(",")
    if comma and (near := difflib.get_close_matches(last.partition("=")[0].strip(), OPTIONS, n=1)):
        raise SpecError(f"{spec}: {last!r} is no option, which is written NAME=VALUE: {near[0]}=True.")


def _options(spec: str, name: str, given: list[tuple[str, str]]) -> dict[str, Any]:
    """The values of the options, by name. Raises SpecError for one that is unknown, given twice, or has no such value."""
    found: dict[str, Any] = {}
    source = name.partition(":")[0]
    known = [option for option, one in OPTIONS.items() if not one.sources or source in one.sources]
    for option, value in given:
        if option not in known:
            others = " or ".join(OPTIONS[option].sources) if option in OPTIONS else ""
            why = (
                f"the option {option!r} is of {others}, not of {source}"
                if others
                else f"there is no option {option!r} of a model"
            )
            raise SpecError(f"{spec}: {why}; there are: {', '.join(known)}.{nearest(option, known)}")
        if option in found:
            raise SpecError(f"{spec}: the option {option} is given twice.")
        try:
            found[option] = OPTIONS[option].read(value)
        except ValueError as error:
            raise SpecError(f"{spec}: {option}={value} is no value of that option; {error}.") from None
    return found


def check(spec: str, folders: Iterable[Path] = ()) -> None:
    """Raise SpecError for a spec that names nothing, and for a missing folder. Names of the hub are not looked up, and modules
    are not imported.

    folders  whose modules, at any depth, may be on `sys.path` when the spec is loaded
    """
    name = parse(spec).name
    head, _, rest = name.partition(":")
    known = registry.names("models")
    if head in ("hf", "vllm"):
        check_path(name, rest)
    elif head == "server":
        check_address(name, rest)
    elif name not in known and head not in known:
        if not is_module_path(name):
            raise unknown(name)
        if not _is_importable(module := head.partition(".")[0], folders):
            raise unknown(name, f", and there is no module {module!r}")


def is_module_path(name: str) -> bool:
    """Whether it has the form `module.path:callable`."""
    module, _, attribute = name.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def unknown(name: str, also: str = "") -> SpecError:
    """The error for a spec that names nothing, with the nearest name."""
    known = registry.names("models")
    near = nearest(name, known) or nearest(name.partition(":")[0], known)
    if not near and (os.path.isdir(name) or ":" not in name) and name:
        near = f" Did you mean hf:{name}?"
    return SpecError(
        f"unknown model spec {name!r}: no model source of this name is registered{also}.{near} A spec is demo, zoo:NAME, "
        "hf:ID_OR_FOLDER, server:URL or module.path:callable (`lmeval list models` shows all sources)."
    )


def check_path(spec: str, path: str) -> None:
    """Raise SpecError for a missing path; OWNER/NAME and OWNER/NAME/FILE.gguf pass, since they may be on the hub."""
    if not path:
        raise SpecError(f"{spec} names no model: write {spec.partition(':')[0]}:ID_OR_FOLDER.")
    if not _exists(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1 + path.endswith(".gguf")):
        looked = "" if path.startswith(("/", "~")) else f" (looked from {Path.cwd()})"
        raise SpecError(
            f"{spec}: there is no {'file' if path.endswith('.gguf') else 'folder'} {path}{looked}.{nearest_folder(path)}"
        )


def check_address(spec: str, url: str) -> None:
    """Raise SpecError for what is no address of a server, and for one with a user or password. The server is not asked."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and not re.search(r"\s", url) and parts.port != 0
    except ValueError:  # a port that is no number, or too large; a bracket without its pair
        right = False
    if not right or parts.query or parts.fragment:
        raise SpecError(f"{spec}: {url!r} is no address of a server; write server:http://HOST:PORT.")
    if parts.username or parts.password:
        raise SpecError("a server's address with a user or password would stand in reports; set LMEVAL_API_KEY to the key.")


def nearest_folder(path: str) -> str:
    """A question with the most similar name beside `path`; empty if there is none."""
    folder = Path(path).expanduser()
    try:
        found = difflib.get_close_matches(folder.name, os.listdir(folder.parent), n=1) if "/" in path else []
    except OSError:
        found = []
    return f" Did you mean {folder.parent / found[0]}?" if found else ""


def _names_path(name: str) -> bool:
    """Whether the text behind the colon is an existing file or folder."""
    return _exists(name.partition(":")[2])


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(os.path.expanduser(path))


def _is_importable(module: str, folders: Iterable[Path]) -> bool:
    """Whether a top-level module can be found as when the spec is loaded: with the current folder on `sys.path`."""
    return (
        module in sys.modules
        or importlib.util.find_spec(module) is not None
        or importlib.machinery.PathFinder.find_spec(module, [str(Path.cwd())]) is not None
        or any(_contains(folder, module) for folder in folders)
    )


def _contains(folder: Path, module: str) -> bool:
    """Whether a module of that name is in the folder or below, outside of hidden, virtual environment and INSTALLED ones."""
    for path, below, files in os.walk(folder):
        if "pyvenv.cfg" in files and Path(path) != folder:
            below.clear()
            continue
        if f"{module}.py" in files or ("__init__.py" in files and os.path.basename(path) == module):
            return True
        below[:] = [name for name in below if not name.startswith(".") and name not in INSTALLED]
    return False
