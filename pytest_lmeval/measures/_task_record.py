"""Describe in a record what a task asked, and how: its settings, what it counted, and what a reader should notice."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from pytest_lmeval.data._rows import Rows
from pytest_lmeval.engine import Engine
from pytest_lmeval.measures._audit import spread_note
from pytest_lmeval.models._identity import facts
from pytest_lmeval.records._certificate import Audit
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._measured import Cost, Record
from pytest_lmeval.records._metric import Metric, Norm, metric
from pytest_lmeval.records._value import Value
from pytest_lmeval.tasks._task import Task, tie_rule

NOTED = (
    "truncated",
    "fewer_shots",
    "retokenized",
    "not_questions",
    "not_asked",
    "from_other_batches",
)  # counts that a note repeats


def record_of(
    engine: Engine,
    task: Task,
    answered: Sequence[Example],
    values: dict[str, Value],
    norm: Norm,
    settings: dict[str, Any],
    counts: dict[str, Any],
    audit: Audit | None,
) -> Record:
    """The record of an asked task, without its duration.

    values    its metrics
    norm      how choices are compared (see `norm_of`)
    settings  how it was asked, beside what the task and the engine say themselves
    counts    what was counted while it was asked, beside what its answers say themselves
    audit     of its answers
    """
    policy, certificate = engine.policy, engine.policy.certificate
    details = {
        "prefix_sharing": policy.sharing,
        **counts,
        "questions": len({example.number for example in answered}),
        **({} if task.repeats == 1 else {"answers": len(answered)}),
        "truncated": sum(example.truncated > 0 for example in answered),
        "fewer_shots": sum(example.shots_dropped > 0 for example in answered),
        "retokenized": sum(example.retokenized for example in answered),
        "ties": sum(len(example.likeliest(norm)) > 1 for example in answered),
        "tokens_read": sum(example.read for example in answered),
        "tokens_alone": sum(example.read + example.saved for example in answered),
        "padding": engine.counts.padding,
        "calls": engine.counts.calls,
        "packed": policy.pack,
    }
    notes = [] if policy.sharing == "prefix sharing: on" else [policy.sharing]
    outcomes = Counter(example.outcome for example in answered if example.outcome)
    if set(outcomes) - {"answered"}:
        details["outcomes"] = dict(outcomes.most_common())
    record = Record(
        kind="task",
        subject=f"{task.name}, {settings['shots']}-shot",
        lm=facts(engine.lm),
        settings={
            "style": task.style,
            "version": task.version,
            "rows": _rows_name(task.rows),
            "batch_size": engine.asked.batch_size,
            "prompts": _hash_of(answered),
            **settings,
            **({} if task.threshold is None else {"threshold": task.threshold}),
            **({"invariant": True} if policy.invariant else {}),
            **({"special_tokens": True} if task.special_tokens else {}),
        },
        details=details,
        notes=[*notes, *([engine.less] if engine.less else []), *policy.withheld],
        metrics=values,
        cost=Cost(tokens=details["tokens_read"], state_bytes=engine.counts.peak_state_bytes),
        certificate=certificate and structs.replace(certificate, chunking_used=policy.sharing, audit=audit),
        example="answer" if any(example.repeat for example in answered) else "question",
    )
    return structs.replace(record, notes=[*record.notes, *counted_notes(record)])


def counted_notes(record: Record) -> list[str]:
    """The notes that the counts of a record decide."""
    details, settings = record.details, record.settings
    answers = details.get("answers", details["questions"])
    notes = [f"{details[name]:,} {name.replace('_', ' ')}" for name in NOTED if details.get(name)]
    if settings.get("repeats", 1) > 1 and record.example != "answer":
        same = f"its {settings['repeats']} answers would be the same"
        notes.append(f"temperature 0: each question is answered once, since {same}")
    if spread := details.get("between_runs"):
        name, deviation = next(iter(spread.items()))
        notes.append(f"between runs, {name} varies by {deviation:.2g} (one standard deviation, from the spread of the answers)")
    if outcomes := {what: count for what, count in details.get("outcomes", {}).items() if what != "answered"}:
        notes.append(", ".join(f"{count:,} answer{'s' * (count > 1)} {what}" for what, count in outcomes.items()))
    if withheld := details.get("withheld"):
        notes.append(f"{', '.join(withheld)} not measured: {next(iter(withheld.values()))}")
    in_metrics = {name: value.ties for name, value in record.metrics.items() if metric(name).norm is not None}
    notes += _tie_notes(tie_rule(settings["style"]), answers, in_metrics or {"outputs": details["ties"]})
    if special := details.get("special_tokens"):
        how = "control tokens" if settings.get("special_tokens") else "text"
        notes.append(f"special tokens are written in {special:,} questions, read as {how}")
    return [*notes, *spread_note(record)]


def withheld(
    most_cut_off: float, metrics: Sequence[Metric], values: dict[str, Value]
) -> tuple[dict[str, Value], dict[str, str]]:
    """The values without those that too many answers were cut off for, and of each of these why."""
    share = values.get("cut_off")
    if share is None or share <= most_cut_off:
        return values, {}
    n, cut = share.n or 0, round(share * (share.n or 0))
    why = (
        f"{cut:,} of {n:,} generated answers were cut off: they had no end within max_tokens, or did not end thinking. What "
        f"they would have said is unknown, and they are more than most_cut_off={most_cut_off:g} allows. Raise max_tokens, give "
        "the stop that ends an answer, or allow more."
    )
    about = {metric.name for metric in metrics if metric.judges or metric.several or metric.needs == "targets to compare with"}
    return {name: value for name, value in values.items() if name not in about}, {name: why for name in values if name in about}


def norm_of(metrics: Sequence[Metric]) -> Norm:
    """How choices are compared by the first metric that compares any."""
    return next((metric.norm for metric in metrics if metric.norm is not None), "sum")


def _hash_of(answered: Sequence[Example]) -> str:
    """A hash of all that was asked, in any order: the sum of the hashes of the questions."""
    once = (one for one in answered if not one.repeat)
    asked = (f"{one.id}{one.prompt}{one.choices}{one.texts}{one.right}{one.targets}" for one in once)
    hashes = (hashlib.sha256(one.encode(errors="surrogatepass")).digest()[:8] for one in asked)
    return sum_of_hashes(one.hex() for one in hashes)


def sum_of_hashes(hashes: Iterable[str]) -> str:
    """The sum of hashes of 16 hexadecimal digits, modulo 2^64."""
    return f"{sum(int(one, 16) for one in hashes) % 2**64:016x}"


def _tie_notes(rule: str, questions: int, ties: dict[str, int]) -> list[str]:
    """How many questions are tied in which metrics, and what these count; nothing without any."""
    counted = {"first": "the first of tied choices is taken, as in lm_eval", "shared": "each of k tied choices counts 1/k"}
    names: dict[int, list[str]] = {}
    for name, count in ties.items():
        names.setdefault(count, []).append(name)
    return [
        f"{count:,} of {questions:,} questions tied in {' and '.join(tied)} ({counted[rule]})"
        for count, tied in names.items()
        if count
    ]


def _rows_name(rows: Any) -> str:
    if isinstance(rows, list | tuple):
        return f"{len(rows)} rows"
    if isinstance(rows, Rows):
        return str(rows)
    return f"{rows.__module__}.{rows.__qualname__}" if hasattr(rows, "__qualname__") else type(rows).__name__


def number_of_questions(
    task: Task, limit: int | None, data_dir: str | Path | None = None, not_questions: int | None = None
) -> int | None:
    """The number of questions to ask, or None; of a dataset, only in a local file and given how many rows are none."""
    rows, length = task.rows, None
    if isinstance(rows, list | tuple):
        length = len(rows)
    elif not_questions is not None and limit is None and isinstance(rows, Rows) and rows.file(data_dir) is not None:
        length = sum(1 for _ in rows.read(data_dir)) - not_questions
    return limit if length is None else length if limit is None else min(limit, length)
