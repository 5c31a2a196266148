"""Hold tasks of lm_eval's catalogue, asked here, to lm_eval itself: every request, every answer and every metric.

    pytest benchmarks/test_lm_eval_parity.py

The tasks are those of the installed lm_eval, with their own prompts, filters, functions and metrics; their rows are made here
(`lm_eval_rows`), and so is the model, a Llama of two layers with a trained tokenizer. Both sides read the same mirror. Answers
are at most 12 tokens. Prints a table in Markdown.
"""

import copy
import dataclasses
import logging
import math
from pathlib import Path
from unittest import mock

import lm_eval_side as side
import pytest
import torch
from chat_templates import CHATML
from lm_eval_rows import write_mirror
from probing import certificate
from tokenizers_of_each_kind import tokenizer_of

from pytest_lmeval import as_model, policy_for
from pytest_lmeval._session import Session
from pytest_lmeval.measures._context import VerbContext, running_in
from pytest_lmeval.measures._suite import suite
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.tasks import find
from pytest_lmeval.tasks._task import Setting

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # lm_eval's and those of what it imports
]

SCORED = """
agieval_aqua_rat anli_r1 anli_r2 arc_challenge arc_easy asdiv bbq belebele_deu_Latn belebele_eng_Latn
blimp_anaphor_gender_agreement blimp_causative boolq cb cola commonsense_qa copa copal_id_standard crows_pairs_english
ethics_cm ethics_utilitarianism haerae_history headqa_en hellaswag inverse_scaling_neqa lambada_openai
lambada_openai_cloze_yaml lambada_openai_mt_de lambada_standard logiqa mathqa mc_taco medmcqa mmlu_anatomy mmlu_astronomy
mnli mnli_mismatch mrpc multirc mutual openbookqa paws_de paws_en pile_10k piqa pubmedqa qa4mre_2011 qasper_bool qnli qqp
race record rte sciq sglue_rte simple_cooccurrence_bias social_iqa sst2 storycloze_2016 swag toxigen truthfulqa_mc1
truthfulqa_mc2 webqs wic wikitext winogender_all winogender_female winogrande wmdp_bio wnli wsc wsc273 xcopa_et xcopa_it
xnli_de xnli_en xstorycloze_en xwinograd_en
""".split()  # noqa: SIM905
ANSWERED = """
agieval_math aime anagrams1 arc_challenge_chat babi bbh_cot_zeroshot_boolean_expressions bbh_zeroshot_boolean_expressions
bbh_zeroshot_navigate bbq_generate coqa drop eq_bench fda gsm8k gsm8k_cot gsm8k_cot_self_consistency gsm8k_cot_zeroshot
gsm_plus hendrycks_math_algebra kmmlu_direct_accounting logieval mgsm_direct_de mgsm_en_cot_de mlqa_en_en
mmlu_anatomy_generative nq_open qasper_freeform reversed_words squad_completion super_glue-cb-t5-prompt
super_glue-copa-t5-prompt super_glue-wsc-t5-prompt swde triviaqa truthfulqa_gen tydiqa_goldp_en wmt14-en-fr
""".split()  # noqa: SIM905
RIGHT = {  # where the target that a row tells is no right answer, or one that needs no filter to be found
    "babi": " {}",
    "bbh_zeroshot_boolean_expressions": "It is {} then",
    "bbh_zeroshot_navigate": "It is {} then",
    "drop": "the function",
    "gsm8k": "{} in all",
    "gsm_plus": "{} in all",
    "logieval": "{}) it is",
    "mgsm_direct_de": "{} in all",
    "mmlu_anatomy_generative": " {}\n it is",
    "eq_bench": "Joy: 3 Fear: 1 Hope: 5 Rage: 0",
    "gsm8k_cot_self_consistency": "The answer is 7",
    "truthfulqa_gen": "the function.",
}
SHOTS = {"arc_easy": 2, "boolq": 1, "belebele_eng_Latn": 2, "mmlu_anatomy": 2, "triviaqa": 2, "winogrande": 1}
CHAT = [
    "arc_challenge_chat",
    "arc_easy",
    "bbh_zeroshot_navigate",
    "gsm8k",
    "hellaswag",
    "mgsm_direct_de",
    "mmlu_anatomy_generative",
]
GROUPS = ["haerae", "hendrycks_math", "pawsx", "wmdp"]
SHORT = {"max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
OF_TRANSFORMERS_4 = {"coqa", "record"}  # lm_eval's functions import what transformers 5 no longer has
CONTEXT = 1024
SYSTEM = "You answer briefly."
NATS = 1e-4  # between the log-likelihoods of a request
NATS_OF_A_TOKEN = 1e-6
"""Of a whole text with more than 100 tokens: float32 rounds each token's nats and, in lm_eval, their sum. In float64 both sides
agree to 1e-9 whatever the length (`tests/test_catalogue_parity.py`)."""
HEAD = ("task", "folder", "kind", "requests", "largest difference of a request", "of a metric")


@dataclasses.dataclass(frozen=True)
class Sides:
    """A model here and the same one in lm_eval, and the mirror that both read."""

    lm: object
    theirs: object
    mirror: Path


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'pytest-lmeval[lm-eval]'")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    mirror = tmp_path_factory.mktemp("mirror")
    write_mirror(mirror)
    tokenizer = copy.deepcopy(tokenizer_of("gpt2").tokenizer)
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, initializer_range=0.3,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    theirs = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=4, max_length=CONTEXT)
    return Sides(as_model(module, tokenizer=tokenizer, spec="tiny"), theirs, mirror)


