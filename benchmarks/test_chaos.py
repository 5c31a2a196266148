"""Kill runs, fill their disk and let their memory run out, at moments spread over all kinds of work; print what was lost.

A run is ended by number of calls of its model, not by time, so that each moment can be tried again. All of it takes a quarter
of an hour; `tests/test_chaos.py` holds a small sample.
"""

import json
import signal
import subprocess
import sys

import pytest
from chaos import KINDS, SIGNALS, Project, differences, full_disk, why_no_disk
from memory_verbs import VERBS, differences as differ, read

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

MOMENTS = ((0.1,), (0.9,), (0.5, 0.2))  # of the work after the probe; the last run is killed twice
FILLED = 10


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with Project(tmp_path_factory.mktemp("chaos")) as project:
        yield project


def test_killed_runs_end_with_the_same_bits(project, capsys):
    rows, wrong = [], []
    _, probed = project.undisturbed("probe")
    for kind in KINDS:
        expected, calls = project.undisturbed(kind)
        before = 0 if kind == "probe" else probed
        for number in SIGNALS:
            kills, resumed, equal = project.kills, project.resumed, 0
            for moments in MOMENTS:
                found = project.killed(kind, number, [before + round(part * (calls - before)) for part in moments])
                different = differences(expected, found)
                equal += not different
                wrong += [f"{kind}, {signal.Signals(number).name} at {moments}: {line}" for line in different[:3]]
            cells = project.kills - kills, project.resumed - resumed, f"{equal} of {len(MOMENTS)}"
            rows.append(f"{kind:18} {signal.Signals(number).name:8} {cells[0]:5} {cells[1]:8} {cells[2]:>8}")
    with capsys.disabled():
        print(f"\n{'work':18} {'signal':8} kills  resumed    equal", *rows, sep="\n")
        print(f"{project.kills} kills; {len(wrong)} differences:", *wrong[:40], sep="\n")
    assert project.kills >= 100
    assert not wrong


@pytest.mark.skipif(why_no_disk() is not None, reason=str(why_no_disk()))
def test_a_full_disk_ends_a_run_as_pytest_ends_and_loses_nothing(project, capsys):
    lines, lost = [], []
    kinds = [kind for kind in KINDS if kind not in ("probe", "agreement")]
    expected = {kind: project.undisturbed(kind) for kind in kinds}
    _, probed = project.undisturbed("probe")
    for moment in range(FILLED):
        kind = kinds[moment % len(kinds)]
        records, calls = expected[kind]
        at = probed + round((moment + 0.5) / FILLED * (calls - probed))
        found = full_disk(project, kind, at)
        different = differences(records["records"], found.records)
        ended = f"status {found.status}, results {found.where}, {len(different)} differ"
        lines.append(f"{kind:18} at call {at:3} of {calls:3}: {ended}")
        lost += [f"{kind} at {at}: {line}" for line in [*found.wrong, *different[:3]]]
    with capsys.disabled():
        print("", *lines, *lost, sep="\n")
    assert not lost


@pytest.mark.parametrize("verb", VERBS)
def test_memory_that_runs_out_at_any_call_changes_no_number(verb, capsys):
    expected, calls = read(verb)
    wrong = []
    for at in range(1, calls + 1):
        try:
            wrong += [f"call {at}: {line}" for line in differ(verb, read(verb, at)[0], expected)[:1]]
        except Exception as error:  # noqa: BLE001 - counted
            wrong.append(f"call {at}: {type(error).__name__}: {str(error)[:120]}")
    with capsys.disabled():
        print(f"\n{verb:24} {calls:4} calls, {calls:4} injections, {calls - len(wrong):4} the same", *wrong[:5], sep="\n  ")
    assert not wrong


LIMITED = """
import json, re, resource, sys, torch, transformers
from pathlib import Path
from pytest_lmeval import as_model, policy_for
from pytest_lmeval.laws import probe
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.training import Protocol, run_training

torch.set_num_threads(1)
torch.manual_seed(0)
verb, limit = sys.argv[1], int(sys.argv[2])
config = transformers.LlamaConfig(vocab_size=64_000, hidden_size=64, intermediate_size=128, num_hidden_layers=30,
                                  num_attention_heads=4, max_position_embeddings=8192, tie_word_embeddings=True)
lm = as_model(transformers.LlamaForCausalLM(config).eval())
ids = lm.random_ids(1, 3000)[0].numpy()
policy = policy_for(lm, chunk_size=1024, window="unlimited")

def train(rows):
    return run_training(lm, ids, protocol=Protocol(steps=2, batch_size=rows, seq_len=64)).record

def read(tokens):
    return measure_perplexity(lm, ids[:tokens], policy=policy).record

def try_laws(_):
    return probe(lm, budget=1).record

work, once, all_of_it = {"perplexity": (read, 20, 3000), "training": (train, 1, 16), "probe": (try_laws, None, None)}[verb]
if once:
    work(once)  # what is allocated once
if limit:
    used = 1024 * int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + (limit << 20),) * 2)
record = work(all_of_it)
numbers = {name: [float(value), value.n] for name, value in record.metrics.items() if name in ("nll", "train_loss")}
found = record.certificate
words = [*record.notes, *record.details.get("warnings", ()), *([found.limit, found.why_not(), found.verdict] if found else [])]
print(json.dumps([numbers, " ".join(filter(None, words))]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much address space a process takes")
@pytest.mark.parametrize(("verb", "limit", "said"), [
    ("perplexity", 200, "memory is short"), ("training", 800, "memory ran out"), ("probe", 200, "out of memory at"),
])  # fmt: skip
def test_a_real_limit_of_memory_changes_no_number(verb, limit, said, capsys):
    """RLIMIT_AS so many MiB above what a Llama of 30 layers takes; the logits of a chunk of 1,024 tokens take 260."""
    pytest.importorskip("transformers")

    def run(limit):
        done = subprocess.run([sys.executable, "-c", LIMITED, verb, str(limit)], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    (free, _), (limited, words) = run(0), run(limit)
    with capsys.disabled():
        print(f"\n{verb} within {limit} MiB: {limited}, free: {free}; {words}")
    assert limited.keys() == free.keys()
    assert all(limited[name] == pytest.approx(free[name], rel=1e-5) for name in free)
    assert said in words
