"""Compare the prompts of tasks of style lm_eval with those that lm_eval 0.4.13 itself makes, character for character."""

import dataclasses
import sys
import types
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from pytest_lmeval.data import Rows
from pytest_lmeval.scoring._fewshot import Shots
from pytest_lmeval.tasks import Choices, Task, find, id_of, names

VERSION = "0.4.13"
PLAIN = "The cat sat on the mat."
BLANKS = "  Blanks at both ends , and  two within ; no stop "
FOREIGN = "Ünïcödé 漢字 😀 “said” she; 100 % {{braces}} {% too %}."
QUOTES = "It's \"quoted\" (so it is) and isn't 'over': C:\\new\\table"
TEXTS = [PLAIN, BLANKS, FOREIGN, QUOTES]


def rows_of(**fields):
    """Four rows; a list is the values of its field, any other field has the four TEXTS, rotated by one from field to field."""
    columns = {
        name: values if isinstance(values, list) else [TEXTS[(index + shift) % 4] for index in range(4)]
        for shift, (name, values) in enumerate(fields.items())
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


TWO, THREE = [1, 0, 1, 0], [0, 1, 2, 1]
PAIR = {"sentence1": "text", "sentence2": "text", "label": TWO}
ENTAILMENT = {"premise": "text", "hypothesis": "text"}
HIGHLIGHTS = "An article .\nOf two lines\n@highlight\nOne thing\n@highlight\nAnother, said É. Ü "
WORDS = [
    "Anna said ( aloud ) that she doesn't .",
    'It does n\'t fit , since it is " big " .',
    "He , too .",
    "\tOdd\nblanks he said",
]
ANSWERS = [{"text": texts, "answer_start": [0] * len(texts)} for texts in (["Paris", "in Paris"], [], ["  É  "], ["1"])]
FOUR = [["a", "b ", " c", 'd "e"'], ["1", "2", "3", "4"], ["É", "漢", "😀", "\\n"], ["it's", "\n", "{{x}}", "."]]
LETTERS = [["A", "B", "C", "D"], ["1", "2", "3", "4"], ["A", "B", "C", "D"], ["A", "B", "C", "D"]]

ROWS = {
    "cola": rows_of(sentence="text", label=TWO),
    "sst2": rows_of(sentence="text", label=TWO),
    "mrpc": rows_of(**PAIR),
    "qqp": rows_of(question1="text", question2="text", label=TWO),
    "mnli": rows_of(**ENTAILMENT, label=THREE),
    "mnli_mismatch": rows_of(hypothesis="text", premise="text", label=THREE),
    "qnli": rows_of(question="text", sentence="text", label=TWO),
    "rte": rows_of(**PAIR),
    "wnli": rows_of(**PAIR),
    "boolq": rows_of(question="text", passage="text", label=TWO),
    "cb": rows_of(**ENTAILMENT, label=THREE),
    "copa": rows_of(
        premise="text", choice1=["He ran.", "É", "x", "IT"], choice2="text", question=["cause", "effect"] * 2, label=TWO
    ),
    "multirc": rows_of(paragraph="text", question="text", answer=["Yes.", " é ", "No 'one'?", '"Anna"\n'], label=TWO),
    "record": rows_of(
        passage=[HIGHLIGHTS, PLAIN, f" {HIGHLIGHTS}\n", BLANKS],
        query=["@placeholder won", "In @placeholder , @placeholder won ", "É @placeholder.", "none"],
        entities=[["Bo", "Al", "Bo"], ["X"], ["É", "Z", "A"], ["a", "b"]],
        answers=[["Bo", "Bo"], ["X"], ["Z", "A", "Z"], ["a"]],
    ),
    "sglue_rte": rows_of(**ENTAILMENT, label=TWO),
    "wic": rows_of(sentence1="text", sentence2="text", word=["cat"] * 4, start1=[4, 0, 1, 2], end1=[7, 3, 8, 2], label=TWO),
    "wsc": rows_of(
        text=WORDS,
        span1_text=["Anna", "the trophy", "É", "blanks"],
        span1_index=[0] * 4,
        span2_text=["she", "it", "He", "he"],
        span2_index=[6, 6, 0, 2],
        label=TWO,
    ),
    "squadv2": rows_of(title="text", context="text", question="text", answers=ANSWERS),
    "hellaswag": rows_of(
        activity_label=["Roof", " Cooking", "É", "A [x] b"],
        ctx_a=["A man is on a roof.", "[header] How to [title] Do it", "", "two  blanks   three "],
        ctx_b=["he", "then He SAYS É", "", "[substeps] so"],
        endings=[[f"{text} [title] {n}" for n in range(3)] + [f" [step] {text}"] for text in TEXTS],
        label=["0", "3", "2", "1"],
    ),
    "arc_easy": rows_of(
        question="text",
        choices=[{"text": text, "label": label} for text, label in zip(FOUR, LETTERS, strict=True)],
        answerKey=["B", "4", "A", "D"],
    ),
    "arc_challenge": rows_of(
        question="text", choices=[{"text": ["one", "two", " é"], "label": list("ABC")}] * 4, answerKey=list("ACCC")
    ),
    "piqa": rows_of(goal="text", sol1="text", sol2="text", label=TWO),
    "lambada_openai": [{"text": text} for text in [*TEXTS, "“Yes,” said Anna"]],
    "mmlu": rows_of(question="text", subject=["anatomy"] * 4, choices=FOUR, answer=[0, 3, 1, 2]),
}

LM_EVAL = [name for name in names() if find(name).style == "lm_eval"]
MMLU = [name for name in LM_EVAL if name.startswith("mmlu_")]


ROWS |= dict.fromkeys(MMLU, ROWS["mmlu"])


def all_but(*left_out):
    """Names of tasks as parameters: all by default but the MMLU subjects after the second, which run the same code."""
    found = [name for name in LM_EVAL if name not in left_out]
    return [pytest.param(name, marks=[pytest.mark.thorough] if name in MMLU[2:] else []) for name in found]


def ours(task, row, shown=()):
    """The prompt with each of its choices, or with nothing where the answer is generated."""
    *shots, question = (task.ask(row) for row in (*shown, row))
    prompt = task.description + "".join(f"{shot.prompt}{shot.target}{task.fewshot_delimiter}" for shot in shots)
    continuations = question.choices if isinstance(question, Choices) else ("",)
    return [(prompt + question.prompt, continuation) for continuation in continuations]


@pytest.fixture(scope="session")
def harness():
    """(name, rows) -> the task of lm_eval over these rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages
        lm_eval = pytest.importorskip("lm_eval", reason="prompts are compared with those of lm_eval, which is not installed")
        from importlib.metadata import version

        import datasets
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import load_yaml
    if version("lm_eval") != VERSION:
        pytest.skip(f"the prompts are those of lm_eval {VERSION}, and {version('lm_eval')} is installed")
    folder = Path(lm_eval.__file__).parent / "tasks"
    families = ("glue", "super_glue", "squadv2", "hellaswag", "arc", "piqa", "lambada", "mmlu/default")
    files = [path for family in families for path in (folder / family).rglob("*.yaml")]
    by_name = {load_yaml(path, resolve_func=False).get("task"): path for path in files if not path.name.startswith("_")}

    # the harness's record imports this module, which transformers 5 no longer has
    metrics = types.ModuleType("transformers.data.metrics.squad_metrics")
    metrics.compute_exact = metrics.compute_f1 = lambda gold, said: int(gold == said)

    def build(name, rows):
        splits = ("train", "dev", "validation", "validation_matched", "validation_mismatched", "test")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "transformers.data.metrics", types.ModuleType("transformers.data.metrics"))
            patch.setitem(sys.modules, metrics.__name__, metrics)
            patch.setattr(datasets, "load_dataset", lambda **_: dict.fromkeys(splits, datasets.Dataset.from_list(rows)))
            config = load_yaml(by_name[name])
            config.pop("tag", None)
            return config["class"]() if "class" in config else ConfigurableTask(config=config)

    return build


def theirs(task, shots=0):
    """The same by lm_eval, of all rows; with shots only of the first row, which shows the next ones."""
    from lm_eval.api.samplers import FirstNSampler

    documents = list(task.eval_docs)
    task.sampler = FirstNSampler(documents[1:])
    for document in documents[:1] if shots else documents:
        requests = task.construct_requests(document, task.fewshot_context(document, shots))
        requests = requests if isinstance(requests, list) else [requests]
        if requests[0].request_type == "generate_until":
            yield [(requests[0].args[0], "")]
        else:
            yield [request.args for request in requests]


def differences(harness, task, rows=None):
    """Pairs of ours and lm_eval's, of the rows where they differ."""
    rows = rows or ROWS[task.name]
    pairs = zip((ours(task, row) for row in rows), theirs(harness(task.name, rows)), strict=True)
    return [pair for pair in pairs if pair[0] != pair[1]]


@pytest.mark.parametrize("name", all_but("multirc"))  # it has a test of its own
def test_a_prompt_is_that_of_lm_eval(harness, name):
    assert differences(harness, find(name)) == []


# The harness would show questions of lambada's test split, and it fails with examples of squadv2.
@pytest.mark.parametrize("name", all_but("multirc", "lambada_openai", "squadv2"))
def test_fewshot_examples_are_shown_as_in_lm_eval(harness, name):
    task, (row, *shown) = find(name), ROWS[name]
    assert ours(task, row, shown[:2]) == next(theirs(harness(name, ROWS[name]), shots=2))


# The harness strips, splits, joins, replaces, looks for brackets, full stops and blanks before punctuation.
texts = st.text(alphabet="aBé .,'\"()[]\n-", max_size=30)
shapes = {
    "hellaswag": {
        "activity_label": texts,
        "ctx_a": texts,
        "ctx_b": texts,
        "endings": st.lists(texts.map("É{}".format), min_size=4, max_size=4),
    },
    "wsc": {"text": texts.map(lambda text: f"{text} he n't ."), "span1_text": texts, "span2_index": st.integers(0, 4)},
    "mnli": {"premise": texts, "hypothesis": texts},
    "copa": {"premise": texts, "choice1": texts.map("É{}".format)},
    "record": {"passage": st.lists(texts, min_size=1).map("\n@highlight\n".join), "query": texts.map("{}@placeholder".format)},
    "lambada_openai": {"text": texts},
}


@pytest.mark.parametrize("name", shapes)
@settings(max_examples=50)
@given(data=st.data())
def test_any_text_is_cleaned_as_in_lm_eval(harness, name, data):
    drawn = st.fixed_dictionaries(shapes[name])
    rows = [row | data.draw(drawn) for row in ROWS[name][:2]]
    assert differences(harness, find(name), rows) == []


def changed(task, **changes):
    return dataclasses.replace(task, ask=lambda row: dataclasses.replace(question := task.ask(row), **{
        field: change(getattr(question, field)) for field, change in changes.items()
    }))  # fmt: skip


@pytest.mark.parametrize(
    "broken",
    [
        changed(find("sst2"), prompt=lambda text: f"{text} "),
        changed(find("sst2"), choices=lambda texts: [text.strip() for text in texts]),
        changed(find("copa"), choices=lambda texts: [text[1:] for text in texts]),
        changed(find("sst2"), choices=lambda texts: texts[::-1]),
        dataclasses.replace(find("mmlu_anatomy"), description=""),
    ],
)
def test_a_wrong_prompt_is_a_difference(harness, broken):
    assert len(differences(harness, broken)) == 4


def test_a_wrong_label_is_a_difference_in_the_examples(harness):
    task, (row, *shown) = changed(find("qnli"), answer=lambda label: 1 - label), ROWS["qnli"]
    assert ours(task, row, shown[:2]) != next(theirs(harness("qnli", ROWS["qnli"]), shots=2))


def test_lm_eval_reads_the_labels_of_multirc_the_wrong_way_round(harness):
    """Label 1 says that the answer is right. The harness's choice 1 is "no", and "no" is what it shows after right answers."""
    task, rows = find("multirc"), ROWS["multirc"]
    assert [ours(task, row)[::-1] for row in rows] == list(theirs(harness("multirc", rows)))
    assert [task.ask(row).target.rpartition(" ")[2] for row in rows] == ["yes" if row["label"] else "no" for row in rows]
    wrong = changed(task, answer=lambda label: 1 - label)
    assert ours(wrong, rows[0], rows[1:3])[::-1] == next(theirs(harness("multirc", rows), shots=2))


@pytest.mark.parametrize("name", all_but())
def test_rows_come_from_the_dataset_and_split_of_lm_eval(harness, name):
    task, other = find(name), harness(name, ROWS[name])
    config = other.config
    split = config.test_split or config.validation_split or "validation"
    assert (task.rows.name, task.rows.config, task.rows.split) == (other.DATASET_PATH, other.DATASET_NAME, split)
    assert (task.fewshot_strategy == "first") == (config.fewshot_config.sampler == "first_n")
    if task.shots:
        assert task.shots == task.rows.of(config.fewshot_split or config.training_split or "train")


def test_an_answer_of_squadv2_ends_as_in_lm_eval(harness):
    other = harness("squadv2", ROWS["squadv2"])
    (generated, _) = other.construct_requests(next(iter(other.eval_docs)), "")
    assert generated.args[1] == {"until": list(find("squadv2").ask(ROWS["squadv2"][0]).stop)}


def test_every_right_entity_of_record_is_right_in_lm_eval(harness):
    other = harness("record", ROWS["record"])
    for row, document in zip(ROWS["record"], other.eval_docs, strict=True):
        question = find("record").ask(row)
        for chosen in range(len(question.choices)):
            loglikelihoods = [(float(index == chosen), False) for index in range(len(question.choices))]
            assert other.process_results(document, loglikelihoods)["em"] == (chosen in question.answers)


GOLDEN = {
    ("cola", 0): [f"{PLAIN}\nQuestion: Does this sentence make sense?\nAnswer: {word}" for word in ("no", "yes")],
    ("mnli", 0): [
        f"{PLAIN}\nQuestion: Blanks at both ends , and  two within ; no stop. True, False or Neither?\nAnswer: {word}"
        for word in ("True", "Neither", "False")
    ],
    ("copa", 0): [f"The cat sat on the mat because  {text}" for text in ("he ran.", f"{FOREIGN[0].lower()}{FOREIGN[1:]}")],
    ("wsc", 1): [
        'Passage: It doesn\'t fit, since *it* is"big".\nQuestion: In the passage above, does the pronoun "*it*" refer to '
        f'"*the trophy*"?\nAnswer: {word}'
        for word in ("no", "yes")
    ],
    ("record", 0): [
        "An article .\nOf two lines\n\n  - One thing.\n  - Another, said É. Ü.\n" + f"   - {name} won" for name in ("Al", "Bo")
    ],
    ("arc_challenge", 0): [f"Question: {PLAIN}\nAnswer:{text}" for text in (" one", " two", "  é")],
    ("lambada_openai", 4): ["“Yes,” said Anna"],
    ("mmlu_us_foreign_policy", 1): [
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        f"{BLANKS.strip()}\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: {letter}"
        for letter in "ABCD"
    ],
}


@pytest.mark.parametrize(("name", "index"), GOLDEN)
def test_prompts_are_those_recorded_here(name, index):
    """Needs no lm_eval; where it is installed, the comparison above checks these strings."""
    assert ["".join(parts) for parts in ours(find(name), ROWS[name][index])] == GOLDEN[name, index]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_examples_are_drawn_as_lm_eval_draws_them(harness, split):
    """Question after question from one stream of random numbers; one more if the split is not called a test split."""
    from lm_eval.api.samplers import ContextSampler

    pool = [{"n": n % 17} for n in range(40)]
    task = Task("drawn", Rows("x/y", split=split), lambda row: Choices("x", ("y",), 0), shots=pool)
    ours, theirs = Shots(task, 3, "lm_eval"), ContextSampler(pool, rnd=1234)
    for row in pool[:25]:
        assert ours.rows(row, id_of(row)) == list(theirs.sample(3, eval_doc=row if split == "validation" else None))
