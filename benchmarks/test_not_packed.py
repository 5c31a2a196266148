"""Compare calls, tokens and processor time of models that cannot pack with those of lm_eval.

    LMEVAL_REAL_MODEL=FOLDER LMEVAL_REAL_DATA=MIRROR pytest benchmarks/test_not_packed.py

A real transformer that does not offer its packing stands in for a hybrid or a black box: its states grow, and it is read so.
The recurrent model is `zoo:mamba`, whose rows are joined at any positions; untrained, since only its work is looked at.
"""

import dataclasses
import os
import time
from pathlib import Path

import lm_eval_side as side
import pytest

from pytest_lmeval import Generate, Task, Value, equivalence, load, policy_for
from pytest_lmeval.engine import _engine
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.tasks import find

pytestmark = [pytest.mark.benchmark, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SETS = ("hellaswag", "arc_easy", "piqa")
PROMPTS, LONGEST = 32, 64  # prompts, and the tokens of the longest answer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("lm_eval")
    for name in ("LMEVAL_REAL_MODEL", "LMEVAL_REAL_DATA"):
        if name not in os.environ:
            pytest.skip(f"no {name}")
    import real_rows

    data = tmp_path_factory.mktemp("rows")
    real_rows.save_rows(data, Path(os.environ["LMEVAL_REAL_DATA"]))
    return Path(os.environ["LMEVAL_REAL_MODEL"]), data


@pytest.fixture(scope="module")
def sides(folders):
    """A model that does not offer its packing, its certificate, and lm_eval's. What finds out how its states divide, twenty
    short steps, is in its processor time: the hook that counts makes it another module."""
    model = side.load_ours(folders[0])
    step = model.step_fn
    ours = dataclasses.replace(model, step_fn=lambda input_ids, state, keep=None: step(input_ids, state, keep))
    return ours, equivalence(ours, budget=1).certificate, side.load_theirs(folders[0])


@pytest.mark.parametrize("name", SETS)
def test_a_model_whose_states_grow(lmeval, folders, sides, capsys, name):
    ours, certificate, theirs = sides
    built, task = side.their_task(name, folders[1]), find(name)
    turns = side.by_turns(
        theirs=lambda: side.ask_theirs(theirs, built),
        ours=lambda: side.ask_ours(ours, certificate, task, 0, folders[1]),
    )
    (samples, _), (found, cost) = turns["theirs"][0], turns["ours"]
    asked, read = turns["theirs"][1], found.record.details
    pairs = [
        (one, other)
        for sample, example in zip(samples, found.examples, strict=True)
        for (one, _), other in zip(sample["filtered_resps"], example.loglikelihoods, strict=True)
    ]
    worst, over = max(abs(one - other) for one, other in pairs), read["tokens_read"] / side.unique_tokens(theirs, built)
    with capsys.disabled():
        print(
            f"\n{name}, not packed: calls {asked.calls} / {read['calls']}, tokens {asked.tokens} / {read['tokens_read']}, "
            f"padding {asked.padding} / {read['padding']}, {over:.3f} of the distinct, processor time {asked.seconds:.1f} / "
            f"{cost.seconds:.1f} s: {asked.seconds / cost.seconds:.2f}, log-likelihoods within {worst:.1e}"
        )
    lmeval.record(
        ours,
        f"{name}, not packed, against lm_eval",
        calls_ratio=Value(asked.calls / read["calls"], "x", higher_is_better=True),
        tokens_ratio=Value(asked.tokens / read["tokens_read"], "x", higher_is_better=True),
        tokens_over_distinct=Value(over, "x", higher_is_better=False),
        processor_ratio=Value(asked.seconds / cost.seconds, "x", higher_is_better=True),
        worst_difference=Value(worst, "nats", n=len(pairs), higher_is_better=False),
    )
    assert worst < 2e-4
    assert asked.seconds > cost.seconds


@pytest.mark.parametrize("name", ["mamba", "mamba2", "lstm"])
def test_answers_in_the_rows_of_a_batch(lmeval, folders, capsys, monkeypatch, name):
    """Questions of GSM8K with their five shots; answers end after 8 to 64 tokens."""
    lm = load(f"zoo:{name}")
    built = side.their_task("gsm8k", folders[1], 5, fewshot_config={"sampler": "first_n"})
    built.build_all_requests(rank=0, world_size=1)
    prompts = [request.args[0] for request in built.instances][:PROMPTS]
    rows = [{"prompt": prompt, "most": 8 + 37 * number % (LONGEST - 7)} for number, prompt in enumerate(prompts)]
    asked = Task("answers", rows, lambda row: Generate(row["prompt"], ("",), (), row["most"]), metrics=("exact_match",))
    policy, select = policy_for(lm, batch_size=side.BATCH), selection(lm)
    found = {}
    for way, joins in (("in rows", True), ("in batches", False)):
        monkeypatch.setattr(_engine, "selection", lambda lm, joins=joins: dataclasses.replace(select, joins=joins))
        began = time.process_time()
        result = measure_task(lm, asked, policy=policy)
        found[way] = result, time.process_time() - began
    (ours, seconds), (batches, longer) = found.values()
    texts = [[example.output for example in result.examples] for result in (ours, batches)]
    least = sum(row["most"] for row in rows) / side.BATCH
    calls = [result.record.details["calls"] for result in (ours, batches)]
    with capsys.disabled():
        print(
            f"\n{name}: {len(rows)} answers in {calls[0]} calls, {least:.0f} at least; {calls[1]} in batches; "
            f"processor time {seconds:.1f} / {longer:.1f} s"
        )
    lmeval.record(
        lm,
        "answers in rows",
        calls_ratio=Value(calls[1] / calls[0], "x", higher_is_better=True),
        calls_over_least=Value(calls[0] / least, "x", higher_is_better=False),
        processor_ratio=Value(longer / seconds, "x", higher_is_better=True),
    )
    assert texts[0] == texts[1]
    assert calls[0] < calls[1]
