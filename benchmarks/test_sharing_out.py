"""Measure what it costs to share a run out among shards and ranks, and that its results stay those of one process.

    pytest benchmarks/test_sharing_out.py -s                         everything: half an hour on one core
    LMEVAL_KILLS=5 pytest benchmarks/test_sharing_out.py -s          fewer runs that lose a rank

The demo model is always read; LMEVAL_REAL_MODEL=FOLDER with LMEVAL_REAL_DATA=MIRROR also reads a real one with real rows.
Ratios are of processor time, with one thread in each process. Wall times are printed, and nothing depends on them.
"""

import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shared_runs import Runs

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

MOST = 1.1  # times the processor time of one process
COUNTS = (1, 2, 3, 5, 8)
KILLS = int(os.environ.get("LMEVAL_KILLS", 30))
LONGEST = 60  # seconds until a run ends that has lost a rank
DEMO = """
def test_certificate(lmeval, lm):
    lmeval.equivalence(lm)

def test_task(lmeval, lm):
    lmeval.task(lm, "stdlib_next", limit=60)

def test_invariant(lmeval, lm):
    lmeval.task(lm, "stdlib_next", limit=24, invariant=True)

def test_documents(lmeval, lm, corpus):
    lmeval.perplexity(lm, corpus("stdlib"), as_stream=False, limit=24, tokens=400)
"""
TURNS = 5
READS = """
def test_certificate(lmeval, lm):
    lmeval.equivalence(lm)

def test_documents(lmeval, lm, corpus):
    lmeval.perplexity(lm, corpus("stdlib"), as_stream=False, limit=48, tokens=400, invariant=True)
"""
REAL = """
def test_certificate(lmeval, lm):
    lmeval.equivalence(lm)

def test_task(lmeval, lm):
    lmeval.task(lm, "arc_easy")
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("demo") / "runs", DEMO, ["--lm", "demo"])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    for name in ("LMEVAL_REAL_MODEL", "LMEVAL_REAL_DATA"):
        if name not in os.environ:
            pytest.skip(f"no {name}")
    import real_rows

    data = tmp_path_factory.mktemp("rows")
    real_rows.save_rows(data, Path(os.environ["LMEVAL_REAL_DATA"]))
    options = ["--lm", f"hf:{os.environ['LMEVAL_REAL_MODEL']}", "--lmeval-data", str(data)]
    return Runs(tmp_path_factory.mktemp("real") / "runs", REAL, options)


@pytest.mark.parametrize("model", ["demo", "real"])
def test_processor_time_of_shares(model, request, capsys):
    """Two shards and two ranks take at most 1.1 times what one process takes, beyond the start of each."""
    runs = request.getfixturevalue(model)
    one, shards, ranks = runs.one(), runs.shards(2), runs.ranks(2)
    again = runs.one()
    base = min(one.verbs, again.verbs)
    with capsys.disabled():
        print(f"\n{model}: processor seconds of      verbs   times   with start, model and reports   times    wall of verbs")
        for name, ran in {"one process": one, "again": again, "2 shards, merged": shards, "2 ranks": ranks}.items():
            ratios = ran.verbs / base, ran.whole / min(one.whole, again.whole)
            print(f"{name:30}{ran.verbs:8.2f} {ratios[0]:7.3f} {ran.whole:20.2f} {ratios[1]:18.3f} {ran.wall:14.2f}")
        lines = [difference for ran in (shards, ranks) for test in one.records for difference in flips(one, ran, test)]
        print(*lines, sep="\n")
    assert shards.verbs <= MOST * max(one.verbs, again.verbs)
    assert ranks.verbs <= MOST * max(one.verbs, again.verbs)


def flips(one, other, test):
    """The answers that differ between two runs, each with its distance to the tie. Asserts what must be the same."""
    mine, theirs = ({(line["number"], line["repeat"]): line for line in ran.examples(test)} for ran in (one, other))
    assert mine.keys() == theirs.keys()
    found, worst = [], 0.0
    for key, line in mine.items():
        now = theirs[key]
        if not line["choices"]:
            continue
        pairs = list(zip(line["loglikelihoods"], now["loglikelihoods"], line["tokens"], strict=True))
        if "invariant" in test:
            assert all(left == right for left, right, _ in pairs), (key, pairs)
        worst = max([worst, *(abs(left - right) / (line["rounding"] * math.sqrt(count)) for left, right, count in pairs)])
        assert all(abs(left - right) <= line["rounding"] * count for left, right, count in pairs), (key, pairs)
        if line["chosen"] != now["chosen"]:
            first, second = sorted(line["loglikelihoods"], reverse=True)[:2]
            found.append(f"{test}, question {key[0]}: {line['chosen']} / {now['chosen']}, {first - second:.3g} nats from a tie")
    return [*found, *([f"{test}: {worst:.3f} of the tolerance, {len(found)} flips"] if mine else [])]


def check_same(one, other):
    """The results of a run that was shared out beside those of one process; returns what is to be printed."""
    assert one.records.keys() == other.records.keys(), other.output
    lines = []
    for test, record in one.records.items():
        found = other.records[test]
        lines += (said := flips(one, other, test))
        flipped = len(said) > 1  # a question that another choice is taken for changes what counts choices
        for name, value in record.metrics.items():
            if name == "tokens_per_second":
                continue
            assert found.metrics[name].n == value.n, (test, name)
            close = 1e-12 if "invariant" in test else 1e-5
            same = float(found.metrics[name]) == pytest.approx(float(value), rel=close, abs=1e-15)
            assert same or (flipped and "invariant" not in test), (test, name)
        for name in ("accuracy", "accuracy_per_character"):
            scores = [line["scores"][name] for line in other.examples(test) if line["scores"].get(name) is not None]
            if scores:
                assert float(found.metrics[name]) == pytest.approx(math.fsum(scores) / len(scores), rel=1e-12)
    return lines


BARE = """
import sys, time, torch
from torch.nn.functional import cross_entropy
from pytest_lmeval import corpus, load

