"""Hash the code that classes and functions run: their source files, and those that these import from the user's project.

Imports are read from the text of the files, those inside of functions too, and never from what this process has imported: the
hash is the same in every process. The project is all that is not installed. Of an installed module, and of one of `LIBRARIES`,
only its own file counts, since its version stands for the rest. A module that is imported by a computed name is not found.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

OURS = __name__.partition(".")[0]
LIBRARIES = (OURS, "torch", "transformers")  # not followed in a checkout either
INSTALLED = ("site-packages", "dist-packages")
STDLIB = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
PROJECT = ("pyproject.toml", "setup.py", "setup.cfg", "pytest.ini", "tox.ini", ".git")  # one of them lies in its top folder
IMMUTABLE = (str, bytes, int, float, complex, type(None))

Import: TypeAlias = "tuple[int, tuple[str, ...]]"  # level (0: absolute), and the names: (0, ("a", "b")) of `from a import b`


def code_digest(values: Iterable[Any], *, own: bool = False) -> bytes:
    """Hash the names and the code of classes and functions, and of what methods, partials, decorators, defaults and closures
    hold of these and of plain values. Of an instance, its class counts; of torch, the names only; functions of this package,
    which adapt models, count only if `own`: with their file."""
    names, files = list[str](), set[Path]()
    for value in _reached(values, own=own):
        if not isinstance(value, type | FunctionType):
            names.append(repr(value))
            continue
        code = value.__code__ if isinstance(value, FunctionType) else None
        names.append(f"{value.__module__}.{value.__qualname__}{f':{code.co_firstlineno}' if code else ''}")
        top = (value.__module__ or "").partition(".")[0]
        if top == "torch":
            continue
        if (file := _file_of(value)) is not None:
            files |= {file} if top in LIBRARIES or _is_installed(file) else project_files(file)
        elif code is not None:
            names.append(repr(_bytecode(code)))
    listed = sorted((_import_name(file), hashlib.sha256(_read(file)).hexdigest()) for file in files)
    return hashlib.sha256(f"{names}{listed}".encode(errors="surrogatepass")).digest()


def project_files(file: Path) -> set[Path]:
    """The file, and the files of the project that it imports, transitively; with a module, the packages that it is in."""
    found, stack = set[Path](), [file]
    while stack:
        one = stack.pop()
        if one not in found:
            found.add(one)
            stack += _imported(one)
    return found


def _reached(values: Iterable[Any], *, own: bool = False) -> Iterator[Any]:
    """Yield each class, function and plain value that these hold, in a fixed order."""
    seen: dict[int, Any] = {}  # keeps them alive, so that no id is used twice
    stack = list(values)[::-1]
    while stack:
        value = stack.pop()
        if isinstance(value, IMMUTABLE):
            yield value
        elif id(value) not in seen:
            seen[id(value)] = value
            if isinstance(value, type):
                yield value
                bases = (base for base in value.__bases__ if base.__module__.partition(".")[0] not in ("builtins", *LIBRARIES))
                stack += [*bases][::-1]
            elif isinstance(value, FunctionType):
                top = (value.__module__ or "").partition(".")[0]
                ours = top == OURS
                if own or not ours:
                    yield value
                    stack += [] if top in LIBRARIES and not ours else [*_held(value)][::-1]
            elif isinstance(value, MethodType):
                stack += [value.__self__, value.__func__]
            elif isinstance(value, functools.partial):
                stack += [*(part for item in value.keywords.items() for part in item), *value.args, value.func][::-1]
            elif isinstance(value, tuple):
                stack += value[::-1]
            else:  # what functools.cache returns is no function, and holds one
                stack.append(getattr(value, "__dict__", {}).get("__wrapped__", type(value)))


def _held(function: FunctionType) -> Iterator[Any]:
    """What a function holds: defaults, variables of its closure (but not those that it assigns to), the function it wraps."""
    yield from function.__defaults__ or ()
    for item in (function.__kwdefaults__ or {}).items():
        yield from item
    assigned = {step.argval for step in dis.get_instructions(function.__code__) if step.opname == "STORE_DEREF"}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name not in assigned:
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
    if wrapped := getattr(function, "__wrapped__", None):
        yield wrapped


def _file_of(value: type | FunctionType) -> Path | None:
    """Its source file; None if it is interactive, compiled or in an archive."""
    try:
        file = inspect.getsourcefile(value)
    except (OSError, TypeError):
        return None
    return path if file and (path := Path(file).absolute()).is_file() else None


def _bytecode(code: CodeType) -> Any:
    """The code of a function without a source file."""
    values = (sorted(map(repr, one)) if isinstance(one, frozenset) else one for one in code.co_consts)
    return code.co_code, code.co_names, [_bytecode(one) if isinstance(one, CodeType) else one for one in values]


def _imported(file: Path) -> Iterator[Path]:
    """The files of the project that this file imports, and the packages that it lies in."""
    yield from _packages(file.parent)
    for level, names in _imports(_read(file)):
        if level:
            folder = file.parents[min(level, len(file.parents)) - 1]
            yield from _packages(folder)
            yield from _modules(folder, names)
        elif names[0] not in LIBRARIES:
            near = [module for folder in _folders(file) for module in _modules(folder, names)]
            yield from near or _on_path(names)


def _packages(folder: Path) -> Iterator[Path]:
    """The files of the packages that a folder is, and lies in."""
    while (package := folder / "__init__.py").is_file():
        yield package
        folder = folder.parent


def _modules(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """The files of modules and packages that are run to import `names` from a folder."""
    for name in names:
        folder = folder / name
        yield from (file for file in (folder.with_name(f"{name}.py"), folder / "__init__.py") if file.is_file())


def _folders(file: Path) -> Iterator[Path]:
    """The folders in which an absolute import is looked for first: those around the file, up to the top of the project."""
    for folder in file.parents[: 1 + max(_depth(file), _depth_of_project(file))]:
        yield folder
        if (source := folder / "src").is_dir():
            yield source


def _on_path(names: tuple[str, ...]) -> list[Path]:
    """The files of `names` in the first folder of `sys.path` that has them, if it is no folder of installed modules."""
    if names[0] in sys.stdlib_module_names:
        return []
    folders = (Path(entry).absolute() for entry in sys.path if isinstance(entry, str))
    return next((found for folder in folders if not _is_installed(folder) and (found := [*_modules(folder, names)])), [])


def _is_installed(file: Path) -> bool:
    return any(part in INSTALLED for part in file.parts) or any(file.is_relative_to(folder) for folder in STDLIB)


def _depth(file: Path) -> int:
    """The number of packages that the file lies in."""
    return next(number for number, folder in enumerate(file.parents) if not (folder / "__init__.py").is_file())


def _depth_of_project(file: Path) -> int:
    """The number of folders between the file and the top of its project; 0 if no folder looks like one."""
    return next((number for number, folder in enumerate(file.parents) if any((folder / name).exists() for name in PROJECT)), 0)


def _import_name(file: Path) -> str:
    """The file below the folder that it is imported from, wherever that lies."""
    return file.relative_to(file.parents[_depth(file)]).as_posix()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


@functools.lru_cache(maxsize=4096)
def _imports(source: bytes) -> tuple[Import, ...]:
    """The imports of a source text, wherever in it."""
    with warnings.catch_warnings():  # of escapes in its texts, for one
        warnings.simplefilter("ignore")
        try:
            nodes = [*ast.walk(ast.parse(source))]
        except (SyntaxError, ValueError):
            return ()
    plain = {(0, tuple(alias.name.split("."))) for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    others = {
        (node.level, (*(node.module.split(".") if node.module else ()), alias.name))
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return tuple(sorted(plain | others))
