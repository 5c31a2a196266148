"""Chat in the style of lm_eval is its `--apply_chat_template --fewshot_as_multiturn`: prompts, log-likelihoods and answers."""

import json
import warnings
from unittest import mock

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval")
pytest.importorskip("accelerate", reason="lm_eval's own model of transformers needs it")
from real_model import MISSING, real_model_folder

from pytest_lmeval import Choices, Generate, Task, load
from pytest_lmeval.measures._task import measure_task

pytestmark = [pytest.mark.real_model, pytest.mark.thorough]

SUMS = [
    ("Tom has 3 apples and buys 4 more. How many apples does he have?", "3 + 4 = 7\n#### 7"),
    ("A box holds 6 eggs. How many eggs are in 5 boxes?", "6 * 5 = 30\n#### 30"),
    ("Ann had 10 cards and lost 4. How many are left?", "10 - 4 = 6\n#### 6"),
    ("A train runs 50 miles an hour. How far does it run in 3 hours?", "50 * 3 = 150\n#### 150"),
]
FACTS = [
    ("What is the capital of France?", ["Berlin", "Paris", "Rome"], 1),
    ("What do bees make?", ["honey", "milk", "silk"], 0),
    ("What is frozen water called?", ["steam", "sand", "ice"], 2),
    ("Which animal barks?", ["a dog", "a fish", "a bird"], 0),
]
SHOTS = 2
SYSTEM = "You answer briefly."
TASKS = {
    "sums": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "facts": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "description": "These are facts.",
        "metric_list": [{"metric": "acc"}],
    },
}


def ask(row, prefix):
    if "choices" in row:
        choices = tuple(f" {choice}" for choice in row["choices"])
        return Choices(row["question"], choices, row["answer"], answer_prefix=prefix)
    prompt = f"Question: {row['question']}\nAnswer:"
    return Generate(prompt, (row["answer"],), stop=("Question:",), max_tokens=8, answer_prefix=prefix)


def rows_of(name):
    if name == "sums":
        return [{"question": question, "answer": answer} for question, answer in SUMS]
    return [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in FACTS]


@pytest.fixture(scope="module")
def lm():
    return load(f"hf:{real_model_folder() or pytest.skip(MISSING)}@fp32")


def of_lm_eval(lm, folder, name, chat, prefix, system):
    """(prompt, continuation or None, log-likelihood or text) of each request of lm_eval."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows, files = rows_of(name), {}
    for split, some in (("train", rows[:SHOTS]), ("test", rows[SHOTS:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        files[split] = str(folder / f"{split}.jsonl")
    more = {"gen_prefix": prefix} if prefix else {}
    (folder / f"chat_{name}.yaml").write_text(
        json.dumps(
            {
                "task": f"chat_{name}",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
                "training_split": "train",
                "test_split": "test",
                "fewshot_split": "train",
                "fewshot_config": {"sampler": "first_n"},
                **TASKS[name],
                **more,
            }
        )
    )
    with warnings.catch_warnings(), mock.patch("lm_eval.evaluator.add_env_info"):  # it asks other programs for seconds
        warnings.simplefilter("ignore")
        model = HFLM(pretrained=lm.module, tokenizer=lm.tokenizer.tokenizer, batch_size=1)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = simple_evaluate(
            model, tasks=[f"chat_{name}"], task_manager=manager, num_fewshot=SHOTS, bootstrap_iters=0, log_samples=True,
            apply_chat_template=chat, fewshot_as_multiturn=chat, system_instruction=system,
        )  # fmt: skip
    samples = sorted(found["samples"][f"chat_{name}"], key=lambda sample: sample["doc_id"])
    for sample in samples:
        for arguments, (response,) in zip(sample["arguments"], sample["resps"], strict=True):
            if name == "sums":
                yield arguments[0], None, response
            else:
                yield arguments[0], arguments[1], response[0]


def of_this_package(lm, name, chat, prefix, system):
    rows = rows_of(name)
    task = Task(name, rows[SHOTS:], lambda row: ask(row, prefix), shots=rows[:SHOTS], fewshot_strategy="first", style="lm_eval",
                description=TASKS[name].get("description", ""))  # fmt: skip
    for example in measure_task(lm, task, shots=SHOTS, chat=chat, system=system).examples:
        if name == "sums":
            yield example.prompt, example.output
        else:
            yield from ((example.prompt, likelihood) for likelihood in example.loglikelihoods)


@pytest.mark.parametrize("name", ["sums", "facts"])
@pytest.mark.parametrize(
    ("chat", "prefix", "system"),
    [(True, "", None), (True, "", SYSTEM), (True, "The answer is", None), (True, "The answer is ", None), (False, "", None),
     (False, "The answer is", None)],
)  # fmt: skip
def test_prompts_and_results_are_those_of_lm_eval(lm, tmp_path, monkeypatch, name, chat, prefix, system):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    theirs = list(of_lm_eval(lm, tmp_path, name, chat, prefix, system))
    ours = list(of_this_package(lm, name, chat, prefix, system))
    assert len(theirs) == len(ours) == (2 if name == "sums" else 6)
    for (prompt, result), (expected, _, other) in zip(ours, theirs, strict=True):
        assert prompt == expected
        assert result == (pytest.approx(other, abs=1e-4) if name == "facts" else other.strip())
    assert any("<|im_start|>user" in prompt for prompt, _ in ours) is chat
