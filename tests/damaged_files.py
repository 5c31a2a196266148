"""Readings of damaged files of each kind: a few for the tests, thousands for the benchmark."""

import gzip
import json
import random
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
from documents import GOLDEN, chosen, document, everything, generated, perplexity_of, task_of, write_run
from fuzzing import altered, damaged, text_of

from pytest_lmeval.__main__ import main
from pytest_lmeval._session import Session, TestLog
from pytest_lmeval.data import corpus
from pytest_lmeval.data._rows import Rows
from pytest_lmeval.errors import LmevalError
from pytest_lmeval.gates import _baseline as baseline
from pytest_lmeval.laws import _evidence as evidence
from pytest_lmeval.laws._counterexample_store import CounterexampleStore
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.models._sources import load
from pytest_lmeval.records import _history as history, _schema as schema
from pytest_lmeval.report import _render as render

SMALL = [None, True, 0, -1, 3, 1.5, "", "x", "\ud800", [], {}, [[1]], {"a": {}}, ["x"], 7777]  # a config says what is allocated


def readings(kind, folder, count, seed=0):
    """`count` functions, each of which damages one file of the kind and reads it as a run or a command would."""
    write, read = KINDS[kind](folder)
    for number in range(count):
        rng = random.Random(f"{kind} {seed} {number}")
        yield lambda rng=rng: (write(rng), read(rng))[1]


def changed(lines, rng):
    """Plain lines as bytes, one of them altered or damaged."""
    raw = [text_of(line) for line in lines]
    number = rng.randrange(len(raw))
    raw[number] = text_of(altered(lines[number], rng)) if rng.random() < 0.6 else damaged(raw[number], rng)
    return b"\n".join(raw) + b"\n"


def command(*words):
    if main([str(word) for word in words]):
        raise LmevalError("refused, and the reason is printed on stderr")


def journals(folder):
    records = [schema.to_plain(record) for record in everything().records]
    lines = [{"event": "result", "key": f"k{number}", "record": record} for number, record in enumerate(records)]
    lines.insert(2, {"event": "end", "keys": ["k0", "k9"]})

    def read(rng):
        context = VerbContext(Session(folder=folder), TestLog("t.py::test"))
        for key in context.session.journal.results:
            context.finished(key)
        assert all(isinstance(note, str) for note in context.log.notes)
        whole = document(*context.log.records)
        for name in ("summary.md", "report.html"):
            render.page(name, whole, folders=[folder])
        context.log.to_plain()

    return lambda rng: (folder / "journal.jsonl").write_bytes(changed(lines, rng)), read


def metrics(folder):
    run, file = write_run(folder / "run", everything()), folder / "run" / "metrics.json"
    write_run(folder / "other", document(task_of()))
    plain = json.loads(GOLDEN.read_text())

    def write(rng):
        file.write_bytes(text_of(altered(plain, rng)) if rng.random() < 0.7 else damaged(text_of(plain), rng))

    commands = [
        ("render", run, "--to", folder / "out"),
        ("compare", run, folder / "other", "--to", folder / "out"),
        ("baseline", "accept", "--from", run, "--to", folder / "baseline.json"),
        ("render", run, "--format", "bencher", "--to", folder / "out"),
    ]
    return write, lambda rng: command(*rng.choice(commands))


def baselines(folder):
    answers = [chosen(number, is_right=number % 2 == 0) for number in range(10)]
    write_run(folder / "run", document(task_of(examples="examples/a.jsonl"), perplexity_of()), a=answers)
    path = folder / "baseline.json"
    command("baseline", "accept", "--from", folder / "run", "--to", path)
    files = {file: file.read_bytes() for file in (path, baseline.examples_file(path))}

    def write(rng):
        for file, raw in files.items():
            file.write_bytes(raw)
        file = rng.choice(list(files))
        if file == path:
            file.write_bytes(
                text_of(altered(json.loads(files[file]), rng)) if rng.random() < 0.6 else damaged(files[file], rng)
            )
        else:
            file.write_bytes(changed([json.loads(line) for line in files[file].splitlines()], rng))

    def read(rng):
        assert baseline.read(path) is not None

    return write, read


def histories(folder):
    history.append(folder, everything())
    history.append(folder, document(task_of()))
    lines = [json.loads(line) for line in (folder / history.NAME).read_bytes().splitlines()]

    def read(rng):
        found, notes = history.read(folder)
        history.statistics(found)
        command("history", folder)
        return notes

    return lambda rng: (folder / history.NAME).write_bytes(changed(lines, rng)), read


