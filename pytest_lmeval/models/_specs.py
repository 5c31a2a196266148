"""Parse and check model specs, `NAME[:REST][@PRECISION]`, without importing torch.

NAME is in the registry (group `models`), or NAME:REST is `module.path:callable`.
"""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from pytest_lmeval import registry
from pytest_lmeval.errors import SpecError, nearest

FLOATS = ("fp32", "bf16", "fp16")
PACKED = ("int8", "int4")
INSTALLED = ("node_modules", "site-packages")  # folders of other projects
BITS = {32: "fp32", 16: "bf16", 8: "int8", 4: "int4"}


def split(spec: str, bits: int | None) -> tuple[str, str]:
    """The spec without its suffix, and the precision: the suffix, or else that of `bits`, or else "".

    >>> split("demo@int8", None), split("demo", 4), split("demo@fp32", 4), split("hf:./a@b/c", None)
    (('demo', 'int8'), ('demo', 'int4'), ('demo', 'fp32'), ('hf:./a@b/c', ''))

    An existing file or folder wins: if `./model@int8` exists, `hf:./model@int8` has no suffix. Raises SpecError for an unknown
    precision.
    """
    if not isinstance(spec, str):
        raise SpecError(f"a spec is a text such as demo, zoo:mamba or hf:FOLDER; got {spec!r}.")
    if bits and bits not in BITS:
        raise SpecError(f"bits is {bits!r}; it is one of {', '.join(map(str, BITS))}.")
    name, at, wanted = spec.rpartition("@")
    if not at or "/" in wanted or ":" in wanted or _exists(spec.partition(":")[2]):
        return spec, BITS[bits] if bits else ""
    if wanted not in (known := (*FLOATS, *PACKED)):
        raise SpecError(f"{spec}: unknown precision @{wanted}; known are @{', @'.join(known)}.{nearest(wanted, known)}")
    return name, wanted


def check(spec: str, folders: Iterable[Path] = ()) -> None:
    """Raise SpecError for a spec that names nothing, and for a missing folder. Names of the hub are not looked up, and modules
    are not imported.

    folders  whose modules, at any depth, may be on `sys.path` when the spec is loaded
    """
    name = split(spec, None)[0]
    head, _, rest = name.partition(":")
    known = registry.names("models")
    if head == "hf":
        check_path(name, rest)
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
        "hf:ID_OR_FOLDER or module.path:callable (`lmeval list models` shows all sources)."
    )


def check_path(spec: str, path: str) -> None:
    """Raise SpecError for a missing path; OWNER/NAME passes, since it may be on the hub."""
    if not path:
        raise SpecError(f"{spec} names no model: write hf:ID_OR_FOLDER.")
    if not _exists(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        looked = "" if path.startswith(("/", "~")) else f" (looked from {Path.cwd()})"
        raise SpecError(f"{spec}: there is no folder {path}{looked}.{nearest_folder(path)}")


def nearest_folder(path: str) -> str:
    """A question with the most similar name beside `path`; empty if there is none."""
    folder = Path(path).expanduser()
    try:
        found = difflib.get_close_matches(folder.name, os.listdir(folder.parent), n=1) if "/" in path else []
    except OSError:
        found = []
    return f" Did you mean hf:{folder.parent / found[0]}?" if found else ""


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