@pytest.fixture(scope="module")
def table(request):
    """The rows of the table, which is printed at the end."""
    rows = []
    yield rows
    tasks = {row[0].partition(",")[0] for row in rows if row[2] != "group"}
    folders = {row[1] for row in rows}
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *(f"| {' | '.join(map(str, line))} |" for line in lines), sep="\n")
        print(f"\n{len(tasks)} tasks of {len(folders)} folders, asked in {len(rows)} ways")


def asked_here(monkeypatch, right=False):
    """(task, number of the document) -> the question asked here and its results; answers are short, or the `right` ones."""
    from pytest_lmeval.lm_eval import _task

    made, question_of, found = _task._made, _task._question, {}

    def short(*arguments):
        source = made(*arguments)
        if source.OUTPUT_TYPE == "generate_until":
            source.set_config(key="generation_kwargs", value=SHORT, update=True)
        return source

    def recorded(source, number, document, shots, setting):
        question = question_of(source, number, document, shots, setting)

        def score(results):
            if right:
                answer = RIGHT.get(source.task_name, "{}").replace("{}", question.target)
                results = results | {"generated": [answer] * len(question.generated)}
            found[source.task_name, number] = question, results
            return question.score(results)

        return dataclasses.replace(question, score=score)

    monkeypatch.setattr(_task, "_made", short)
    monkeypatch.setattr(_task, "_question", recorded)
    return found


def ask_theirs(sides, name, **options):
    """lm_eval's results of a task or a group."""
    import lm_eval

    from pytest_lmeval.lm_eval._mirror import mirrored

    logging.disable(logging.WARNING)
    try:
        with mirrored(sides.mirror), mock.patch("lm_eval.evaluator.add_env_info"):  # asks other programs for seconds
            return lm_eval.simple_evaluate(
                sides.theirs, tasks=[name], task_manager=side.task_manager(), bootstrap_iters=0, log_samples=True,
                gen_kwargs=dict(SHORT), **options,
            )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


def numbers(results):
    """lm_eval's numbers by our names."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if isinstance(value, float | int) and name not in ("sample_len", "sample_count") and "stderr" not in name
    }


def compare_requests(ours, task, samples, tokenizer):
    """The kind of a task's requests, their number, and their largest difference."""
    documents = {sample["doc_id"]: sample for sample in samples}  # once for each filter
    assert {number for name, number in ours if name == task} == set(documents)
    kinds, count, largest = set(), 0, 0.0
    for number, sample in documents.items():
        question, results = ours[task, number]
        (kind,) = (kind for kind, values in results.items() if values)
        kinds.add(kind)
        arguments = [tuple(one) for one in sample["arguments"]]
        count += len(arguments)
        if kind == "generated":
            assert [one.prompt for one in question.generated] == [prompt for prompt, _ in arguments]
            for text, answers in zip(results[kind], sample["resps"], strict=True):
                assert {whole(answer) for answer in answers} == {whole(text)}
            continue
        asked = {"scored": list(question.scored), "rolling": [(text,) for text in question.rolling]}[kind]
        assert asked == arguments
        for argument, value, (answer,) in zip(asked, results[kind], sample["resps"], strict=True):
            nats, wanted = (value[0], answer[0]) if kind == "scored" else (value, answer)
            tokens = len(tokenizer.encode(argument[0])[0]) if kind == "rolling" else 0
            assert nats == pytest.approx(wanted, abs=max(NATS, NATS_OF_A_TOKEN * tokens), rel=0)
            assert kind == "rolling" or value[1] == answer[1]
            largest = max(largest, abs(nats - wanted))
    return " ".join(kinds), count, largest


