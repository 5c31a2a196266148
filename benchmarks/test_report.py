"""Measure the processor time and size of a report on two models, by the number of examples."""

import json
import random
import time

import pytest

from pytest_lmeval.records._document import RunDocument
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._measured import ModelFacts, Record, Series
from pytest_lmeval.records._schema import line_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.report import _pages as pages

pytestmark = pytest.mark.benchmark

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "reads", "what", "it", "was", "not", "seen",
]  # fmt: skip
PER_EXAMPLE = 2_000  # bytes, beyond which a page would not be kept or sent


def sentence(generator, words=12):
    return " ".join(generator.choices(WORDS, k=words))


def examples(count, model):
    """Questions with four endings, as in HellaSwag; each model answers another fifth of them by guessing."""
    for number in range(count):
        texts, answers = random.Random(number), random.Random(f"{model} {number}")
        choices = [" " + sentence(texts) for _ in range(4)]
        right, answer = texts.randrange(4), answers.randrange(4)
        answer = right if answers.random() > 0.2 else answer
        yield Example(
            id=f"{number:016x}",
            number=number,
            prompt=sentence(texts, 40),
            output=choices[answer].strip(),
            target=choices[right].strip(),
            scores={"accuracy": float(answer == right)},
            choices=tuple(choices),
            right=(right,),
            loglikelihoods=tuple(answers.uniform(-90.0, -60.0) if index != answer else -50.0 for index in range(4)),
        )


def run(folder, count):
    """Write the examples of a run of two models, and return its document."""
    (folder / "examples").mkdir()
    records = []
    for model in ("first", "second"):
        file = f"examples/{model}.jsonl"
        (folder / file).write_text("".join(map(line_of, examples(count, model))))
        records.append(
            Record(
                kind="task",
                subject="endings",
                lm=ModelFacts(spec=model, fingerprint=model),
                metrics={"accuracy": Value(0.8, low=0.79, high=0.81, n=count, higher_is_better=True)},
                examples=file,
                series={"loss_by_position": Series([1.0, 2.0], [3.0, 2.0], "tokens before", "nats/token")},
            )
        )
    return RunDocument(records=records)


@pytest.mark.parametrize("count", [100, 1_000, 10_000])
def test_rendering_a_report(lmeval, tmp_path, count):
    document = run(tmp_path, count)
    pages.render("report.html", RunDocument())  # templates and scripts are read once
    began = time.process_time()
    html = pages.render("report.html", document, folders=[tmp_path])
    seconds = time.process_time() - began
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    embedded = sum(row is not None for row in data["examples"][0]["rows"])
    lmeval.record(
        "demo",
        f"report of {count:,} examples",
        render_seconds=Value(seconds, "s", n=1, higher_is_better=False),
        page_bytes=Value(len(html.encode()), "bytes", n=1, higher_is_better=False),
        examples_bytes=Value(sum(file.stat().st_size for file in (tmp_path / "examples").iterdir()), "bytes", n=1),
        texts_embedded=Value(embedded, f"of {count:,}", n=1),
    )
    assert seconds < 2
    assert len(html) < 1_000_000 + PER_EXAMPLE * count
