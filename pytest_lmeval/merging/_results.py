"""Merge the results of all shards, one measurement after another."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from msgspec import structs

from pytest_lmeval.errors import DocumentError, MergeError
from pytest_lmeval.measures import _agreement_record, _suite, _task_merging, _text_record
from pytest_lmeval.measures._merging import check_same
from pytest_lmeval.merging._shards import Shard
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example, example_of
from pytest_lmeval.records._journal import Line
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._replacing import inside, replacing
from pytest_lmeval.scoring._loss_accumulator import LossAccumulator
from pytest_lmeval.scoring._text_files import write_units

READ = 1 << 16  # bytes of a file of examples that are held


@dataclass
class Merged:
    """Records of all examples by key, and what could not be merged, with the shards that lack it."""

    records: dict[str, Record] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)


def merged(shards: Sequence[Shard], to: Path) -> Merged:
    """The merged results; their files of examples are written to the folder `to`. Raises MergeError for results that are not
    shares of the same, and for a file that cannot be read."""
    found, suites = Merged(), dict[str, tuple[list[tuple[Shard, Line]], list[Record]]]()
    for key in dict.fromkeys(key for shard in shards for key in shard.results):
        lines = [(shard, shard.results[key]) for shard in shards if key in shard.results]
        records = [shard.record(key) for shard, _ in lines]
        first, (owner, line) = records[0], lines[0]
        if line.alone:
            found.records[key] = _as_it_is(owner, first, to)
        elif lacking := [str(shard.share.index) for shard in shards if key not in shard.results]:
            found.missing[_what(first)] = lacking
        elif first.kind == "suite":
            suites[key] = lines, records
            found.records[key] = first  # in its place, until its tasks are merged
        else:
            found.records[key] = _whole(lines, records, to)
    for key, (lines, records) in suites.items():
        _average(found, key, lines, records)
    return found


def _what(record: Record) -> str:
    return f"{record.test}: {record.kind} of {record.lm.spec} on {record.subject}"


def _average(found: Merged, key: str, lines: Sequence[tuple[Shard, Line]], records: Sequence[Record]) -> None:
    """Compute a suite from its merged tasks; it is missing if one of them is."""
    parts, wholes = [_part(shard, line) for shard, line in lines], dict[str, str]()
    for (shard, _), part in zip(lines, parts, strict=True):
        of_own = {line.key: whole for whole, line in shard.results.items()}
        wholes |= {name: of_own.get(own, "") for name, own in part["tasks"].items()}
    if any(whole not in found.records for whole in wholes.values()):
        del found.records[key]
        found.missing[_what(records[0])] = sorted({index for lacking in found.missing.values() for index in lacking})
        return
    tasks = {name: found.records[wholes[name]] for name in parts[0]["first"] if name in wholes}
    found.records[key] = _suite.merged(records, parts[0], tasks)


def _whole(lines: Sequence[tuple[Shard, Line]], records: Sequence[Record], to: Path) -> Record:
    """One record of shares of the same."""
    first = records[0]
    if first.kind == "task":
        for record in records[1:]:
            check_same(first, record)
        name = f"examples/{lines[0][1].whole}-examples.jsonl"
        files = [(shard.folder, record.examples) for (shard, _), record in zip(lines, records, strict=True) if record.examples]
        whole = _task_merging.merged(records, _joined(files, to / name))
        return structs.replace(whole, examples=name)
    if first.kind not in ("perplexity", "agreement"):  # each shard needs it, and all have the same
        for record in records[1:]:
            check_same(first, record)
        return first
    parts = [_part(shard, line) for shard, line in lines]
    if first.kind == "agreement":
        return _agreement_record.merged(records, parts)
    sums = LossAccumulator.merged([LossAccumulator.from_json(part) for part in parts])
    whole = _text_record.merged(records, sums)
    if not sums.tokens:
        return whole
    name = f"examples/{lines[0][1].whole}-units.jsonl"
    write_units(to / name, sums)
    return structs.replace(whole, units=name)


def _part(shard: Shard, line: Line) -> dict[str, Any]:
    """What a share adds up to."""
    try:
        plain = schema.parse(inside(shard.folder, line.part or "").read_bytes(), line.part or "", "Run this shard again")
    except (OSError, DocumentError) as error:
        raise MergeError(f"the sums of shard {shard.share} in {shard.folder} cannot be read: {error}") from error
    return dict(plain)


def _as_it_is(shard: Shard, record: Record, to: Path) -> Record:
    """The record of the only shard that measured it; its files are copied."""
    for name in filter(None, (record.examples, record.units)):
        try:
            content = inside(shard.folder, name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise MergeError(f"{shard.folder / name} cannot be read: {error}") from error
        with replacing(to / name) as new:
            new.write_bytes(content)
    return record


def _joined(parts: Sequence[tuple[Path, str]], to: Path) -> Iterator[Example]:
    """The examples of these files (folder, name), each in the order of its questions, in one order; they are written to one
    file as they are. One example of each file is held at a time. Raises MergeError for a line that is no example."""
    with replacing(to) as new, open(new, "wb") as output:
        for _, line, example in heapq.merge(*(_lines(folder, name) for folder, name in parts), key=itemgetter(0)):
            output.write(line)
            yield example


def _lines(folder: Path, name: str) -> Iterator[tuple[tuple[int, int], bytes, Example]]:
    """The place of each example in a file, its line, and itself."""
    try:
        for number, line in enumerate(_raw_lines(inside(folder, name)), start=1):
            try:
                example = example_of(line)
            except (ValueError, RecursionError) as error:
                raise MergeError(f"{folder / name}, line {number} is no example ({error}). Run this shard again.") from None
            yield example.place, line, example
    except OSError as error:
        why = error.strerror or error
        raise MergeError(
            f"{folder / name} cannot be read ({why}): the examples of this shard are lost. Run it again."
        ) from error


def _raw_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file that is open only while some of them are read: there may be more shards than open files."""
    at = 0
    while True:
        with open(file, "rb") as source:
            source.seek(at)
            lines = source.readlines(READ)
            at = source.tell()
        if not lines:
            return
        yield from lines
