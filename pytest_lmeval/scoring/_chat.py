"""Decide whether a task is asked in turns, and make its questions turns: a system prompt, few-shot examples, the question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_lmeval.errors import ArgumentError, TaskError
from pytest_lmeval.models import _chat as template
from pytest_lmeval.models._chat import Rendered
from pytest_lmeval.models._model import Model
from pytest_lmeval.tasks._questions import AnyQuestion, Generate, Question
from pytest_lmeval.tasks._task import Task

ChatMode = bool | Literal["auto"]


@dataclass(frozen=True)
class Decision:
    """Whether a task is asked in turns, and notes for the reader: why, where "auto" decided; what the template does not read;
    where the system prompt stands."""

    on: bool
    notes: tuple[str, ...] = ()


def decide(
    chat: ChatMode, lm: Model, task: Task, first: Callable[[], AnyQuestion | None], system: str | None = None
) -> Decision:
    """Whether a task is asked in turns.

    chat   True and False decide; "auto": in turns if the model has a chat template, the answer to the first question is
           generated, and the task does not promise the prompts of lm_eval, which have no turns by default
    first  the first question of the task, read only if it decides

    Raises SpecError if it is, and the model has no chat template. Raises TaskError if it is not, and there is a system prompt.
    """
    if chat not in (True, False, "auto"):
        raise ArgumentError(f"chat={chat!r}: it is True, False, or 'auto'.")
    on, why, notes = chat is True, "chat=False", list[str]()
    if on:
        template.template_of(lm)
    elif chat == "auto" and not template.has_template(lm):
        why = "the model has no chat template"
    elif chat == "auto":
        if task.style == "lm_eval":
            why = "the prompts are to be those of lm_eval, which has no turns by default"
        elif isinstance(first(), Generate):
            on, why = True, "the model has a chat template, and answers are generated"
        else:
            why = "choices are scored by their log-likelihoods"
        notes.append(f"chat: {'on' if on else 'off'} (auto: {why})")
    if system and not on:
        raise TaskError(
            f"{task} is to be asked with a system prompt, which is a turn, and is asked without turns ({why}). Ask it with "
            "chat=True, or write the text into its `description`."
        )
    if on and (unread := template.unread_kwargs(lm)):
        notes.append(f"the chat template does not read {', '.join(unread)}")
    if on and (system or task.description) and not template.takes_system(lm):
        notes.append("the chat template has no system turn: its text begins the first turn of the user")
    return Decision(on, tuple(notes))


@dataclass(frozen=True)
class Chat:
    """Makes the questions of a task turns of a conversation with the model.

    system  what stands before the description of the task in the system turn

    A template that has no system turn gets its text at the beginning of the first turn, and a blank line after it.
    """

    lm: Model
    task: Task
    system: str = ""

    def rendered(self, description: str, examples: Sequence[Question], question: Question) -> Rendered:
        """The conversation up to where the answer to the question begins. Raises TaskError if the template refuses it."""
        turns = [turn for shot in examples for turn in (("user", shot.prompt), ("assistant", _answer(shot)))]
        turns.append(("user", question.prompt))
        if question.answer_prefix:
            turns.append(("assistant", question.answer_prefix))
        if system := joined(self.system, description, self.task.fewshot_delimiter):
            if self._takes_system:
                turns.insert(0, ("system", system))
            else:
                turns[0] = ("user", f"{system.rstrip()}\n\n{turns[0][1]}")
        return template.render(self.lm, [{"role": role, "content": content} for role, content in turns])

    def choice(self, question: Question, choice: str) -> str:
        """The text of a choice after the rendered question."""
        return ("" if question.answer_prefix else self._blank) + _turn(question, choice)

    @functools.cached_property
    def _takes_system(self) -> bool:
        return template.takes_system(self.lm)

    @functools.cached_property
    def _blank(self) -> str:
        """What a choice begins with: what the template puts before an answer, and nothing where it is to be as in lm_eval."""
        return "" if self.task.style == "lm_eval" else template.blank_before_answers(self.lm)


def joined(first: str, second: str, delimiter: str = " ") -> str:
    """Two texts, with a delimiter between them if both are there and neither has a blank there (the rule of lm_eval)."""
    bare = first and second and not (first[-1].isspace() or second[0].isspace())
    return f"{first}{delimiter if bare else ''}{second}"


def after_prefix(question: Question, text: str) -> str:
    """An answer, after the prefix of answers if the question has one: without blanks at its beginning if the prefix ends so."""
    return text.lstrip() if question.answer_prefix[-1:].isspace() else text


def _turn(question: Question, text: str) -> str:
    """The answer as it stands in a turn of its own, or after the prefix of answers: nothing divides a turn from its prompt."""
    return after_prefix(question, text) if question.answer_prefix else text.lstrip()


def _answer(shot: Question) -> str:
    """The turn of the assistant that answers a few-shot example."""
    if not (answer := shot.answer_prefix + _turn(shot, shot.target)).strip():
        raise TaskError(f"the few-shot example {shot.prompt[-80:]!r} has no answer that the assistant could give.")
    return answer
