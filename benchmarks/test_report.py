"""How long does a report take to render, and how large is it? By the number of examples, of two models that are compared.

Processor time, which holds on a machine that does other things as well.
"""

import json
import random
import time

import pytest

from pytest_lmeval import Metric
from pytest_lmeval.report import pages

pytestmark = pytest.mark.benchmark

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "reads",
    "what",
    "it",
    "was",
    "not",
    "shown",
)
PER_EXAMPLE = 2_000  # bytes, beyond which a page would not be kept or sent


def sentence(chance, words=12):
    return " ".join(chance.choices(WORDS, k=words))


def examples(count, model):
    """Questions with four endings, as those of HellaSwag; one in five is answered wrongly, by each model another one."""
    for number in range(count):
        chance, luck = random.Random(number), random.Random(f"{model} {number}")
        choices = [" " + sentence(chance) for _ in range(4)]
        right, answer = chance.randrange(4), luck.randrange(4)
        answer = right if luck.random() > 0.2 else answer
        scores = [luck.uniform(-90.0, -60.0) if place != answer else -50.0 for place in range(4)]
        own = {"id": f"{number:016x}", "number": number, "group": None, "choices": choices, "right": [right]}
        yield {**own, "loglikelihoods": scores, "prediction": choices[answer].strip(), "target": choices[right].strip()}


def run(folder, count):
    """The output folder of a run of two models on so many examples."""
    (folder / "examples").mkdir()
    records = []
    for model in ("first", "second"):
        file = f"examples/{model}.jsonl"
        (folder / file).write_text("".join(json.dumps(example) + "\n" for example in examples(count, model)))
        lm = {"spec": model, "parameters": 1, "bytes": 4, "dtype": "float32", "device": "cpu", "fingerprint": model}
        accuracy = Metric(0.8, low=0.79, high=0.81, n=count, higher_is_better=True).to_json()
        series = {"loss_by_position": {"x": [1.0, 2.0], "y": [3.0, 2.0], "x_unit": "tokens before", "y_unit": "nats/token"}}
        records.append(
            {
                "kind": "task",
                "subject": "endings",
                "lm": lm,
                "metrics": {"accuracy": accuracy},
                "examples": file,
                "series": series,
            }
        )
    return {"records": records}


@pytest.mark.parametrize("count", [100, 1_000, 10_000])
def test_rendering_a_report(lmeval, tmp_path, count):
    document = run(tmp_path, count)
    pages.render("report.html", {"records": []})  # templates and scripts are read once
    began = time.process_time()
    html = pages.render("report.html", document, folders=[tmp_path])
    seconds = time.process_time() - began
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    embedded = sum(row is not None for row in data["boards"][0]["rows"])
    lmeval.record(
        "demo",
        f"report of {count:,} examples",
        render_seconds=Metric(seconds, "s", n=1, higher_is_better=False),
        page_bytes=Metric(len(html.encode()), "bytes", n=1, higher_is_better=False),
        examples_bytes=Metric(sum(file.stat().st_size for file in (tmp_path / "examples").iterdir()), "bytes", n=1),
        texts_embedded=Metric(embedded, f"of {count:,}", n=1),
    )
    assert seconds < 2
    assert len(html) < 1_000_000 + PER_EXAMPLE * count
