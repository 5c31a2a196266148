"""LAMBADA (Paperno et al. 2016, arXiv:1606.06031): the last word of a passage. Prompts of lm_eval.

The word is the one choice: would the model generate it (greedy_match), and how likely is it (perplexity, of words)? The rows
are OpenAI's, which keep the books' case and punctuation. There is only a test split, so there are no few-shot examples.
"""

from __future__ import annotations

from pytest_lmeval.data import Row, Rows
from pytest_lmeval.tasks import Choices, Task, by_name


def lambada(row: Row) -> Choices:
    """The last word is the text after the last blank."""
    passage, _, word = row["text"].rpartition(" ")
    return Choices(passage, (f" {word}",), 0)


ROWS = Rows("EleutherAI/lambada_openai", "default", "test")
REGISTERED = by_name(Task("lambada_openai", ROWS, lambada, ("greedy_match", "perplexity"), style="lm_eval"))
