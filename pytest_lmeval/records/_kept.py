"""Types of the lines of `answers/*.jsonl`: what was read for the questions of a task, batch by batch (`scoring._answers`)."""

from __future__ import annotations

from pytest_lmeval.records._schema import StoredStruct


class KeptScored(StoredStruct, frozen=True, kw_only=True):
    """An `engine.Scored`."""

    loglikelihood: tuple[float, ...]
    greedy: bool
    read: int
    state_bytes: int


class KeptAnswer(StoredStruct, frozen=True, kw_only=True):
    """An `engine.Answer`; `counts` are tokens, padding, calls and the largest state in bytes."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    judged: bool | None
    read: int
    why: str
    counts: tuple[int, int, int, int]
    thought: str = ""


class KeptBatch(StoredStruct, frozen=True, kw_only=True):
    """What one batch read, by the names of its requests; or the differences that an audit found, by those of its questions."""

    plan: str
    scored: dict[str, KeptScored] = {}
    answers: dict[str, KeptAnswer] = {}
    audited: dict[str, float] = {}


def name_of(number: int, key: str, index: int) -> str:
    """The name of a request: the row of its question, the key of that, and which of its requests it is."""
    return f"{number} {key} {index}"


def parts_of(name: str) -> tuple[int, str, int]:
    """What `name_of` made a name from. Raises ValueError for another text."""
    number, key, index = name.split(" ")
    return int(number), key, int(index)
