"""SuperGLUE (Wang et al. 2019, arXiv:1905.00537): harder tasks after GLUE was solved. Prompts of lm_eval."""

from __future__ import annotations

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.errors import TaskError
from pytest_lmeval.tasks import Ask, Choices, Suite, Task, by_name, id_of
from pytest_lmeval.tasks._checks import texts


def boolq(row: Row) -> Choices:
    """A question asked of a search engine, and a passage that answers it. (Clark et al. 2019)"""
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return Choices(prompt, (" no", " yes"), row["label"], group=id_of({"passage": row["passage"]}))


def cb(row: Row) -> Choices:
    """Is the writer committed to what an embedded clause says? (de Marneffe et al. 2019)"""
    prompt = f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False, or Neither?\nAnswer:"
    return Choices(prompt, (" True", " False", " Neither"), row["label"])


def copa(row: Row) -> Choices:
    """Which of two sentences is the cause, or the effect, of a third? (Roemmele et al. 2011)

    The choice continues the premise without its full stop, after two blanks: lm_eval adds one, and its choices have one.
    """
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = tuple(f"  {text[0].lower()}{text[1:]}" for text in (row["choice1"], row["choice2"]))
    return Choices(f"{row['premise'].strip()[:-1]} {connector}", choices, row["label"])


def multirc(row: Row) -> Choices:
    """Is this a right answer to a question about a paragraph? Several may be. Label 1 is yes. (Khashabi et al. 2018)

    lm_eval 0.4.13 lists "yes" first and so counts every answer the wrong way round: except for ties, its accuracy is 1 - ours.
    """
    choices = tuple(f" {row['answer']}\nIs the answer correct? {word}" for word in ("no", "yes"))
    prompt = f"{row['paragraph']}\nQuestion: {row['question']}\nAnswer:"
    passage = {"paragraph": row["paragraph"]}
    return Choices(prompt, choices, row["label"], id_of(passage), question=id_of({**passage, "question": row["question"]}))


def record(row: Row) -> Choices:
    """Which name in the article fills the gap in a sentence about it? Several may be right. (Zhang et al. 2018)"""
    article, *highlights = row["passage"].strip().split("\n@highlight\n")
    prompt = f"{article}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)
    entities, right = (sorted(set(texts(name, row[name]))) for name in ("entities", "answers"))
    if not set(right) <= set(entities):
        raise TaskError(f"the answers {right!r} are not all among the entities {entities!r}, so they could not be chosen.")
    choices = tuple(f"   - {row['query']}".replace("@placeholder", entity) for entity in entities)
    answers = tuple(map(entities.index, right))
    return Choices(prompt, choices, answers, group=id_of({"passage": row["passage"]}), texts=tuple(entities))


def rte(row: Row) -> Choices:
    """The rows of GLUE's rte, with other field names."""
    prompt = f"{row['premise']}\nQuestion: {row['hypothesis']} True or False?\nAnswer:"
    return Choices(prompt, (" True", " False"), row["label"])


def wic(row: Row) -> Choices:
    """Has a word the same meaning in two sentences? (Pilehvar and Camacho-Collados 2019)"""
    pair = f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}"
    word = row["sentence1"][row["start1"] : row["end1"]]
    question = f"Question: Is the word '{word}' used in the same way in the two sentences above?"
    return Choices(f"{pair}\n{question}\nAnswer:", (" no", " yes"), row["label"])


def wsc(row: Row) -> Choices:
    """Does a pronoun refer to a noun? World knowledge is needed to tell. (Levesque et al. 2011)

    As in lm_eval, the text goes on one character after the pronoun: some letters are repeated or lost where the text begins
    with the pronoun or has two blanks in a row.
    """
    text, pronoun = row["text"], row["span2_text"]
    before = " ".join(text.split()[: row["span2_index"]])
    passage = f"{before} *{pronoun}*{text[len(before) + len(pronoun) + 1 :]}"
    for spaced, joined in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        passage = passage.replace(spaced, joined)
    for mark in "'.,":
        passage = passage.replace(f" {mark}", mark)
    question = f'In the passage above, does the pronoun "*{pronoun}*" refer to "*{row["span1_text"]}*"?'
    prompt = f"Passage: {passage}\nQuestion: {question}\nAnswer:"
    return Choices(prompt, (" no", " yes"), row["label"], group=id_of({"text": text}))


def _task(name: str, ask: Ask, *metrics: str, config: str = "") -> Task:
    rows = Rows("aps/super_glue", config or name, "validation")
    return Task(name, rows, ask, metrics or ("accuracy",), shots=rows.of("train"), style="lm_eval")


SUITE = Suite(
    "superglue",
    (
        _task("boolq", boolq),
        _task("cb", cb, "accuracy", "f1_macro"),
        _task("copa", copa),
        _task("multirc", multirc, "accuracy", "f1", "question_exact_match"),  # f1 is F1a, the last is EM
        _task("record", record, "squad_f1", "exact_match"),
        _task("sglue_rte", rte, config="rte"),
        _task("wic", wic),
        _task("wsc", wsc, config="wsc.fixed"),
    ),
)
REGISTERED = by_name(SUITE, *SUITE.tasks)
