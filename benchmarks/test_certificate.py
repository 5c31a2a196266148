"""Measure what a certificate costs on a model of real size, and which share of usual measurements that is.

    LMEVAL_REAL_MODEL=FOLDER pytest benchmarks/test_certificate.py

SmolLM2-135M-Instruct, or the model in the folder: the work of the probe in tokens, calls, and readings of 160 tokens; its
processor time; its share of a reading of 100,000 tokens and of a task of 200 questions, in a first run and in a second one that
finds the evidence of the first; and the share of the audits. A part of the text and of the task is measured, so that it takes
minutes: processor time of the whole is that of the part times its size.
"""

import time

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from real_model import MISSING, real_model_folder  # noqa: E402

from pytest_lmeval import Value, as_model  # noqa: E402
from pytest_lmeval._session import Session  # noqa: E402
from pytest_lmeval.laws import probe  # noqa: E402

pytestmark = [pytest.mark.benchmark, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CALL, LENGTH = 46, 160  # a call takes the time of so many tokens; tokens of the readings in which work is given
MOST_READS = 68  # 60 for the laws of every model, the rest for `packed`
TOKENS, READ = 100_000, 20_000  # of a text, and of its part that is read
QUESTIONS, ASKED = 200, 40  # of a task, and those that are asked
MOST = 0.05  # of the audits, and the aim of the probe from the second run on
CHUNK, SECOND = 1024, 0.6  # tokens of a step of a reading; the part of the first probe's work that the second may take


@pytest.fixture(scope="module")
def lm():
    folder = real_model_folder() or pytest.skip(MISSING)
    module = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return as_model(module, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), spec="SmolLM2")


def processor_seconds(work):
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def test_work_of_the_probe(lmeval, lm, capsys):
    seconds, result = processor_seconds(lambda: probe(lm))
    calls, tokens, work = (result.record.details[name] for name in ("calls", "tokens", "work"))
    reads = work / (LENGTH + CALL)
    lmeval.record(lm, "a certificate", reads=Value(reads, "reads", higher_is_better=False), seconds=Value(seconds, "s"))
    with capsys.disabled():
        print(f"\n{result.certificate.summary}")
        print(
            f"{calls:,} calls with {tokens:,} tokens: {reads:.0f} reads of {LENGTH} tokens, {seconds:.0f} s of processor time"
        )
    assert result.verdict == "exact-any-chunk"
    assert reads <= MOST_READS


def test_share_of_usual_measurements(lmeval, lm, corpus, tmp_path, capsys):
    runs = [processor_seconds(lambda: Session(folder=tmp_path, profile="dev").verdict(lm)) for _ in range(2)]
    lmeval.equivalence(lm)
    reading, text = processor_seconds(lambda: lmeval.perplexity(lm, corpus("stdlib", "test"), tokens=READ))
    asking, task = processor_seconds(lambda: lmeval.task(lm, "stdlib_next", limit=ASKED))
    whole = {f"{TOKENS:,} tokens": reading * TOKENS / READ, f"{QUESTIONS} questions": asking * QUESTIONS / ASKED}
    audits = dict(zip(whole, (result.record.certificate.audit for result in (text, task)), strict=True))
    with capsys.disabled():
        for what, seconds in whole.items():
            shares = ", ".join(f"{probing / seconds:.1%} in run {run}" for run, (probing, _) in enumerate(runs, 1))
            print(
                f"\n{what}, {seconds:.0f} s: the probe takes {shares}; {audits[what]}, {audits[what].share:.1%} of the work",
                end="",
            )
        for run, (probing, result) in enumerate(runs, 1):
            print(f"\nrun {run}: {probing:.0f} s, {result.certificate.summary}", end="")
    works = [result.record.details["work"] for _, result in runs]
    share = works[1] / (TOKENS * (1 + CALL / CHUNK))
    with capsys.disabled():
        print(f"\nby work, the second run takes {share:.1%} of {TOKENS:,} tokens in chunks of {CHUNK:,}; {MOST:.0%} is the aim")
    assert works[1] <= SECOND * works[0]
    assert audits[f"{TOKENS:,} tokens"].share <= MOST
