"""Write a mirror that one core can ask: the first rows of the sets of a larger one, and two sets made from its rows."""

import itertools
import json
import re

from small_suite import write

ROWS = 60
PROBLEMS, PROBLEM_SHOTS = 32, 5
PASSAGE_WORDS, QUESTIONS = 150, 12


def save_rows(folder, mirror):
    """Write the sets that `mirror` holds under `folder`; MMLU-like and BoolQ-like ones have the fields of the originals."""
    for hub_id, config, split in (
        ("Rowan/hellaswag", "default", "validation"),
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        ("baber/piqa", "default", "validation"),
    ):
        write(folder, hub_id, config, split, rows_of(mirror, hub_id, config, split)[:ROWS])
    for split, count in (("test", PROBLEMS), ("train", PROBLEM_SHOTS)):
        write(folder, "openai/gsm8k", "main", split, rows_of(mirror, "openai/gsm8k", "main", split)[:count])
    four = [row for row in map(as_mmlu, rows_of(mirror, "allenai/ai2_arc", "ARC-Challenge", "test")) if row]
    write(folder, "cais/mmlu", "miscellaneous", "test", four[:ROWS])
    write(folder, "cais/mmlu", "miscellaneous", "dev", four[-5:])
    text = (mirror / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    write(folder, "aps/super_glue", "boolq", "validation", list(itertools.islice(as_boolq(text), ROWS)))


def rows_of(mirror, hub_id, config, split):
    return [json.loads(line) for line in (mirror / hub_id / config / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def as_mmlu(row):
    """A question of ARC with MMLU's fields; None unless it has choices A to D."""
    if row["choices"]["label"] != list("ABCD"):
        return None
    answer = "ABCD".index(row["answerKey"])
    return {"question": row["question"], "subject": "miscellaneous", "choices": row["choices"]["text"], "answer": answer}


def as_boolq(text):
    """Rows with BoolQ's fields: does a passage mention a name? By turns one of its own, and one of the passage before."""
    passages = [line.strip() for line in text.splitlines() if len(line.split()) >= PASSAGE_WORDS]
    names = [sorted(set(re.findall(r"(?<![.] )\b[A-Z][a-z]{3,}", passage))) for passage in passages]
    number = itertools.count()
    for index in range(1, len(passages)):
        own, others = names[index], [name for name in names[index - 1] if name not in passages[index]]
        if min(len(own), len(others)) >= QUESTIONS // 2:
            asked = [(name, label) for pair in zip(own, others, strict=False) for name, label in zip(pair, (1, 0), strict=True)]
            for name, label in asked[:QUESTIONS]:
                question = f"does the text mention {name}"
                yield {"passage": passages[index], "question": question, "label": label, "idx": next(number)}
