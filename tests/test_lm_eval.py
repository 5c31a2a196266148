"""Tasks of lm_eval asked here give lm_eval's own numbers, and its command line can ask a model here."""

import copy
import importlib.metadata
import json
import logging
import math
import sys
import textwrap
import warnings
from unittest import mock

import pytest
import torch
from msgspec import structs
from probing import certificate
from tokenizers_of_each_kind import tokenizer_of

from pytest_lmeval import as_model, policy_for
from pytest_lmeval.errors import ArgumentError, CorpusError, TaskError
from pytest_lmeval.gates._scores import scores_of
from pytest_lmeval.measures._context import VerbContext, running_in
from pytest_lmeval.measures._suite import suite
from pytest_lmeval.measures._task import measure_task
from pytest_lmeval.tasks import find, find_suite
from pytest_lmeval.tasks._task import Setting

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages
    lm_eval = pytest.importorskip("lm_eval", reason="it is asked beside us: pip install 'pytest-lmeval[lm-eval]'")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="lm_eval's own model of transformers needs it")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's and those of what it imports

WORDS = ["the state", "a token", "of the file", "the function", "returns a list", "in Python", "an error", "the module"]
ROWS = [
    {
        "question": f"What is {word} number {number}?",
        "choices": [f"{word} one", "two", f"the {number}rd of {word}"],
        "label": number % 3,
        "text": " ".join(WORDS[: number + 1]),
        "long": f"{word} " + " ".join(WORDS[number:]) * (1 + 2 * number),
    }
    for number, word in enumerate(WORDS)
]
UTILS = """
def process_docs(dataset):
    return dataset.map(lambda row: {"question": row["question"].upper()})

def process_results(doc, results):
    (nats, greedy), = results
    return {"surprise": -nats, "weighted": (nats, len(doc["text"])), "first": [doc["label"], nats]}

def ratio(items):
    return sum(nats for nats, _ in items) / sum(length for _, length in items)

def most(items):
    return max(nats for _, nats in items)

def fails(doc, results):
    if doc["label"] == 2:
        raise ZeroDivisionError("row of label 2")
    return {"acc": 1.0}

def broken(dataset):
    return 1 / 0

def praise(doc, results):
    return "very good"

def marks(doc, results):
    return {"acc": "good"}

def some(doc, results):
    return {"seen": 1.0, "average": float("nan"), "unseen": (float("nan"), len(results))}

def nowhere(items):
    return sum(value for value, _ in items) / len(items)

def surprises(doc, results):
    return {"surprise": -results[0][0], "largest": -results[0][0]}

def largest(items):
    return max(items)

def few(doc):
    if "number 3" in doc["question"]:
        raise ValueError("only 3")
    return doc["choices"]
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: label
doc_to_choice: choices
"""
MEAN = "aggregation: mean, higher_is_better: true"
TASKS = {
    "choices": CHOICES
    + "metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}, {metric: mcc}, {metric: brier_score}]",
    "shots": CHOICES + "num_fewshot: 2\nfewshot_split: test\nmetric_list: [{metric: acc}]",
    "mutual": CHOICES + "metric_list: [{metric: acc}, {metric: acc_mutual_info}]",
    "inputs": """
output_type: multiple_choice
doc_to_text: label
doc_to_target: " is right."
doc_to_choice: choices
metric_list: [{metric: acc}]
""",
    "docs": CHOICES.replace("test_split", "x") + "process_docs: !function utils.process_docs\nmetric_list: [{metric: acc}]",
    "own": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
process_results: !function utils.process_results
metric_list:
  - {metric: surprise, aggregation: mean, higher_is_better: false}
  - {metric: weighted, aggregation: !function utils.ratio, higher_is_better: true}
  - {metric: first, aggregation: !function utils.most, higher_is_better: true}
""",
    "surprises": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
process_results: !function utils.surprises
metric_list:
  - {metric: surprise, aggregation: mean, higher_is_better: false}
  - {metric: largest, aggregation: !function utils.largest, higher_is_better: false}
""",
    "cloze": """
output_type: loglikelihood
doc_to_text: "{{question}} "
doc_to_target: "{{text}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{text}}"
generation_kwargs: {until: [".", "?"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}, {metric: bleu}]
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]
  - name: flexible
    filter: [{function: lowercase}, {function: take_first}]
""",
    "repeated": """
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{text}}"
repeats: 3
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list: [{name: vote, filter: [{function: majority_vote}, {function: take_first}]}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A YAML file for each task, their rows, and their functions."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "utils.py").write_text(UTILS)
    for name, yaml in TASKS.items():
        written(folder, name, yaml)
    return folder


def data_of(file, indent=""):
    lines = ["dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {file}}}}}", "test_split: test"]
    return "".join(f"{indent}{line}\n" for line in lines)


def written(folder, name, yaml):
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{data_of(folder / 'rows.jsonl')}{textwrap.dedent(yaml)}")
    return f"lm_eval:{folder / name}.yaml"


@pytest.fixture(scope="module")
def hf():
    """A model of transformers with a context of 64 tokens, and its tokenizer."""
    tokenizer = tokenizer_of("gpt2").tokenizer
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def lm(hf):
    return as_model(hf[0], tokenizer=hf[1], spec="tiny")


@pytest.fixture(scope="module")
def theirs(hf):
    """(name of a file) -> lm_eval's results of its own model."""
    harness = HFLM(pretrained=hf[0], tokenizer=hf[1], batch_size=4, max_length=64)

    def ask(path, model=harness, **options):
        manager = TaskManager(include_defaults=False, include_path=str(path.parent))
        logging.disable(logging.WARNING)
        try:
            with mock.patch("lm_eval.evaluator.add_env_info"):  # asks other programs for seconds
                return lm_eval.simple_evaluate(
                    model, tasks=[path.stem], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
                )
        finally:
            logging.disable(logging.NOTSET)

    return ask


def ours(lm, name, **options):
    task = find(name).prepare(Setting(lm, **options))
    return measure_task(lm, task, policy=policy_for(lm, certificate(), batch_size=4))


def numbers(results):
    """lm_eval's numbers by our names."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if isinstance(value, float | int) and name != "sample_len" and "stderr" not in name
    }


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_is_that_of_lm_eval(name, folder, lm, theirs):
    found, wanted = ours(lm, f"lm_eval:{folder / name}.yaml"), theirs(folder / f"{name}.yaml")
    assert {metric: float(value) for metric, value in found.record.metrics.items() if metric != "cut_off"} == pytest.approx(
        numbers(wanted["results"][name]), rel=1e-4
    )
    (samples,) = wanted["samples"].values()
    for example, sample in zip(found.examples, samples, strict=False):
        if example.loglikelihoods:
            assert example.loglikelihoods == pytest.approx([nats for ((nats, _),) in sample["resps"]], abs=1e-4)
        elif isinstance(sample["resps"][0][0], str):
            assert example.output == sample["resps"][0][0].strip().removesuffix("\N{REPLACEMENT CHARACTER}")  # half a character


def test_numbers_have_intervals_and_means_of_right_answers_are_proportions(folder, lm):
    record = ours(lm, f"lm_eval:{folder / 'choices'}.yaml").record
    assert all(value.low <= value <= value.high for value in record.metrics.values())
    assert record.metrics["acc"].high < 1.0
    assert (record.subject, record.settings["style"]) == ("lm_eval:choices, 0-shot", "lm_eval")


def test_right_choices_are_known_to_the_reader_of_the_examples(folder, lm):
    examples = ours(lm, f"lm_eval:{folder / 'choices'}.yaml").examples
    assert [example.right for example in examples] == [(row["label"],) for row in ROWS]


def test_each_filter_has_its_numbers(folder, lm):
    metrics = ours(lm, f"lm_eval:{folder / 'answers'}.yaml").record.metrics
    assert {"exact_match,strict", "exact_match,flexible", "bleu,strict", "bleu,flexible", "cut_off"} == set(metrics)
    assert all(value.n == len(ROWS) for value in metrics.values())


def test_a_metric_that_is_about_none_of_the_rows_has_no_value(folder, lm, theirs):
    metrics = [
        f"{{metric: seen, {MEAN}}}",
        f"{{metric: average, {MEAN}}}",
        "{metric: unseen, aggregation: !function utils.nowhere}",
    ]
    yaml = f"{CHOICES}process_results: !function utils.some\nmetric_list: [{', '.join(metrics)}]"
    found = ours(lm, written(folder, "some", yaml)).record.metrics
    wanted = numbers(theirs(folder / "some.yaml")["results"]["some"])
    assert {name for name, value in wanted.items() if math.isnan(value)} == {"average", "unseen"}
    assert found["seen"] == wanted["seen"] == 1.0
    assert not {"average", "unseen"} & set(found)


def test_a_limit_and_shots_are_those_of_lm_eval(folder, lm, theirs):
    found = ours(lm, f"lm_eval:{folder / 'shots'}.yaml", shots=1, limit=3)
    wanted = theirs(folder / "shots.yaml", num_fewshot=1, limit=3)["samples"]["shots"]
    assert [example.prompt for example in found.examples] == [sample["arguments"][0][0] for sample in wanted]
    assert found.record.subject == "lm_eval:shots, 1-shot"


@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_too_few_rows_beside_the_asked_one_are_told_with_the_row_and_what_to_do(folder, lm, sampler):
    """lm_eval draws one row more than it shows, since the asked one may be among them."""
    name = written(folder, f"few_{sampler}", TASKS["shots"] + f"\nfewshot_config: {{sampler: {sampler}}}")
    most = len(ROWS) - 1
    assert ours(lm, name, shots=most, limit=1).examples[0].prompt.count("Question:") == len(ROWS)
    with pytest.raises(
        TaskError,
        match=rf"lm_eval:few_{sampler}, row 0: it is to be shown {len(ROWS)} examples, .* {len(ROWS)} rows "
        rf"of the split 'test', which are asked themselves: {most} are left beside it\. Ask with at most {most} shots",
    ):
        ours(lm, name, shots=len(ROWS))


def test_a_group_has_the_averages_that_it_declares_over_tasks_of_different_size(folder, lm, theirs, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    base = textwrap.indent(textwrap.dedent(CHOICES).strip(), "    ")
    members = "".join(
        f"  - task: {name}\n{data_of(file, '    ')}{base}\n    metric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n"
        for name, file in (("many", folder / "rows.jsonl"), ("few", few))
    )
    averages = (
        "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n  - {metric: acc_norm, weight_by_size: false}\n"
    )
    file = tmp_path / "both.yaml"
    file.write_text(f"group: both\n{averages}task:\n{members}")
    with running_in(VerbContext()):
        result = suite(lm, f"lm_eval:{file}")
    wanted = numbers(theirs(file)["results"]["both"])
    found = {name: float(result.record.metrics[name]) for name in ("acc", "acc_norm")}
    assert found == pytest.approx({name: wanted[name] for name in found})
    assert [str(task) for task in find_suite(f"lm_eval:{file}").tasks] == ["lm_eval:both::many", "lm_eval:both::few"]


@pytest.mark.parametrize("name", ["choices", "rolling", "repeated", "own"])
def test_lm_eval_asks_a_model_here_and_finds_the_same(name, folder, lm, theirs):
    from pytest_lmeval.lm_eval._model import LmevalModel

    model = LmevalModel.of(lm, policy_for(lm, certificate(), batch_size=4))
    found, wanted = (theirs(folder / f"{name}.yaml", *asked)["results"][name] for asked in ((model,), ()))
    assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-4)
    assert model.get_model_info()["tokens_read"] > 0


def test_its_command_line_asks_a_model_by_our_name(folder, tmp_path, capsys, monkeypatch):
    from pytest_lmeval.__main__ import main

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks other programs for seconds
    monkeypatch.setattr("lm_eval.tasks._index.TaskIndex._iter_yaml_files", lambda root: ())  # 14,000 files

    arguments = [
        "--model",
        "pytest-lmeval",
        "--model_args",
        "pretrained=demo,budget=1",
        "--tasks",
        str(folder / "docs.yaml"),
    ]
    assert main(["lm-eval", "run", *arguments, "--limit", "3", "--output_path", str(tmp_path), "--log_samples"]) == 0
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["verdict"] == "exact-any-chunk"
    assert len(list(tmp_path.rglob("samples_*.jsonl"))) == 1
    assert "|docs" in capsys.readouterr().out


def test_a_loader_of_entry_points_finds_the_model_and_makes_it_of_its_arguments():
    """As lm_eval does from the version after 0.4.13 on, with the device that it asks for on every machine."""
    (point,) = importlib.metadata.entry_points(group="lm_eval.models", name="pytest-lmeval")
    asked = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    model = point.load().create_from_arg_string("pretrained=zoo:lstm,budget=1,profile=ci", asked)
    assert (model.model.spec, model.get_model_info()["verdict"]) == ("zoo:lstm", "exact-any-chunk")
    with pytest.raises(
        ArgumentError, match="known are pretrained, dtype, enable_thinking, chat_template_args, profile and budget"
    ):
        point.load().create_from_arg_string("pretrained=zoo:lstm,temperature=1", asked)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        (CHOICES + "doc_to_image: image", "shows pictures or plays sounds, and tiny reads text"),
        (CHOICES + "unsafe_code: true", "--lmeval-trust-remote-code lm_eval:bad"),
        (CHOICES.replace("{{question}}", "{{question | nothing}}"), "cannot be loaded .*nothing.*made it of its files"),
        (CHOICES + "metric_list: [{metric: no_such_metric}]", "cannot be loaded .*no_such_metric.*Mend what the message names"),
        (CHOICES + "process_docs: !function utils.no_such", "no_such"),
        (CHOICES + "process_docs: !function utils.broken", r"ZeroDivisionError: .* at .*utils.py, line \d+\)"),
        (CHOICES + f"process_results: !function utils.praise\nmetric_list: [{{metric: acc, {MEAN}}}]",
         r"row 0 \(.*\) was answered, .* returned 'very good', of type str: it is a dict by metric"),
        (CHOICES + f"process_results: !function utils.marks\nmetric_list: [{{metric: acc, {MEAN}}}]",
         r"row 0 \(.*\) was answered, .* returned 'good' as acc, which is averaged: it is a number"),
        (CHOICES.replace("doc_to_choice: choices", "doc_to_choice: !function utils.few"), "row 3 cannot be asked: .*only 3"),
        (CHOICES + f"process_results: !function utils.fails\nmetric_list: [{{metric: acc, {MEAN}}}]",
         r"row 2 \(.*\) was answered, and its filters or its scores failed with ZeroDivisionError: row of label 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_told_with_its_task_and_row(yaml, says, folder, lm):
    with pytest.raises(TaskError, match=f"(?s)lm_eval:bad.*{says}"):
        ours(lm, written(folder, "bad", yaml))


def test_only_what_its_data_lack_sends_the_reader_to_a_mirror(folder, lm, tmp_path):
    yaml = CHOICES + "metric_list: [{metric: acc}]"
    file = tmp_path / "gone.yaml"
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test"
    file.write_text(f"task: gone\n{data}\n{textwrap.dedent(yaml)}")
    with pytest.raises(TaskError, match=r"lm_eval:gone cannot be loaded .*gone.jsonl.*point --lmeval-data at a mirror"):
        ours(lm, f"lm_eval:{file}")
    with pytest.raises(TaskError) as broken:
        ours(lm, written(folder, "broken", CHOICES + "process_docs: !function utils.broken"))
    assert "--lmeval-data" not in str(broken.value)
    file.write_text("a: [b\n")
    with pytest.raises(TaskError, match=r"gone.yaml, line \d is no task of lm_eval"):
        find(f"lm_eval:{file}")


def test_data_come_from_a_mirror_or_the_task_says_that_they_are_missing(folder, lm, tmp_path):
    yaml = CHOICES + "metric_list: [{metric: acc}]"
    file = tmp_path / "far.yaml"
    file.write_text(f"task: far\ndataset_path: someone/rows\ndataset_name: main\ntest_split: test\n{textwrap.dedent(yaml)}")
    with pytest.raises(TaskError, match=r"lm_eval:far: the local mirror .* does not hold someone/rows"):
        ours(lm, f"lm_eval:{file}", data_dir=tmp_path)
    mirror = tmp_path / "someone" / "rows" / "main"
    mirror.mkdir(parents=True)
    (mirror / "test.jsonl").write_text((folder / "rows.jsonl").read_text())
    assert ours(lm, f"lm_eval:{file}", data_dir=tmp_path).record.details["questions"] == len(ROWS)


ROW = {"context": "Q: 1 + 1\nA:", "completion": " 2"}
FILES = [  # task of the catalogue -> files of its repositories, where they lie there
    ("arithmetic_2da", {"EleutherAI/arithmetic/data/two_digit_addition.jsonl": json.dumps(ROW) + "\n"}),
    ("prost", {"corypaik/prost/data/default.jsonl": json.dumps(
        {"context": "A ball.", "ex_question": "Rolls?", "label": 0, **dict(zip("ABCD", ("yes", "no", "so", "hm"), strict=True))}
    ) + "\n"}),
    ("mmlusr_question_only_virology", {
        f"NiniCat/MMLU-SR/question_only_{split}/question_only_virology_{split}.csv": "Is it?,a,b,c,d,B\n" * 2
        for split in ("dev", "test")
    }),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files"), FILES)
def test_files_that_a_task_names_lie_in_the_mirror_as_in_their_repository(lm, tmp_path, monkeypatch, name, files):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(
        TaskError, match=rf"lm_eval:{name}: the local mirror .* does not hold .*{next(iter(files))} is not there"
    ):
        ours(lm, f"lm_eval:{name}", data_dir=tmp_path)
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    found = ours(lm, f"lm_eval:{name}", data_dir=tmp_path)
    assert found.record.details["questions"] == list(files.values())[-1].count("\n")
    assert found.examples[0].prompt


@pytest.mark.parametrize(
    ("path", "named", "place"),
    [
        ("json", "hf://datasets/a/b@main/c/d.jsonl", "a/b/c/d.jsonl"),
        ("json", "https://huggingface.co/datasets/a/b/resolve/main/c/d.jsonl", "a/b/c/d.jsonl"),
        ("csv", "https://example.org/c/d.csv?download=1", "example.org/c/d.csv"),
        ("a/b", "c/d.json.gz", "a/b/c/d.json.gz"),
        ("a/b", ["c/*.csv"], ["a/b/c/*.csv"]),
        ("a/b", {"test": "x.csv"}, {"test": "a/b/x.csv"}),
        ("json", "here.jsonl", None),
        ("a/b", "/on/this/machine.csv", None),
    ],
)
def test_each_way_to_name_a_file_has_one_place(tmp_path, path, named, place):
    from pytest_lmeval.lm_eval._mirror import _places

    if place is None:
        assert _places(tmp_path, path, named) == named
        return
    with pytest.raises(CorpusError, match="is not there"):
        _places(tmp_path, path, named)
    for file in ("a/b/c/d.jsonl", "example.org/c/d.csv", "a/b/c/d.json.gz", "a/b/x.csv", "a/b/c/e.csv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert json.loads(json.dumps(_places(tmp_path, path, named)).replace(f"{tmp_path}/", "")) == place


def test_a_name_that_is_nearly_right_is_named():
    with pytest.raises(TaskError, match=r"no task, group or tag 'arc_esy'.*Did you mean arc_easy\?"):
        find("lm_eval:arc_esy")
    assert len(find_suite("lm_eval:mmlu").tasks) == 57


def test_the_catalogue_is_listed(capsys):
    from pytest_lmeval.__main__ import main

    assert main(["list", "tasks", "lm_eval:arc_ea*"]) == 0
    assert capsys.readouterr().out.splitlines() == ["lm_eval:arc_easy  a task"]


def test_without_lm_eval_its_names_say_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TaskError, match=r"pip install 'pytest-lmeval\[lm-eval\]'"):
        find("lm_eval:gsm8k")


def test_the_code_of_a_task_is_named_before_it_runs(folder, lm):
    said = []
    ours(lm, f"lm_eval:{folder / 'own'}.yaml", say=said.append)
    assert len(said) == 1
    assert "lm_eval:own runs code of its own" in said[0]
    assert "process_results" in said[0]


def test_the_code_of_the_catalogue_is_named_without_loading_it():
    from pathlib import Path

    import lm_eval.tasks

    from pytest_lmeval.lm_eval._code import code_of

    root = Path(lm_eval.tasks.__file__).parent
    loaded = set(sys.modules)
    assert code_of(root / "hellaswag/hellaswag.yaml") == (("hellaswag/utils.process_docs",), False)
    humaneval = code_of(root / "humaneval/humaneval.yaml")
    assert set(humaneval.functions) == {"humaneval/utils.pass_at_k", "humaneval/utils.build_predictions"}  # a metric, a filter
    assert humaneval.unsafe
    assert code_of(root / "arc/arc_easy.yaml") == ((), False)
    assert code_of(root / "no such.yaml") == ((), False)
    assert not [name for name in set(sys.modules) - loaded if "utils" in name]


def test_code_is_named_before_a_module_of_a_task_is_loaded(tmp_path, lm):
    """Its module writes a file when it is loaded."""
    (tmp_path / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef process_docs(docs): return docs\n")
    (tmp_path / "loads.yaml").write_text("task: loads\ndataset_path: json\nprocess_docs: !function utils.process_docs\n")
    seen = []
    with pytest.raises(TaskError):  # it has no data
        ours(lm, f"lm_eval:{tmp_path / 'loads'}.yaml", say=lambda text: seen.append((text, (tmp_path / "ran").exists())))
    ((text, ran),) = seen
    assert f"{tmp_path.name}/utils.process_docs" in text
    assert not ran
    assert (tmp_path / "ran").exists()


def test_where_windows_hold_the_same_tokens_lm_eval_counts_the_targets_of_another_one(hf):
    """The last window of a text begins earlier than its first target. lm_eval keeps logits by their tokens, and hands them out
    to a window with another first target: its sum depends on what else is asked. Ours is that of the text alone."""
    from lm_eval.api.instance import Instance

    texts = [" ".join(WORDS) * (1 + 2 * number) for number in range(8)]
    harness = HFLM(pretrained=hf[0], tokenizer=hf[1], batch_size=4, max_length=64)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    together = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    alone = [harness.loglikelihood_rolling([one], disable_tqdm=True)[0] for one in requests]
    assert together != pytest.approx(alone, rel=1e-4)

    from pytest_lmeval.lm_eval._model import LmevalModel

    lm = as_model(hf[0], tokenizer=hf[1])
    assert LmevalModel.of(lm, policy_for(lm, certificate())).loglikelihood_rolling(requests) == pytest.approx(alone, rel=1e-5)


def test_options_of_a_chat_template_are_those_of_lm_evals_own_model_and_a_name_chooses_the_template(hf):
    from chat_templates import with_template

    from pytest_lmeval.lm_eval._model import LmevalModel
    from pytest_lmeval.models._chat import with_template_kwargs

    tokenizer = with_template("several").tokenizer
    lm, turns = as_model(hf[0], tokenizer=tokenizer), [{"role": "user", "content": "Is it?"}]
    for kwargs in ({"enable_thinking": False}, {"chat_template": "tool_use", "enable_thinking": False}):
        harness = HFLM(pretrained=hf[0], tokenizer=tokenizer, max_length=64, chat_template_args=kwargs)
        model = LmevalModel.of(with_template_kwargs(lm, kwargs), policy_for(lm, certificate()))
        assert model.apply_chat_template(turns) == harness.apply_chat_template(turns)
    harness, model = (
        HFLM(pretrained=hf[0], tokenizer=tokenizer, max_length=64),
        LmevalModel.of(lm, policy_for(lm, certificate())),
    )
    model._read_as(with_template_kwargs(lm, {"enable_thinking": False}), model.policy)
    assert model.chat_template("tool_use") == harness.chat_template("tool_use") == tokenizer.chat_template["tool_use"]
    assert model.apply_chat_template(turns).endswith("</think>\n\n")
    assert "think" not in harness.apply_chat_template(turns)  # it tells the name, and renders by the default


def test_a_rolling_text_longer_than_the_context_is_read_in_windows_that_count_each_token_once(lm):
    from pytest_lmeval.scoring._lm_eval_requests import LmEvalEncoder

    encoder = LmEvalEncoder(lm)
    for length in (5, 64, 65, 128, 150):
        text = "ab" * length
        requests = encoder._windows(text, "here")
        assert sum(request.asked for request in requests) == len(lm.tokenizer.encode(text)[0])
        assert all(len(request.ids) <= lm.limit + 1 for request in requests)
    assert math.isfinite(lm.limit)


def test_examples_are_read_back_and_gated_where_a_metric_is_a_mean_of_them(folder, lm, tmp_path):
    """A statistic is no mean: nothing adds up the numbers of its rows, though they are floats."""
    task = find(f"lm_eval:{folder / 'surprises'}.yaml").prepare(Setting(lm))
    result = measure_task(lm, task, policy=policy_for(lm, certificate(), batch_size=4), examples=tmp_path / "e.jsonl")
    assert {"surprise", "largest"} <= set(result.record.metrics)
    assert result.record.details["scored"] == {"surprise": False}
    scores = scores_of(structs.replace(result.record, examples="e.jsonl"), tmp_path)
    assert set(scores.columns) == {"surprise"}
    assert len(scores.ids) == len(ROWS)


def drawn_by_transformers(hf, options):
    """{name of a limit: value} by which lm_eval's own model draws; None where it takes the likeliest token."""
    from lm_eval.api.instance import Instance
    from transformers.generation import utils

    seen, sample = [], utils.GenerationMixin._sample

    def spy(self, *given, generation_config, logits_processor, **others):
        limits = {name: getattr(one, name) for one in logits_processor for name in DRAWN if hasattr(one, name)}
        seen.append(limits if generation_config.do_sample else None)
        return sample(self, *given, generation_config=generation_config, logits_processor=logits_processor, **others)

    harness = HFLM(pretrained=hf[0], tokenizer=hf[1], max_length=64)
    with mock.patch.object(utils.GenerationMixin, "_sample", spy):
        harness.generate_until([Instance("generate_until", {}, ("Q", {"until": ["x"], "max_gen_toks": 2, **options}), 0)], True)
    return seen[0]


DRAWN = ("temperature", "top_k", "top_p", "min_p")


@pytest.mark.parametrize("own", [{}, {"top_k": 7, "top_p": 0.8}, {"top_k": 0}])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": False, "temperature": 0.7},
        {"temperature": 0.7},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "temperature": 0.7, "top_k": 0},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1},
    ],
)
def test_answers_are_drawn_as_lm_evals_own_model_draws_them(hf, options, own):
    """transformers draws from the 50 likeliest tokens where neither the task nor the generation config says otherwise."""
    from pytest_lmeval.lm_eval._drawing import answers_to

    module = copy.deepcopy(hf[0])
    module.generation_config.update(**own)
    wanted = drawn_by_transformers((module, hf[1]), options)
    found, *more = answers_to(as_model(module, tokenizer=hf[1]), "Q", options, times=3)
    if wanted is None:
        assert (found.temperature, more) == (0, [])
    else:
        assert {"temperature": found.temperature, **found.drawn_from} == pytest.approx(wanted)
        assert more == [found, found]
    if options == {"do_sample": True, "temperature": 0.7}:  # the plain case is not that of drawing from all tokens
        assert wanted.get("top_k") == {0: None, 7: 7, None: 50}[own.get("top_k")]


def test_what_lm_eval_would_do_and_is_not_done_here_is_told(folder, lm, hf):
    module, said = copy.deepcopy(hf[0]), []
    module.generation_config.repetition_penalty = 1.2
    ours(as_model(module, tokenizer=hf[1]), f"lm_eval:{folder / 'answers'}.yaml", say=said.append, limit=1)
    assert said == [
        "lm_eval:answers: lm_eval would generate answers with repetition_penalty=1.2, of the generation config of the model; "
        "here they are not"
    ]
    yaml = TASKS["answers"].replace("max_gen_toks: 12", "max_gen_toks: 12, num_beams: 3")
    with pytest.raises(TaskError, match="lm_eval:beams, row 0: its answers are to be generated with num_beams=3, which is not"):
        ours(lm, written(folder, "beams", yaml))


def test_how_answers_are_drawn_is_recorded(folder, lm):
    yaml = TASKS["answers"].replace("max_gen_toks: 12", "max_gen_toks: 3, do_sample: true, temperature: 0.7")
    assert "temperature 0.7, top_k 50" in ours(lm, written(folder, "drawn", yaml)).record.settings["generation"][0]
