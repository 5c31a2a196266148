"""Write the output folders of shards with made-up examples and documents, as many as wanted, without a model.

The first lines are those of a real shard of a small run; the others are theirs with other numbers.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from msgspec import json as fast
from shared_out import LM, measured

from pytest_lmeval import Choices, Corpus, Task
from pytest_lmeval.data._corpus import Document
from pytest_lmeval.records._journal import PARTS
from pytest_lmeval.records._share import Share

ENDINGS = (" walks home", " opens the box and looks", " falls", " says nothing at all")
KINDS = 1000  # different made-up answers
CONTEXT = "A man stands in a kitchen. He takes a knife and an onion, and begins to cut it on a board; then he "


def ask(row):
    return Choices(f"{row['n']}: {CONTEXT}", ENDINGS, row["n"] % 4)


TASK = Task("made up", [{"n": n} for n in range(8)], ask, ("accuracy", "accuracy_per_character"))
TEXTS = Corpus("made up", "test", lambda: (Document(str(n), f"{n} {CONTEXT}") for n in range(8)), "made up", as_stream=False)


def save_shards(folder: Path, shards: int, examples: int, documents: int = 0) -> list[Path]:
    """The folders of shards that share out this many made-up examples of a task, and documents of a text."""

    def verbs(lmeval):
        if documents:
            lmeval.perplexity(LM, TEXTS, invariant=True)
        return lmeval.task(LM, TASK, invariant=True)

    index = next(index for index in (1, 2) if Share(index, 2).owns("made up"))
    measured(folder / "pattern", verbs, Share(index, 2))
    lines = [json.loads(line) for line in (folder / "pattern/journal.jsonl").read_text().splitlines()]
    (pattern,) = (folder / "pattern").glob("examples/*-examples.jsonl")
    tails = _tails(json.loads(pattern.read_text().splitlines()[0]))
    part = next(((folder / "pattern" / line["part"]).read_bytes() for line in lines if line.get("part")), b"")
    folders = []
    for shard in range(1, shards + 1):
        own = folder / f"shard-{shard}"
        (own / "examples").mkdir(parents=True)
        numbers = range(shard - 1, examples, shards)
        with open(own / pattern.relative_to(folder / "pattern"), "wb") as file:
            file.writelines(b'{"id":"%016x","number":%d,%s' % (hash((number, 1)) & (2**64 - 1), number, tails[number % KINDS])
                            for number in numbers)  # fmt: skip
        for line in lines:
            if line.get("share"):
                line["share"] = f"{shard}/{shards}"
            if (line.get("record") or {}).get("kind") == "task":
                line["record"]["details"]["questions"] = line["record"]["details"]["answers"] = len(numbers)
            if line.get("part"):
                (own / PARTS).mkdir()
                (own / line["part"]).write_bytes(_documents(part, range(shard - 1, documents, shards)))
        (own / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(own)
    return folders


def _tails(pattern: dict[str, object]) -> list[bytes]:
    """What stands after the number in the lines of different answers."""
    found = []
    for kind in range(KINDS):
        generator = random.Random(kind)
        likelihoods = [generator.gauss(-30.0, 5.0) for _ in ENDINGS]
        chosen, right = likelihoods.index(max(likelihoods)), kind % 4
        normed = [total / (len(ending) - 1) for total, ending in zip(likelihoods, ENDINGS, strict=True)]
        scores = {"accuracy": float(chosen == right), "accuracy_per_character": float(normed.index(max(normed)) == right)}
        answer = {
            "loglikelihoods": likelihoods, "chosen": chosen, "output": ENDINGS[chosen].strip(), "right": [right], "group": None,
            "target": ENDINGS[right].strip(), "targets": [ENDINGS[right].strip()], "scores": pattern["scores"] | scores,
        }  # fmt: skip
        rest = {name: value for name, value in (pattern | answer).items() if name not in ("id", "number")}
        found.append(fast.encode(rest)[1:] + b"\n")
    return found


def _documents(pattern: bytes, numbers: range) -> bytes:
    """The sums of a share that has a document for each of these numbers."""
    part = json.loads(pattern)
    units = [[20.0 + number % 9, 80.0 + number % 31, 30.0, 0.001, 1.0, 5.0] for number in numbers]
    part |= {
        "units": units, "documents": [f"{number:016x}" for number in numbers], "numbers": list(numbers),
        "total": list(map(sum, zip(*units, strict=True))), "chunks": [[*unit, 32.0] for unit in units],
        "chunks_seen": len(units),
    }  # fmt: skip
    return fast.encode(part)
