"""LAMBADA (Paperno et al. 2016, arXiv:1606.06031): the last word of a passage. Prompts of lm_eval.

People guess the word from the whole passage but not from the last sentence alone. There is one choice, the word: would the
model generate it (greedy_match), and how likely is it (perplexity, of words)? The rows are OpenAI's, which keep the books' case
and punctuation. There are no few-shot examples: the dataset has only a test split.
"""

from __future__ import annotations

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.tasks import Choices, Task, by_name


def lambada(row: Row) -> Choices:
    """The last word is the text after the last blank."""
    passage, _, word = row["text"].rpartition(" ")
    return Choices(passage, (f" {word}",), 0)


ROWS = Rows("EleutherAI/lambada_openai", "default", "test")
TASK = Task("lambada_openai", ROWS, lambada, ("greedy_match", "perplexity"), style="lm_eval")
REGISTERED = by_name(TASK)
