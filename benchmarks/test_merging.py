"""Measure what merging many shards takes: processor time, memory, open files; by examples, by shards, and by documents.

    pytest benchmarks/test_merging.py -s            two minutes; no model is read

Answers and documents are made up (`made_up_shards`). A process of its own merges, and may have 64 open files.
"""

import json
import subprocess
import sys

import pytest
from made_up_shards import save_shards

from pytest_lmeval.records._document import load

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

EXAMPLES, SHARDS = 1_000_000, 64
SECONDS = 60  # of processor time
BYTES = 700  # of memory for each example, at most
MERGE = """
import json, os, resource, sys, threading, time
import pytest_lmeval.merging, pytest_lmeval.report._pages, torch
from pytest_lmeval.__main__ import main

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
start = resource.getrusage(resource.RUSAGE_SELF)
most = [0]

def count():
    while True:
        most[0] = max(most[0], len(os.listdir("/proc/self/fd")))
        time.sleep(0.05)

if sys.platform == "linux":
    threading.Thread(target=count, daemon=True).start()
status = main(["merge", *sys.argv[2:], "--to", sys.argv[1]])
end = resource.getrusage(resource.RUSAGE_SELF)
seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
print(json.dumps([status, seconds, start.ru_utime + start.ru_stime, start.ru_maxrss, end.ru_maxrss, most[0]]))
"""


def merged(folder, shards, examples, documents=0):
    """Status, seconds of processor time, MiB before and at the peak, open files; of merging made-up shards."""
    folders = save_shards(folder / "shards", shards, examples, documents)
    command = [sys.executable, "-c", MERGE, str(folder / "all"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    status, seconds, start, before, peak, files = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    counts = {record.kind: record.metrics["accuracy" if record.kind == "task" else "nll"].n
              for record in load(folder / "all").records}  # fmt: skip
    assert counts["task"] == examples
    what = f"{shards:5} shards, {examples:9,} answers, {documents:7,} documents"
    line = f"{what}: {seconds:6.1f} s (start: {start:.1f}), {before >> 10} MiB, at most {peak >> 10}, {files} files"
    return line, seconds, (peak - before) * 1024


def test_a_million_answers_of_64_shards(tmp_path, capsys):
    line, seconds, growth = merged(tmp_path, SHARDS, EXAMPLES)
    with capsys.disabled():
        print(f"\n{line}; {growth / EXAMPLES:.0f} bytes an answer")
    assert seconds < SECONDS
    assert growth / EXAMPLES < BYTES


def test_what_grows_with_the_number_of_shards(tmp_path, capsys):
    with capsys.disabled():
        for shards, examples, documents in ((10, 20_000, 20_000), (100, 20_000, 20_000), (1000, 20_000, 20_000),
                                            (1000, 200_000, 200_000)):  # fmt: skip
            line, _, growth = merged(tmp_path / f"{shards}-{examples}", shards, examples, documents)
            print(f"\n{line}; {growth / shards / 1024:.0f} KiB a shard", end="")
    assert growth < 1 << 30