def whole(text):
    """The text of an answer without half a character at its end."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def compare_metrics(found, wanted):
    """The largest relative difference of two sets of metrics with the same names; where lm_eval has NaN, there is no value."""
    wanted = {name: value for name, value in wanted.items() if not math.isnan(value)}
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    return max(abs(found[name] - value) / max(abs(value), 1e-9) for name, value in wanted.items())


def folder_of(name):
    """The folder of the catalogue that a task lies in."""
    import lm_eval.tasks

    return side.task_manager().task_index[name].yaml_path.relative_to(Path(lm_eval.tasks.__file__).parent).parts[0]


def compare(sides, monkeypatch, table, name, chat=False, shots=None, right=False):
    if name in OF_TRANSFORMERS_4:
        pytest.importorskip("transformers.data.metrics.squad_metrics")
    ours, system = asked_here(monkeypatch, right), SYSTEM if chat else None
    task = find(f"lm_eval:{name}").prepare(Setting(sides.lm, shots, data_dir=sides.mirror, in_turns=chat, system=system))
    record = measure_task(
        sides.lm, task, policy=policy_for(sides.lm, certificate(), batch_size=4), chat=chat, system=system
    ).record
    if right:
        answers = {question.prompt: results["generated"][0] for question, results in ours.values()}
        monkeypatch.setattr(sides.theirs, "generate_until", lambda asked, **_: [answers[one.args[0]] for one in asked])
    turns = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": SYSTEM} if chat else {}
    wanted = ask_theirs(sides, name, num_fewshot=shots, **turns)
    kind, count, largest = compare_requests(ours, name, wanted["samples"][name], sides.lm.tokenizer)
    found = {metric: float(value) for metric, value in record.metrics.items() if metric != "cut_off"}
    of_metrics = compare_metrics(found, numbers(wanted["results"][name]))
    assert not right or any(found.values()), "no metric sees a right answer, so their agreement says nothing"
    asked = f"{name}{', chat' if chat else ''}{f', {shots}-shot' if shots else ''}{', right answers' if right else ''}"
    table.append((asked, folder_of(name), kind, count, f"{largest:.1g}", f"{of_metrics:.1g}"))


@pytest.mark.parametrize("name", SCORED + ANSWERED)
def test_a_task_is_asked_and_scored_as_by_lm_eval(sides, monkeypatch, table, name):
    compare(sides, monkeypatch, table, name)


@pytest.mark.parametrize("name", ANSWERED)
def test_right_answers_are_scored_as_by_lm_eval(sides, monkeypatch, table, name):
    """A model that is not trained gives none, and where all scores are 0 they are equal too easily."""
    compare(sides, monkeypatch, table, name, right=True)


@pytest.mark.parametrize("name", SHOTS)
def test_with_examples(sides, monkeypatch, table, name):
    compare(sides, monkeypatch, table, name, shots=SHOTS[name])


@pytest.mark.parametrize("name", CHAT)
def test_in_a_chat(sides, monkeypatch, table, name):
    compare(sides, monkeypatch, table, name, chat=True)


@pytest.mark.parametrize("name", ["arc_easy", "triviaqa"])
def test_in_a_chat_with_examples(sides, monkeypatch, table, name):
    compare(sides, monkeypatch, table, name, chat=True, shots=2)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_has_the_averages_of_lm_eval(sides, monkeypatch, table, name):
    ours = asked_here(monkeypatch)
    with running_in(VerbContext(Session(mirror=str(sides.mirror), chat=False, budget=1))):
        result = suite(sides.lm, f"lm_eval:{name}")
    wanted = ask_theirs(sides, name)
    for task, samples in wanted["samples"].items():
        _, count, largest = compare_requests(ours, task, samples, sides.lm.tokenizer)
        table.append((task, folder_of(task), f"of {name}", count, f"{largest:.1g}", ""))
    averages = numbers(wanted["groups"][name])
    found = {metric: float(result.record.metrics[metric]) for metric in averages}
    table.append((name, folder_of(name), "group", "", "", f"{compare_metrics(found, averages):.1g}"))
