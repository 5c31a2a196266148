"""Builders of small typed documents, records and examples that use everything a page can show."""

import json
from pathlib import Path

from msgspec.structs import replace

from pytest_lmeval import registry
from pytest_lmeval.records._certificate import Certificate, Costs, Counterexample, LawResult
from pytest_lmeval.records._comparison import Comparison
from pytest_lmeval.records._document import Environment, Run, RunDocument, dump, load
from pytest_lmeval.records._example import Example
from pytest_lmeval.records._measured import Cost, ModelFacts, Record, Series
from pytest_lmeval.records._schema import line_of
from pytest_lmeval.records._value import Value

GOLDEN = Path(__file__).parent / "golden" / "metrics-2.json"
HOSTILE = (
    "<script>alert('x')</script><img src=x onerror=alert(1)> | `code` **bold** [link](javascript:x) {{ 7 * 7 }}\n# heading\x07"
)


def model(spec="demo", **changes):
    own = {"form": "functional", "parameters": 978_048, "bytes": 3_912_192, "dtype": "float32", "device": "cpu"}
    return ModelFacts(spec=spec, fingerprint=spec, **{**own, **changes})


def laws_of(spec="demo", *, broken=(), certificate=None, **changes):
    """The verdict on a model that keeps all laws except those in `broken`."""
    case = Counterexample({"chunks": [3]}, 0.5, "off at token <3>", "pytest_lmeval.replay(lm, <3>)")
    found = {
        name: LawResult(cases=4, worst_ratio=0.75, counterexamples=(case,) if name in broken else ())
        for name in ("splits", "causality")
    }
    found["fork"] = LawResult(cases=0, unavailable="its state cannot be copied")
    own = {"verdict": "exact-any-chunk", "dtype": "float32", "reference": "a float64 run", "laws": found, "longest": 160,
           "costs": Costs(call=32, reach=4096)}  # fmt: skip
    record = Record(kind="equivalence", subject="laws of streaming", lm=model(spec), test=f"t.py::test_laws[{spec}]")
    own = {"certificate": Certificate(**{**own, **(certificate or {})}), "outcome": "passed", **changes}
    return replace(record, metrics={"laws_kept": Value(2, "of 3")}, **own)


def perplexity_of(spec="demo", **changes):
    metrics = {
        "perplexity": Value(3.5, low=3.25, high=3.75, n=5000, higher_is_better=False),
        "nll": Value(1.25, "nats/token", n=5000, higher_is_better=False),
        "bits_per_byte": Value(1.8, "bits/byte", low=1.7, high=1.9, n=5000, higher_is_better=False),
        "tokens_per_second": Value(31_244.7, "tokens/s", n=5, higher_is_better=True),
    }
    losses = Series([1.0, 64.0], [4.0, 1.25], "tokens before", "nats/token", title="Loss by position", log="x")
    own = {
        "kind": "perplexity",
        "subject": "stdlib[test]",
        "lm": model(spec),
        "test": "t.py::test_reads",
        "settings": {"chunk_size": 1024, "reading": "carried"},
        "metrics": metrics,
        "cost": Cost(seconds=1.5, tokens=5000, state_bytes=2048),
        "certificate": replace(laws_of(spec).certificate, chunking_used="chunks of 1024"),
        "series": {"loss_by_position": losses},
        "example": "block",
        "outcome": "passed",
    }
    return Record(**{**own, **changes})


def task_of(spec="demo", examples=None, *, accuracy=0.5, **changes):
    metrics = {"accuracy": Value(accuracy, low=accuracy - 0.1, high=accuracy + 0.1, n=10, higher_is_better=True)}
    own = {"kind": "task", "subject": "brackets", "test": "t.py::test_task", "metrics": metrics, "examples": examples}
    return Record(**{**own, "lm": model(spec), "example": "question", "outcome": "passed", **changes})


def chosen(number, *, is_right=True, **changes):
    """The answer to a question with two choices, the first of which is right."""
    own = {"id": f"id{number}", "number": number, "prompt": f"Question {number}?", "output": "yes" if is_right else "no"}
    own |= {"target": "yes", "targets": ("yes",), "scores": {"accuracy": float(is_right)}, "choices": (" yes", " no")}
    own |= {"right": (0,), "chosen": int(not is_right), "loglikelihoods": (-1.0, -2.0) if is_right else (-2.0, -1.0)}
    return Example(**{**own, **changes})


def generated(number, output, *, score=1.0, **changes):
    """A generated answer, scored by exact match."""
    own = {"id": f"id{number}", "number": number, "prompt": f"Question {number}?", "output": output, "target": "yes"}
    return Example(**{**own, "scores": {"exact_match": score}, **changes})


GATE = {
    "nll": Comparison(verdict="same", base=1.3, new=1.25, difference=0.001, low=-0.01, high=0.01, margin=0.02, p=0.4),
    "perplexity": Comparison(verdict="worse", base=3.3, new=3.5, difference=0.2, low=0.1, high=0.3, margin=0.02, p=0.001),
    "bits_per_byte": Comparison(
        verdict="unclear", base=1.7, new=1.8, difference=0.1, margin=0.01, detectable=0.2, needed=1200, test="paired"
    ),
    "state_bytes": Comparison(verdict="new", new=2048.0, difference=-2048.0, note="a note"),
}


def document(*records, **changes):
    own = {
        "run": Run(id="3c66593ec342", started="2026-11-20T23:25:51+00:00", seconds=22.8, command="pytest tests", exit_status=0),
        "environment": Environment(
            python="3.11.7", torch="2.13.0", device="cpu", cpu="a processor", cores=2, threads=2, platform="Linux",
            packages={"torch": "2.13.0"}, commit="abb1eb9d06a26fdd885db059604ab19450b4ecb8", dirty=True, seed=0,
        ),
        "records": list(records) or [laws_of(), perplexity_of(), task_of()],
    }  # fmt: skip
    return RunDocument(**{**own, **changes})


def everything():
    """A document that uses every part of the schema."""
    return load(GOLDEN)


def write_run(folder, found, **files):
    """Write the output folder of a run: its document and files of examples."""
    (folder / "examples").mkdir(parents=True)
    (folder / "metrics.json").write_text(dump(found))
    for name, lines in files.items():
        (folder / "examples" / f"{name}.jsonl").write_text("".join(map(line_of, lines)), errors="backslashreplace")
    return folder


def data_of(html):
    """The data that the page's script reads."""
    return json.loads(html.partition('id="data">')[2].partition("</script>")[0])


def register(monkeypatch, **groups):
    """Let packages register things: group -> package -> name -> thing. Other groups are unchanged."""
    things = {
        registry.Entry(group, name, f"{package}:{name}", package): thing
        for group, packages in groups.items()
        for package, found in packages.items()
        for name, thing in found.items()
    }
    entries, loaded = registry.entries, registry._loaded

    def registered(group):
        return tuple(entry for entry in things if entry.group == group) if group in groups else entries(group)

    monkeypatch.setattr(registry, "entries", registered)
    monkeypatch.setattr(registry, "_loaded", lambda entry: things[entry] if entry in things else loaded(entry))
