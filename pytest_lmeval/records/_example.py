"""One answered question, and one document that was read: what reports, gates and metrics are made from."""

from __future__ import annotations

from pytest_lmeval.records._metric import Norm
from pytest_lmeval.records._schema import Kept


class Example(Kept, frozen=True, kw_only=True):
    """One answered question: a line of `examples/*.jsonl`.

    id              hash of the row
    number          index of the row
    prompt          the text that was read, shown examples and all
    output          the text that the model gave, or that of the choice with the largest log-likelihood, stripped
    target          a text that is right, stripped; None where there is nothing to compare with
    scores          metric -> what this example counts in it; None where the metric is not about it
    key             hash of everything that decides the answer: model, prompt, question, seed
    group           what it shares with others, if anything (see `tasks.Choices.group`)
    choices         as the task gave them, blanks and all; empty where the answer was generated
    texts           what stands for the choices where texts are compared; empty where they do themselves
    right           indices of the choices that are right
    loglikelihoods  of each choice after the prompt, nats, all its tokens together
    tokens          number of tokens of each choice
    greedy          of each choice, whether the model would have generated it
    chosen          index of the choice that it is judged by: the likeliest as the first metric that compares choices compares
                    them; None where the answer was generated
    targets         all texts that are right, stripped
    judged          what the task's judge found of the output
    read, saved     tokens read for it (a prefix shared with earlier ones is counted there), and those that were not read again
    truncated       tokens of the prompt that did not fit the model's context, left out on the left
    retokenized     whether prompt and choice have a token in common, so that scoring begins before the choice
    """

    id: str
    number: int
    prompt: str
    output: str = ""
    target: str | None = None
    scores: dict[str, float | None] = {}
    key: str = ""
    group: str | None = None
    choices: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    loglikelihoods: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    greedy: tuple[bool, ...] = ()
    chosen: int | None = None
    targets: tuple[str, ...] = ()
    judged: bool | None = None
    read: int = 0
    saved: int = 0
    truncated: int = 0
    retokenized: bool = False

    def __post_init__(self) -> None:
        count = len(self.choices)
        if len(self.loglikelihoods) != count or {len(self.tokens), len(self.greedy)} - {0, count}:
            raise ValueError(f"there are {count} choices, and log-likelihoods, tokens or greedy of another number")
        if not all(0 <= index < count for index in self.right):
            raise ValueError(f"right is {list(self.right)}, and there are {count} choices")
        if self.chosen is not None and not 0 <= self.chosen < count:
            raise ValueError(f"chosen is {self.chosen}, and there are {count} choices")

    def compared(self, norm: Norm = "sum") -> list[float]:
        """What the choices are compared by: log-likelihoods, each divided as `norm` says."""
        return compared(self.loglikelihoods, self.choices, self.tokens, norm)

    def predicted(self, norm: Norm = "sum") -> int:
        """Index of the likeliest choice; of equal ones the first."""
        scores = self.compared(norm)
        return scores.index(max(scores))

    @property
    def answer(self) -> str:
        """The text that it is judged by: of the choice that was chosen, or the output."""
        return self.output if self.chosen is None else (self.texts or self.choices)[self.chosen].strip()

    @property
    def tied(self) -> bool:
        """Whether another choice is exactly as likely as the likeliest."""
        return self.loglikelihoods.count(max(self.loglikelihoods)) > 1 if len(self.choices) > 1 else False


def compared(loglikelihoods: tuple[float, ...], choices: tuple[str, ...], tokens: tuple[int, ...], norm: Norm) -> list[float]:
    """Log-likelihoods, each divided by the length of its choice. The one blank that divides a choice from the prompt is not
    counted to its length."""
    bare = [choice.removeprefix(" ") for choice in choices]
    lengths = {
        "sum": [1] * len(choices),
        "token": list(tokens),
        "byte": [len(choice.encode()) for choice in bare],
        "character": [len(choice) for choice in bare],
    }[norm]
    return [total / max(1, length) for total, length in zip(loglikelihoods, lengths, strict=True)]


class Unit(Kept, frozen=True):
    """What a reading summed up over a document, or over a block of a stream: a line of `examples/*-units.jsonl`.

    id    hash of what it holds, not of where it stands
    sums  tokens, nats, bytes, and targets among the first choices (`top1`, `top5`)
    """

    id: str
    sums: dict[str, float]
