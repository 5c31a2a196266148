"""Read the journals of shards, and refuse what are not all shards of one run."""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from pytest_lmeval.errors import ArgumentError, MergeError, some
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._journal import NAME, Journal, Line
from pytest_lmeval.records._measured import Record
from pytest_lmeval.records._share import Share, parsed


@dataclass(frozen=True)
class Shard:
    """The last run in the output folder of a shard.

    results  by the key that the result of all examples has, without their records
    """

    folder: Path
    share: Share
    results: dict[str, Line]
    _records: dict[str, bytes]

    def record(self, key: str) -> Record:
        """That of a result. Raises DocumentError for one that is no record. Records are held compressed: there are as many as
        shards times measurements, and each is merged once."""
        plain = json.loads(zlib.decompress(self._records[key]))
        return schema.build(
            plain, Record, f"a result in the journal of {self.folder}", "Run this shard again with --lmeval-fresh"
        )


def read(folders: Sequence[Path]) -> list[Shard]:
    """The shards in these folders, in their order. Raises MergeError if they are not each shard of one run, once."""
    found = [_read(folder) for folder in folders]
    counts = {shard.share.count: shard for shard in found}
    if len(counts) > 1:
        named = " and ".join(f"{shard.folder} is shard {shard.share}" for shard in counts.values())
        raise MergeError(f"these are shards of different runs: {named}. Give the folders of one run.")
    by_index = defaultdict[int, list[Path]](list)
    for shard in found:
        by_index[shard.share.index].append(shard.folder)
    for index, own in by_index.items():
        if len(own) > 1:
            raise MergeError(
                f"shard {index} is given twice: {own[0]} and {own[1]}. Its examples would count twice; leave one of them out."
            )
    (count,) = counts
    if missing := [str(index) for index in range(1, count + 1) if index not in by_index]:
        raise MergeError(
            f"{len(missing)} of {count} shards are missing: {some(missing, 20)}. Without their examples no number is that of "
            f"the whole. Run them (--lmeval-shard {missing[0]}/{count}), or give their folders, too."
        )
    return sorted(found, key=lambda shard: shard.share.index)


def _read(folder: Path) -> Shard:
    if not (folder / NAME).is_file():
        raise MergeError(f"{folder} holds no {NAME}: it is no output folder of a run, or nothing was measured in it.")
    first, *lines = Journal(folder).last_run() or [Line(event="")]
    if first.event != "shard":
        raise MergeError(f"the last run in {folder} is no shard: it was started without --lmeval-shard.")
    try:
        share = parsed(first.share)
    except ArgumentError as error:
        raise MergeError(f"{folder / NAME}: {error}") from None
    if other := next((line.share for line in lines if line.share != first.share), None):
        raise MergeError(
            f"{folder} holds results of shard {other} beside those of {share}. Give each shard a folder of its own."
        )
    records = {line.whole: zlib.compress(json.dumps(line.record).encode()) for line in lines}
    return Shard(folder, share, {line.whole: structs.replace(line, record={}) for line in lines}, records)
