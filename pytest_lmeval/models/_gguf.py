"""Describe a GGUF file, and explain why one cannot be read; transformers reads it (`hf:FOLDER/FILE.gguf`)."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

from pytest_lmeval.errors import described

MAGIC = b"GGUF"


def holds(file: Path) -> str:
    """The types of the file's tensors by what they take of it, and its bits per weight: `Q4_1 89 %, F32 11 %, 5.0 bits`."""
    from gguf import GGUFReader

    sizes, weights = Counter[str](), 0
    for tensor in GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
        weights += int(tensor.n_elements)
    total = sum(sizes.values())
    shares = ", ".join(f"{name} {size / total:.0%}" for name, size in sizes.most_common())
    return f"{shares} of {total:,} bytes, {8 * total / max(1, weights):.2f} bits per weight"


def why_not(folder: Path | None, name: str, error: Exception) -> str:
    """Why a GGUF file was not read: a package that is missing, damage, or what transformers says."""
    if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        return f"a GGUF file needs {' and '.join(missing)}: pip install 'pytest-lmeval[gguf]' ({described(error)})"
    if folder is None:
        return described(error)
    file = folder / name
    with file.open("rb") as opened:
        start = opened.read(len(MAGIC))
    if start != MAGIC:
        return f"{name} is no GGUF file: it begins with {start!r}, and such files with {MAGIC!r}"
    try:
        holds(file)
    except Exception as damage:  # noqa: BLE001 - whatever it is, the file is damaged
        return f"{name} is damaged ({described(damage)}; {file.stat().st_size:,} bytes). Copy it again"
    return f"transformers cannot read {name}: {described(error)}"
