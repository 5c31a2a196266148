"""Compare answers and cost with lm-evaluation-harness on the same questions.

    LMEVAL_REAL_MODEL=FOLDER LMEVAL_REAL_DATA=MIRROR LMEVAL_VLLM_ENV=ENV pytest benchmarks/test_against_lm_eval.py

One model folder, one set of files, float32 on one thread, batches of 8. The real part asks a real model real rows, prints a
table in Markdown, and asks a vLLM server too where an environment with vLLM is named; the rest needs neither.
"""

import dataclasses
import os
import time
from pathlib import Path

import lm_eval_side as side
import msgspec
import pytest
import torch

from pytest_lmeval import Corpus, Generate, Task, Value, corpus, equivalence, policy_for
from pytest_lmeval.measures._perplexity import measure_perplexity
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.scoring._metrics import LM_EVAL_NAMES
from pytest_lmeval.tasks import find

pytestmark = [pytest.mark.benchmark, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

MADE_UP = {"sst2": 0, "boolq": 0, "hellaswag": 0, "mmlu_abstract_algebra": 5}  # name -> shots
MOST = 1.03  # times the tokens of the distinct prefixes
REAL = {  # name -> shots, name in the table, and how many times less processor time: a little below the aim, for noise
    "hellaswag": (0, "HellaSwag", 1.8),  # 1.9
    "arc_easy": (0, "ARC-Easy", 2.15),  # 2.25
    "piqa": (0, "PIQA", 1.2),  # 1.25
    "mmlu_miscellaneous": (5, "MMLU-like, 5 shots: rows of ARC-Challenge", 5.2),  # 5.5
    "boolq": (0, "BoolQ-like, 12 questions a passage of WikiText", 6.6),  # 7
}
GENERATED, TIMES_LESS = 64, 1.9  # tokens of an answer; the aim is 2
CLOSE = 1e-3  # logits that are no further apart may be chosen either way
HEAD = (  # of the table; all but the last without the audit
    "rows", "tokens, times fewer", "over distinct tokens", "calls, lm_eval / here", "processor time, times less than lm_eval",
    "than vLLM", "peak memory, lm_eval / here, MiB", "audit, of the time",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sides:
    """lm_eval and this package with the same model folder and files, and the certificate of the model."""

    model: Path
    data: Path
    ours: object
    theirs: object
    certificate: object


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    pytest.importorskip("lm_eval")
    import small_suite

    model, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    small_suite.save_model(model)
    small_suite.save_data(data)
    return Sides(model, data, side.load_ours(model), side.load_theirs(model), None)


@pytest.fixture(scope="module")
def table(request):
    """Name -> the other cells of a row; lines below the table under None. Printed as Markdown at the end."""
    notes = {}
    rows = {None: notes}
    yield rows
    lines = [HEAD, ["---"] * len(HEAD), *((name, *cells) for name, cells in rows.items() if name is not None)]
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *(f"| {' | '.join(line)} |" for line in lines), "", *notes.values(), sep="\n")


@pytest.fixture(scope="module")
def real(tmp_path_factory, table):
    pytest.importorskip("lm_eval")
    for name in ("LMEVAL_REAL_MODEL", "LMEVAL_REAL_DATA"):
        if name not in os.environ:
            pytest.skip(f"no {name}")
    import real_rows

    torch.set_num_threads(1)
    model, data = Path(os.environ["LMEVAL_REAL_MODEL"]), tmp_path_factory.mktemp("rows")
    real_rows.save_rows(data, Path(os.environ["LMEVAL_REAL_DATA"]))
    ours, theirs = side.load_ours(model), side.load_theirs(model)
    began = time.process_time()
    certificate = equivalence(ours).certificate
    table[None]["probe"] = f"probe: {time.process_time() - began:.0f} s of processor time, once; {certificate.summary}"
    return Sides(model, data, ours, theirs, certificate)


@pytest.fixture(scope="module")
def server(tmp_path_factory, real):
    """A vLLM server with the model; None without an environment for it."""
    if (env := os.environ.get("LMEVAL_VLLM_ENV")) is None:
        yield None
    else:
        with side.serve(env, real.model, tmp_path_factory.mktemp("server") / "log.txt") as served:
            yield served


def likelihoods(samples):
    return [[likelihood for likelihood, _ in sample["filtered_resps"]] for sample in samples]


def compare(samples, found):
    """The largest difference of a log-likelihood, and how many predictions are the same."""
    pairs = list(zip(likelihoods(samples), (example.loglikelihoods for example in found.examples), strict=True))
    worst = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    return worst, sum(one.index(max(one)) == list(other).index(max(other)) for one, other in pairs)


def check_answers(samples, metrics, found):
    """The same log-likelihoods up to rounding, predictions and metrics; returns the largest difference of a log-likelihood."""
    worst, same = compare(samples, found)
    for one, example in zip(likelihoods(samples), found.examples, strict=True):
        assert one == pytest.approx(list(example.loglikelihoods), abs=1e-4, rel=1e-6)  # a likelihood of -194 is 1.1e-4 off
    assert same == len(samples)
    both = {ours: metrics[key] for theirs, ours in LM_EVAL_NAMES.items() if (key := f"{theirs},none") in metrics}
    both = {name: known for name, known in both.items() if name in found.record.metrics}
    assert both
    assert {name: float(found.record.metrics[name]) for name in both} == pytest.approx(both, abs=1e-12)
    return worst


@pytest.mark.parametrize("name", MADE_UP)
def test_made_up_rows(lmeval, small, name):
    shots = MADE_UP[name]
    built = side.their_task(name, small.data, shots)
    (samples, metrics), theirs = side.ask_theirs(small.theirs, built)
    found, ours = side.ask_ours(small.ours, None, find(name), shots, small.data)
    tokens = found.record.details["tokens_read"]
    over = tokens / side.unique_tokens(small.theirs, built)
    worst = check_answers(samples, metrics, found)
    lmeval.record(
        small.ours,
        f"{name}, {shots}-shot, against lm_eval",
        worst_difference=Value(worst, "nats", n=len(samples), higher_is_better=False),
        tokens_ratio=Value(theirs.tokens / tokens, "x", higher_is_better=True),
        tokens_over_distinct=Value(over, "x", higher_is_better=False),
        calls_ratio=Value(theirs.calls / ours.calls, "x", higher_is_better=True),
    )
    assert over <= MOST


def ratios_of(costs):
    """Processor time of each other side over ours."""
    return {who: cost.seconds / costs["ours"].seconds for who, cost in costs.items() if who != "ours"}


def row_of(costs, fewer, over="", peaks=""):
    """A row of the table."""
    ours, ratios = costs["ours"], {who: f"{ratio:.2f}" for who, ratio in ratios_of(costs).items()}
    calls, audit = f"{costs['theirs'].calls} / {ours.calls}", f"{ours.audits / ours.seconds:.1%}"
    return f"{fewer:.2f}", over, calls, ratios["theirs"], ratios.get("vllm", ""), peaks, audit


def recorded(costs, **values):
    """Values that both comparisons record: ratios of costs, and these."""
    ratios = {f"processor_ratio_{who}": ratio for who, ratio in ratios_of(costs).items()}
    ratios["calls_ratio"] = costs["theirs"].calls / costs["ours"].calls
    return values | {name: Value(ratio, "x", higher_is_better=True) for name, ratio in ratios.items()}


@pytest.mark.parametrize("name", REAL)
def test_real_rows(lmeval, real, server, table, tmp_path, name):
    shots, called, least = REAL[name]
    built, task = side.their_task(name, real.data, shots), find(name)
    turns = side.by_turns(
        theirs=lambda: side.ask_theirs(real.theirs, built),
        ours=lambda: side.ask_ours(real.ours, real.certificate, task, shots, real.data),
        **({} if server is None else {"vllm": lambda: server.ask(built)}),
    )
    costs = {who: cost for who, (_, cost) in turns.items()}
    (samples, metrics), found = turns["theirs"][0], turns["ours"][0]
    (tmp_path / "certificate.json").write_bytes(msgspec.json.encode(real.certificate))
    where = real.model, real.data, name, shots, tmp_path / "certificate.json"
    peaks = {who: side.peak_growth(who, *where) for who in ("theirs", "ours")}

    details, audit = found.record.details, found.record.certificate.audit
    tokens = details["tokens_read"]
    fewer, over = costs["theirs"].tokens / tokens, tokens / side.unique_tokens(real.theirs, built)
    worst, same = compare(samples, found)
    table[called] = row_of(costs, fewer, f"{over:.3f}", " / ".join(f"{peak / 2**20:.0f}" for peak in peaks.values()))
    values = recorded(
        costs,
        worst_difference=Value(worst, "nats", n=len(samples), higher_is_better=False),
        same_predictions=Value(same / len(samples), n=len(samples), higher_is_better=True),
        tokens_ratio=Value(fewer, "x", higher_is_better=True),
        tokens_over_distinct=Value(over, "x", higher_is_better=False),
        padding=Value(details["padding"] / tokens, "tokens/token", higher_is_better=False),
        peak_ratio=Value(peaks["ours"] / peaks["theirs"], "x", higher_is_better=False),
        audit_share=Value(audit.share, higher_is_better=False),
    )
    lmeval.record(real.ours, f"{called}, against lm_eval; {audit}", **values)
    check_answers(samples, metrics, found)
    assert server is None or compare(turns["vllm"][0][0], found)[1] == len(samples)
    assert over <= MOST
    assert peaks["ours"] <= peaks["theirs"]
    assert ratios_of(costs)["theirs"] >= least


def ask_generate_batch(theirs, prompts, stops):
    """The answers of transformers' continuous batching, and what they took. It has no stop texts: answers are cut after it."""
    import transformers

    settings = transformers.GenerationConfig(max_new_tokens=GENERATED, do_sample=False, eos_token_id=theirs.eot_token_id)
    room = transformers.ContinuousBatchingConfig(max_batch_tokens=512, num_blocks=64, max_requests_per_batch=side.BATCH)
    with side.measured(theirs.model) as cost:
        ids = [theirs.tok_encode(prompt) for prompt in prompts]
        found = theirs.model.generate_batch(ids, settings, room)
    texts = [theirs.tok_decode(answer.generated_tokens) for answer in found.values()]
    return [min((text.split(stop)[0] for stop in stops), key=len).strip() for text in texts], cost


def gap(theirs, prompt, one, other):
    """The difference of the two best logits at the first token in which two answers differ."""
    ids, others = (theirs.tok_encode(f"{prompt} {text}") for text in (one, other))
    common = next((index for index, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), len(ids))
    with torch.no_grad():
        best = theirs.model(torch.tensor([ids[:common]])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def test_generated_answers(lmeval, real, server, table):
    """GSM8K, with the same five shots before each question."""
    stops = ["Question:", "</s>", "<|im_end|>"]
    settings = {"until": stops, "do_sample": False, "temperature": 0.0, "max_gen_toks": GENERATED}
    built = side.their_task("gsm8k", real.data, 5, generation_kwargs=settings, fewshot_config={"sampler": "first_n"})
    built.build_all_requests(rank=0, world_size=1)
    prompts = [request.args[0] for request in built.instances]
    task = Task("gsm8k", prompts, lambda prompt: Generate(prompt, ("",), tuple(stops), GENERATED), metrics=("exact_match",))
    turns = side.by_turns(
        theirs=lambda: side.ask_theirs(real.theirs, built),
        ours=lambda: side.ask_ours(real.ours, real.certificate, task),
        generate_batch=lambda: ask_generate_batch(real.theirs, prompts, stops),
        **({} if server is None else {"vllm": lambda: server.ask(built)}),
    )
    costs = {who: cost for who, (_, cost) in turns.items()}
    ours = [example.output for example in turns["ours"][0].examples]
    gaps = {}
    for who in turns.keys() - {"ours"}:
        found = turns[who][0]
        texts = found if who == "generate_batch" else [sample["resps"][0][0].strip() for sample in found[0]]
        different = [three for three in zip(prompts, texts, ours, strict=True) if three[1] != three[2]]
        gaps[who] = [gap(real.theirs, *three) for three in different]

    table["GSM8K, 5 shots, 64 new tokens"] = row_of(costs, costs["theirs"].tokens / costs["ours"].tokens)
    table[None]["generate_batch"] = (
        f"GSM8K by generate_batch of transformers: {ratios_of(costs)['generate_batch']:.2f} times our processor time, in "
        f"{costs['generate_batch'].calls} calls"
    )
    table[None]["gaps"] = "answers that differ from ours, each by the difference of the two best logits: " + "; ".join(
        f"{who} {', '.join(f'{one:.2g}' for one in found) or 'none'}" for who, found in sorted(gaps.items())
    )
    different = Value(len(gaps["theirs"]), n=len(prompts), higher_is_better=False)
    lmeval.record(real.ours, "GSM8K, 5 shots, against lm_eval", **recorded(costs, different_texts=different))
    assert max(gaps["theirs"], default=0.0) <= CLOSE
    assert ratios_of(costs)["theirs"] >= TIMES_LESS


def test_the_first_answers_come_after_one_batch(lmeval, small):
    """Rows read before the first answers; lm_eval reads all rows first, and answers at its end."""
    after = []
    rows = list(find("sst2").rows.read(small.data))
    task = dataclasses.replace(find("sst2"), rows=lambda: (after.append("row") or row for row in rows))
    firsts, policy = [], policy_for(small.ours, batch_size=side.BATCH)
    measure_task(small.ours, task, policy=policy, progress=lambda *_: firsts.append(len(after)))
    lmeval.record(small.ours, "first answers, sst2", rows_read=Value(firsts[0], n=len(rows), higher_is_better=False))
    assert firsts[0] == side.BATCH


def test_rolling_perplexity_is_that_of_lm_eval(lmeval, small):
    """Long documents in the windows of lm_eval: the same sum of log-likelihoods."""
    from types import SimpleNamespace

    documents = [document for document, _ in zip(corpus("stdlib", "test").documents(), range(4), strict=False)]
    expected = small.theirs.loglikelihood_rolling([SimpleNamespace(args=(document.text,)) for document in documents])
    worst = 0.0
    for document, their_sum in zip(documents, expected, strict=True):
        alone = Corpus(document.name, "test", lambda document=document: iter([document]), as_stream=False)
        found = measure_perplexity(small.ours, alone, policy=policy_for(small.ours, window="lm_eval"))
        worst = max(worst, abs(float(found.nll) + their_sum / found.tokens))
    lmeval.record(small.ours, "rolling, against lm_eval", worst_difference=Value(worst, "nats/token", higher_is_better=False))
    assert worst < 1e-4
