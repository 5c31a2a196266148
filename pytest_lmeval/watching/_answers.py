"""Follow the answers of a run as they come: the last ones, with prompt and score where a finished measurement wrote them."""

from __future__ import annotations

import re
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._journal import ANSWERS
from pytest_lmeval.records._kept import KeptBatch, KeptScored, parts_of
from pytest_lmeval.records._replacing import inside
from pytest_lmeval.report._words import visible
from pytest_lmeval.watching._tail import Tail

SHOWN, FILES = 20, 64  # answers on the page; files that are followed, those that changed last
BEGIN = 1 << 18  # bytes at the end of each file that are read at the beginning
LONGEST = 2_000  # characters of a text on the page
SECONDS = 30.0  # over which the rate of tokens is taken
INDEXED = 200_000  # questions whose prompts can be looked up
KEY = re.compile(rb'"key": "(\w+)"')


class Answers:
    """The last answers in `answers/*.jsonl` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._prompts = folder, Prompts(folder)
        self._tails: dict[str, Tail] = {}
        self._last: deque[dict[str, Any]] = deque(maxlen=SHOWN)
        self._came: deque[tuple[float, int]] = deque()  # (when, tokens)
        self._number, self._begun = 0, time.monotonic()

    def read(self) -> list[dict[str, Any]]:
        """The last answers, the latest first. Raises OSError for a file that is no regular one of the folder."""
        first = not self._tails
        names = _changed_last(self.folder, ANSWERS, "*.jsonl", FILES)
        self._tails = {name: self._tails.get(name) or Tail(self.folder, name, last=BEGIN) for name in names}
        for name, tail in self._tails.items():
            for text in tail.lines():
                with suppress(ValueError):  # a line of another program
                    tokens = self._add(name, schema.convert(schema.parse(text, "", ""), KeptBatch))
                    if not first:
                        self._came.append((time.monotonic(), tokens))
        self._prompts.read()
        return [self._prompts.told(one) for one in reversed(self._last)]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the answers that came in the last seconds; None if none did."""
        now = time.monotonic()
        while self._came and self._came[0][0] < now - SECONDS:
            self._came.popleft()
        passed = min(SECONDS, now - self._begun)
        return sum(tokens for _, tokens in self._came) / passed if self._came and passed else None

    def _add(self, file: str, batch: KeptBatch) -> int:
        """Add what a batch read. Returns how many tokens its answers have."""
        tokens, choices = 0, dict[tuple[int, str], dict[int, KeptScored]]()
        for name, scored in batch.scored.items():
            number, key, index = parts_of(name)
            choices.setdefault((number, key), {})[index] = scored
            tokens += len(scored.loglikelihood)
        for (number, key), found in choices.items():
            sums = {index: sum(scored.loglikelihood) for index, scored in found.items()}
            best = max(sums, key=lambda index: sums[index])
            text = f"choice {best + 1} of {len(sums)} is the likeliest, at {sums[best]:.4g} nats"
            self._keep(file, number, key, text if len(sums) > 1 else f"{sums[best]:.4g} nats", None, "scored")
        for name, answer in batch.answers.items():
            number, key, _ = parts_of(name)
            tokens += len(answer.ids)
            self._keep(file, number, key, answer.text, answer.judged, answer.why)
        return tokens

    def _keep(self, file: str, number: int, key: str, text: str, judged: bool | None, why: str) -> None:
        self._number += 1
        own = {"id": self._number, "file": file, "question": number, "key": key, "judged": judged, "why": visible(why)}
        self._last.append({**own, "text": shortened(text)})


class Prompts:
    """Where the questions stand that finished measurements wrote to `examples/`, by their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, tuple[int, int]] = {}  # file -> time of its change and size
        self._lines: dict[str, tuple[str, int]] = {}  # key -> file, offset of its line
        self._found: dict[str, dict[str, Any]] = {}

    def read(self) -> None:
        """Index the files that changed. Raises OSError for one that is no regular file of the folder."""
        for name in _changed_last(self.folder, "examples", "*-examples.jsonl", FILES):
            path = inside(self.folder, name)
            status = path.stat()
            if self._read.get(name) == (status.st_mtime_ns, status.st_size):
                continue
            self._read[name], self._found, offset = (status.st_mtime_ns, status.st_size), {}, 0
            with open(path, "rb") as file:
                for line in file:
                    if (key := KEY.search(line)) and len(self._lines) < INDEXED:
                        self._lines[key[1].decode()] = name, offset
                    offset += len(line)

    def told(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer with the prompt, the target and the scores of its question, if they are known."""
        key = answer["key"]
        if key in self._lines and key not in self._found:
            if len(self._found) > 10 * SHOWN:
                self._found.clear()
            with suppress(OSError, ValueError):
                self._found[key] = self._look_up(key)
        return answer | self._found.get(key, {})

    def _look_up(self, key: str) -> dict[str, Any]:
        name, offset = self._lines[key]
        with open(inside(self.folder, name), "rb") as file:
            file.seek(offset)
            example = schema.convert(schema.parse(file.readline(), "", ""), Example)
        if example.key != key:
            return {}
        scores = {visible(metric): score for metric, score in example.scores.items() if score is not None}
        chosen = {"text": shortened(example.output)} if example.choices else {}
        target = None if example.target is None else shortened(example.target)
        return {**chosen, "prompt": shortened(example.prompt), "target": target, "scores": scores}


def shortened(text: str) -> str:
    """A text of a model as the page shows it: its end if it is long."""
    text = text.encode("utf-8", "replace").decode()  # without lone surrogates
    return visible(text if len(text) <= LONGEST else f"... {text[-LONGEST:]}")


def _changed_last(folder: Path, name: str, pattern: str, most: int) -> list[str]:
    """The files of a folder in an output folder that changed last, in the order of their changes, relative to the latter."""
    own = folder / name
    if not own.is_dir() or not own.resolve().is_relative_to(folder.resolve()):
        return []
    found = []
    for file in own.glob(pattern):
        with suppress(OSError):
            found.append((file.stat().st_mtime_ns, f"{name}/{file.name}"))
    return [name for _, name in sorted(found)[-most:]]
