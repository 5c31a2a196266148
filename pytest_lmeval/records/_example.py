"""Types of scored units: an answered question, and the sums of a document or block."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
from msgspec import structs

from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._metric import Norm
from pytest_lmeval.records._schema import StoredStruct

Outcome = Literal["", "answered", "cut off", "empty", "refused"]

FLOAT64 = 1e-12  # a larger relative difference is not the rounding of sums and quotients here


class Example(StoredStruct, frozen=True, kw_only=True):
    """One answered question: a line of `examples/*.jsonl`.

    id              hash of the row
    number          index of the row
    repeat          which of several answers to the row it is: 0 of the first, and of an only one
    prompt          text that the model read, few-shot examples included; without what exceeds the model's context
    output          generated text, or the choice with the largest log-likelihood; stripped
    outcome         what became of the answer, right or wrong: "answered"; "cut off", if it reached its largest length and might
                    have ended before, or did not end thinking; "empty"; "refused", if the scorer of the task could take nothing
                    from it. A choice that was taken has none
    thought         what the model thought before it answered
    extracted       metric -> what the scorer of the task took from the output as the answer proper
    target          a right text, stripped; None if there is nothing to compare with
    scores          metric -> score of this example; None if the metric does not apply to it
    key             hash of everything that decides the answer: model, prompt, question, seed, code of the judge
    group           what it shares with other questions, if anything (see `tasks.Choices.group`)
    question        of several rows that are answers to one question (see `tasks.Choices.question`)
    choices         as the task gives them, with leading blanks; empty if the answer was generated
    texts           texts that stand for the choices when texts are compared; empty: the choices themselves
    right           indices of the right choices
    loglikelihoods  of each choice after the prompt, in nats, summed over its tokens
    tokens          number of tokens of each choice
    greedy          for each choice, whether greedy decoding would generate it
    rounding        what rounding changes in the log-likelihood of a token, nats: choices no further apart are a tie
    tie_rule        what a tie counts: "shared", each of its k choices 1/k; "first", the first of equal ones all, as in lm_eval
    chosen          index of the choice that is shown: the likeliest under the norm of the first metric that compares choices,
                    the first of equal ones; None if the answer was generated
    targets         all right texts, stripped
    judged          verdict of the task's judge on the output
    generated       the output as the judge read it, before it was stripped; empty without a judge
    read, saved     tokens read for it (a shared prefix counts where it is read first), and tokens saved by prefix sharing
    truncated       tokens cut off on the left of the question because they exceed the model's context
    shots_dropped   few-shot examples left out for the same reason
    retokenized     prompt and choice share a token, so scoring begins before the choice
    audited         largest difference of a log-probability when it was read again, whole and alone, nats; None: it was not
    """

    id: str
    number: int
    prompt: str
    output: str = ""
    outcome: Outcome = ""
    thought: str = ""
    extracted: dict[str, str] = {}
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
    rounding: float = 0.0
    tie_rule: Literal["shared", "first"] = "shared"
    chosen: int | None = None
    targets: tuple[str, ...] = ()
    judged: bool | None = None
    generated: str = ""
    read: int = 0
    saved: int = 0
    truncated: int = 0
    shots_dropped: int = 0
    retokenized: bool = False
    audited: float | None = None
    repeat: int = 0
    question: str | None = None

    def __post_init__(self) -> None:
        count = len(self.choices)
        if len(self.loglikelihoods) != count or {len(self.tokens), len(self.greedy)} - {0, count}:
            raise ValueError(f"there are {count} choices and another number of log-likelihoods, tokens or greedy")
        if not all(0 <= index < count for index in self.right):
            raise ValueError(f"right is {list(self.right)} and there are {count} choices")
        if self.chosen is not None and not 0 <= self.chosen < count:
            raise ValueError(f"chosen is {self.chosen} and there are {count} choices")

    @property
    def place(self) -> tuple[int, int]:
        """What no other example of a task has: the index of its row, and which answer to it."""
        return self.number, self.repeat

    def compared(self, norm: Norm = "sum") -> list[float]:
        """The log-likelihoods of the choices, each divided by the length of its choice."""
        return [total / length for total, length in zip(self.loglikelihoods, self.lengths(norm), strict=True)]

    def lengths(self, norm: Norm) -> list[int]:
        """What the norm divides by, at least 1: tokens, bytes or characters, without the one blank after the prompt."""
        if norm == "sum":
            return [1] * len(self.choices)
        if norm == "token":
            return [max(1, count) for count in self.tokens]
        bare = [choice.removeprefix(" ") for choice in self.choices]
        return [max(1, len(choice.encode() if norm == "byte" else choice)) for choice in bare]

    def predicted(self, norm: Norm = "sum") -> int:
        """Index of the likeliest choice; the first one of a tie."""
        scores = self.compared(norm)
        return scores.index(max(scores))

    @property
    def answer(self) -> str:
        """The text that is judged: of the chosen choice, or the output."""
        return self.output if self.chosen is None else (self.texts or self.choices)[self.chosen].strip()

    @property
    def tied(self) -> bool:
        """Several choices are the likeliest."""
        return len(self.likeliest()) > 1

    def likeliest(self, norm: Norm = "sum") -> tuple[int, ...]:
        """Indices of the likeliest choice and of those that only rounding tells from it: a tie, if several; () without choices.

        The log-likelihood of n tokens, whose roundings are independent, is known to `rounding` times the root of n.
        """
        if len(self.choices) < 2:
            return tuple(range(len(self.choices)))
        lengths, tokens = self.lengths(norm), self.tokens or (1,) * len(self.choices)
        scores = self.loglikelihoods if norm == "sum" else self.compared(norm)
        *_, second, highest = sorted(scores)
        if highest - second > max(self.rounding * math.sqrt(max(tokens)) / min(lengths), FLOAT64 * abs(highest)):
            return (scores.index(highest),)
        known = [self.rounding * math.sqrt(count) / length for count, length in zip(tokens, lengths, strict=True)]
        best = scores.index(highest)
        least = max(known[best], FLOAT64 * abs(scores[best]))
        return tuple(index for index, score in enumerate(scores) if scores[best] - score <= max(least, known[index]))

    def counted(self, norm: Norm = "sum") -> tuple[int, ...]:
        """Indices of the choices that count, in equal shares, by the rule for ties; () without choices."""
        return (self.predicted(norm),) if self.choices and self.tie_rule == "first" else self.likeliest(norm)

    def resolved(self, norm: Norm = "sum") -> tuple[Example, ...]:
        """The example with each choice that counts as the chosen one; a generated answer is itself."""
        texts = self.texts or self.choices
        found = (structs.replace(self, chosen=index, output=texts[index].strip()) for index in self.counted(norm))
        return tuple(found) or (self,)


_decode = msgspec.json.Decoder(Example).decode


def example_of(line: bytes) -> Example:
    """The example of a line, without what this version does not know. Raises ValueError for a line that holds none."""
    try:
        return _decode(line)
    except (msgspec.MsgspecError, ValueError):  # such as a surrogate that stands alone, which is valid here
        return schema.convert(schema.parse(line, "a line of examples", "Run this again"), Example)


class Unit(StoredStruct, frozen=True):
    """Sums over a document, or over a block of a stream: a line of `examples/*-units.jsonl`.

    id    hash of its content, independent of its position
    sums  tokens, nats, bytes, and number of targets among the first 1 or 5 predictions (`top1`, `top5`)
    """

    id: str
    sums: dict[str, float]
