"""Measure what reading short documents side by side saves: calls, and processor time, beside one document after another.

With LMEVAL_REAL_DATA, the documents are questions of GSM8K; with LMEVAL_REAL_MODEL too, the model in that folder reads some.
"""

import os
import statistics
import time
from pathlib import Path

import pytest

from pytest_lmeval import Value, corpus, load, policy_for
from pytest_lmeval.engine import Engine
from pytest_lmeval.measures._perplexity import measure_perplexity

pytestmark = [pytest.mark.benchmark, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ROWS, ROUNDS = 8, 3
REAL = f"hf:{os.environ.get('LMEVAL_REAL_MODEL', '')}@fp32"
MODELS = {"demo": 300, "zoo:lstm": 300, REAL: 60}  # documents


@pytest.fixture
def questions():
    data = os.environ.get("LMEVAL_REAL_DATA")
    if not data:
        pytest.skip("needs LMEVAL_REAL_DATA")
    return corpus(f"jsonl:{Path(data) / 'openai/gsm8k/main/test.jsonl'}#question", "test")


def reading(lm, questions, count, rows):
    """(processor seconds, (rows, tokens) of each call, the result)"""
    calls, step = [], Engine.step

    def counted(engine, input_ids, state=None, *, keep=None):
        calls.append(tuple(input_ids.shape))
        return step(engine, input_ids, state, keep=keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", counted)
        began = time.process_time()
        result = measure_perplexity(lm, questions, policy=policy_for(lm, batch_size=rows), as_stream=False, limit=count)
    return time.process_time() - began, calls, result


@pytest.mark.parametrize("model", MODELS)
def test_documents_side_by_side(lmeval, questions, model):
    if model == "hf:@fp32":
        pytest.skip("needs LMEVAL_REAL_MODEL")
    lm, count, ratios = load(model), MODELS[model], []
    for round_ in range(ROUNDS):
        found = {rows: reading(lm, questions, count, rows) for rows in ((1, ROWS) if round_ % 2 else (ROWS, 1))}
        ratios.append(found[1][0] / found[ROWS][0])
    (_, beside, result), (_, alone, expected) = found[ROWS], found[1]
    assert float(result.nll) == pytest.approx(float(expected.nll), rel=1e-5)
    tokens = [sum(rows * width for rows, width in calls) for calls in (beside, alone)]
    longest = [max(rows * width for rows, width in calls) for calls in (beside, alone)]
    lmeval.record(
        lm,
        f"{count} documents side by side over one after another",
        calls_ratio=Value(len(alone) / len(beside), "x"),
        padded_tokens_ratio=Value(tokens[0] / tokens[1], "x", higher_is_better=False),
        longest_call_ratio=Value(longest[0] / longest[1], "x", higher_is_better=False),
        processor_time_saved=Value(statistics.median(ratios), "x", low=min(ratios), high=max(ratios), n=ROUNDS),
    )
