"""Split a safetensors file into shards, byte for byte the same each time, so that a shard on the hub is known to be there.

The tensors are copied as bytes, a few MiB at once. https://huggingface.co/docs/safetensors/metadata_parsing
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import ArgumentError, UnreadableError
from pytest_lmeval.records._secrets import without_secrets

LONGEST = 100_000_000  # bytes of a header; safetensors itself reads no longer ones
AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Shard:
    """A file with some tensors of another.

    start    of the tensors in the source
    tensors  name -> dtype, shape and data_offsets in the source, in the order of the offsets
    same     it is the source
    """

    name: str
    source: Path
    start: int
    tensors: dict[str, dict[str, Any]]
    about: dict[str, str]
    same: bool = False

    @property
    def size(self) -> int:
        return self.source.stat().st_size if self.same else len(self._header) + sum(map(_size, self.tensors.values()))

    def write(self, folder: Path) -> Path:
        if self.same:
            return self.source
        file = folder / self.name
        with self.source.open("rb") as given, file.open("wb") as new:
            new.write(self._header)
            for tensor in self.tensors.values():
                given.seek(self.start + tensor["data_offsets"][0])
                left = _size(tensor)
                while left:
                    part = given.read(min(left, AT_ONCE))
                    if not part:
                        raise UnreadableError(f"{self.source} ended while it was read. Does a training still write it?")
                    new.write(part)
                    left -= len(part)
        return file

    @cached_property
    def _header(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": self.about} if self.about else {}
        at = 0
        for name, tensor in self.tensors.items():
            header[name] = {**tensor, "data_offsets": [at, at + _size(tensor)]}
            at += _size(tensor)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def split(source: Path, most: str, name: str) -> tuple[list[Shard], str]:
    """The shards of a file, each of at most so many bytes unless one tensor is larger, and the index that names them; one file
    and no index if it is small. Raises UnreadableError for a file that is cut off, ArgumentError for an impossible size."""
    from huggingface_hub import split_state_dict_into_shards_factory

    start, header = _read(source)
    before = header.pop("__metadata__", {})
    about = without_secrets(before)
    ordered = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    stem, _, ending = name.rpartition(".")
    sizes = {tensor: _size(found) for tensor, found in ordered.items()}
    try:
        planned = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            filename_pattern=f"{stem}{{suffix}}.{ending}",
            max_shard_size=most,
        )
    except ValueError as error:
        raise ArgumentError(f"--max-shard-size is {most!r}; it is a size such as 5GB or 200MB.") from error
    files = planned.filename_to_tensors
    if not planned.is_sharded and about == before:
        return [Shard(name, source, start, ordered, about, same=True)], ""
    parts = [
        Shard(file, source, start, {tensor: ordered[tensor] for tensor in ordered if tensor in set(held)}, about)
        for file, held in files.items()
    ]
    if not planned.is_sharded:
        return parts, ""
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": planned.tensor_to_filename}
    return parts, json.dumps(index, indent=1, sort_keys=True) + "\n"


def _read(source: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file begin, and its header."""
    size = source.stat().st_size
    with source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if not 0 < length <= min(LONGEST, size):
                raise ValueError(f"its header has {length:,} bytes")
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            if max(ends, default=0) + 8 + length != size:
                raise ValueError(f"it has {size:,} bytes, and {max(ends, default=0) + 8 + length:,} are expected")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UnreadableError(f"{source} is no whole file of weights ({error}); it was probably cut off.") from error
    return 8 + length, header


def _size(tensor: dict[str, Any]) -> int:
    begin, end = tensor["data_offsets"]
    return int(end) - int(begin)