def examples(folder):
    answers = [chosen(number, is_right=number % 3 == 0) for number in range(6)] + [generated(6, "it is so"), generated(7, "no")]
    run = write_run(folder / "run", document(task_of(examples="examples/a.jsonl")), a=answers)
    lines = [schema.to_plain(answer) for answer in answers]
    file = run / "examples" / "a.jsonl"
    commands = [("render", run), ("baseline", "accept", "--from", run, "--to", folder / "baseline.json")]

    return lambda rng: file.write_bytes(changed(lines, rng)), lambda rng: command(*rng.choice(commands))


def counterexamples(folder):
    case = {"length": 40, "cuts": [3, 9], "seed": 1, "rows": 2, "padding": 3, "before": 4}
    lines = [{"lm": "demo", "law": law, "case": case} for law in ("splits", "rows", "fork")]
    lines.append({"lm": "demo", "law": "splits", "case": {"length": 3_000_000}})
    store = CounterexampleStore(folder / "counterexamples.jsonl")

    def read(rng):
        for cases in store.cases("demo", 320).values():
            assert all(1 < case.length <= 320 and case.rows < 64 and case.before <= 320 for case in cases)
        store.add("demo", "splits", case)

    return lambda rng: store.path.write_bytes(changed(lines, rng)), read


def certificates(folder):
    store = evidence.EvidenceStore.of(folder, load("demo"), 320)
    tried = evidence.Tried({"splits": [evidence.Case(40, (3,))]}, {"rows": [evidence.Case(9, rows=2)]})
    store.save(evidence.Evidence(tried, tried, 2))
    whole = json.loads(store.path.read_bytes())
    del whole["sha256"]

    def write(rng):
        plain = altered(whole, rng)
        if rng.random() < 0.5 and isinstance(plain, dict):  # with the right hash, as an attacker writes it
            plain["sha256"] = evidence._digest(plain)
        raw = text_of(plain)
        store.path.write_bytes(raw if rng.random() < 0.7 else damaged(raw, rng))

    def read(rng):
        assert store.load() is not None

    return write, read


def rows(folder):
    found = [{"text": f"row {n}", "label": n % 2, "parts": [{"b": None}], "x": 1.5} for n in range(8)]
    flat = b"text,label\n" + b"".join(b'"row, %d",%d\n' % (n, n % 2) for n in range(8))
    files = {
        "jsonl": b"".join(text_of(row) + b"\n" for row in found),
        "json": text_of(found),
        "csv": flat,
        "jsonl.gz": gzip.compress(b"".join(text_of(row) + b"\n" for row in found)),
        "txt": "It was a dark and stormy night \u4f60\u597d. ".encode() * 20,
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), folder / "whole.parquet")
    files["parquet"] = (folder / "whole.parquet").read_bytes()
    np.save(folder / "whole.npy", np.arange(64))
    files["npy"] = (folder / "whole.npy").read_bytes()

    def read(rng):
        form = read.form
        if form in ("txt", "npy"):
            for one in corpus(f"{'text' if form == 'txt' else 'tokens'}:{folder / form}").documents():
                assert one.text or one.ids is not None
        else:
            list(Rows(f"{form.partition('.')[0]}:{folder / form}").read())

    def write(rng):
        read.form = rng.choice(list(files))
        lines = read.form == "jsonl" and rng.random() < 0.5
        (folder / read.form).write_bytes(changed(found, rng) if lines else damaged(files[read.form], rng))
        if read.form == "npy" and rng.random() < 0.1:
            with zipfile.ZipFile(folder / read.form, "w") as packed:
                packed.writestr("ids.npy", files["npy"])

    return write, read


def checkpoints(folder):
    from test_huggingface import MODELS
    from tokenizers_of_each_kind import tokenizer_of

    MODELS["llama"]().save_pretrained(folder, max_shard_size="8KB")
    tokenizer_of("gpt2").tokenizer.save_pretrained(folder)
    files = {file: file.read_bytes() for file in folder.iterdir()}
    named = sorted(files)

    def write(rng):
        for file, raw in files.items():
            file.write_bytes(raw)
        file = rng.choice(named)
        if file.suffix == ".json" and rng.random() < 0.6:
            file.write_bytes(text_of(altered(json.loads(files[file]), rng, SMALL)))
        elif rng.random() < 0.1:
            file.unlink()
        else:
            file.write_bytes(damaged(files[file], rng))

    def read(rng):
        lm = load(f"hf:{folder}")
        ids, _ = lm.tokenizer.encode("It was a dark night.")
        lm.tokenizer.decode(ids)

    return write, read


KINDS = {
    "journals": journals,
    "metrics": metrics,
    "baselines": baselines,
    "histories": histories,
    "examples": examples,
    "counterexamples": counterexamples,
    "certificates": certificates,
    "rows": rows,
    "checkpoints": checkpoints,
}