spec, share, count, limit, tokens = sys.argv[1], *map(int, sys.argv[2:])
lm = load(spec)
texts = [document.text for document, _ in zip(corpus("stdlib").documents(), range(limit))]
parts = [torch.tensor(lm.tokenizer.encode(text)[0][:tokens])[None] for text in texts][share::count]
print("ready", flush=True)
sys.stdin.readline()
began = time.time()
with torch.inference_mode():
    for ids in parts:
        cross_entropy(lm.step_fn(ids[:, :-1], None, None)[0][0].float(), ids[0, 1:], reduction="sum").item()
print(began, time.time())
"""


def bare_loops(count):
    """Wall seconds of so many bare loops side by side, each over its share of the documents, without their start."""
    command = [sys.executable, "-c", BARE, "demo"]
    loops = [
        subprocess.Popen(
            [*command, str(share), str(count), "48", "400"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for share in range(count)
    ]  # fmt: skip
    for loop in loops:
        assert loop.stdout.readline() == "ready\n"
    for loop in loops:
        loop.stdin.write("\n")
        loop.stdin.flush()
    times = [tuple(map(float, loop.communicate()[0].split())) for loop in loops]
    return max(end for _, end in times) - min(begin for begin, _ in times)


def test_wall_time_beside_bare_loops(tmp_path, capsys):
    """How many times faster two ranks are than one process, beside how many times two bare loops are than one, by turns."""
    runs = Runs(tmp_path / "runs", READS, ["--lm", "demo"])
    ratios = []
    for _ in range(TURNS):
        bare, ours = bare_loops(1) / bare_loops(2), runs.one().wall / runs.ranks(2).wall
        ratios.append((ours / bare, ours, bare))
    with capsys.disabled():
        middle = statistics.median(ratio for ratio, _, _ in ratios)
        print(f"\nspeed-up of 2 ranks over that of 2 bare loops, on {os.cpu_count()} cores: {middle:.3f}, of {TURNS} turns")
        print(*(f"  {ratio:.3f}: {ours:.3f} / {bare:.3f}" for ratio, ours, bare in ratios), sep="\n")
    assert all(ratio > 0 for ratio, _, _ in ratios)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("how", ["shards", "ranks"])
def test_results_of_any_number_of_shares(demo, how, count, capsys):
    one, shared = demo.one(), getattr(demo, how)(count)
    with capsys.disabled():
        print(f"\n{count} {how}:", *check_same(one, shared), sep="\n  ")


def test_a_rank_that_is_killed_loses_nothing(demo, capsys):
    """At random moments from the first verb on; the run ends soon, and the next one ends with the results of one process."""
    one, undisturbed, generator = demo.one(), demo.ranks(2), random.Random(23)
    ends, resumed, lines = [], 0, []
    for number in range(KILLS):
        rank, moment, folder = number % 2, generator.uniform(0, undisturbed.wall), demo.output()
        process = demo.start(folder, ranks=2)
        pid = folder / f"pid-{rank}"
        while not demo.has_ended(process) and not (pid.exists() and pid.read_text()):
            time.sleep(0.02)
        time.sleep(moment)
        if not demo.has_ended(process):
            os.kill(int(pid.read_text()), signal.SIGKILL)
        began = time.monotonic()
        ended = demo.finished(process, folder)
        ends.append(time.monotonic() - began)
        assert ends[-1] < LONGEST, ended.output
        again = demo.ranks(2, folder)
        assert again.status == 0, again.output
        resumed += "taken from an" in again.output
        lines.append(f"rank {rank} after {moment:5.1f} s: ended in {ends[-1]:.1f} s; {'; '.join(check_same(one, again))}")
    with capsys.disabled():
        print("", *lines, sep="\n")
        print(f"{KILLS} kills: ended in {max(ends):.1f} s at most, median {statistics.median(ends):.1f} s; {resumed} resumed")
