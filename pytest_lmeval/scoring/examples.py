"""One answered question: a line of the file of examples, and what every metric of a task is computed from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Norm = Literal["sum", "token", "byte", "character"]
"""What the log-likelihood of a choice is divided by before choices are compared; "sum": by nothing."""


@dataclass(frozen=True)
class Example:
    """id              hash of the row
    number          its place among the rows
    prompt          hash of the prompt as it was read, examples and all
    asked           hash of everything that decides the answer: model, prompt, question, seed
    group           what it shares with others, if anything (see `task.Choices.group`)
    choices         as the task gave them, blanks and all; () where the answer was generated
    texts           what stands for the choices where texts are compared; () where they do themselves
    right           places of the choices that are right
    loglikelihoods  of each choice after the prompt, nats, all its tokens together
    tokens          of each choice
    greedy          of each choice, whether it is what the model would have said
    output          the text that was generated; None for choices
    targets         texts that are right, stripped
    judged          what the task's judge found of the output
    read, saved     tokens read for it (a beginning shared with earlier ones is counted there), and those that were not read
                    again
    cut             tokens of the prompt that did not fit the model's context, taken away on the left
    moved           whether prompt and choice have a token in common, so that the border between them moved to before it
    """

    id: str
    number: int
    prompt: str
    asked: str
    group: str | None = None
    choices: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    loglikelihoods: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    greedy: tuple[bool, ...] = ()
    output: str | None = None
    targets: tuple[str, ...] = ()
    judged: bool | None = None
    read: int = 0
    saved: int = 0
    cut: int = 0
    moved: bool = False

    def scores(self, norm: Norm = "sum") -> list[float]:
        """What the choices are compared by."""
        lengths = {
            "sum": [1] * len(self.choices),
            "token": list(self.tokens),
            "byte": [len(choice.encode()) for choice in self._bare],
            "character": [len(choice) for choice in self._bare],
        }[norm]
        return [total / max(1, length) for total, length in zip(self.loglikelihoods, lengths, strict=True)]

    def predicted(self, norm: Norm = "sum") -> int:
        """The place of the likeliest choice; of equal ones the first."""
        scores = self.scores(norm)
        return scores.index(max(scores))

    @property
    def tied(self) -> bool:
        """Whether another choice is exactly as likely as the likeliest."""
        return self.loglikelihoods.count(max(self.loglikelihoods)) > 1 if len(self.choices) > 1 else False

    @property
    def answer(self) -> str:
        """The text that the model gave or chose, stripped."""
        return ((self.texts or self.choices)[self.predicted()] if self.output is None else self.output).strip()

    def to_json(self) -> dict[str, Any]:
        """With the prediction and its target in words, for people."""
        return {**asdict(self), "prediction": self.answer, "target": self.targets[0] if self.targets else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Example:
        """The example that `to_json` wrote."""
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        values: dict[str, Any] = {name: value for name, value in own.items() if name not in ("prediction", "target")}
        return cls(**values)

    @property
    def _bare(self) -> list[str]:
        """The choices without the one blank that divides them from the prompt, which is not counted to their length."""
        return [choice.removeprefix(" ") for choice in self.choices]
