"""Step a model as its policy allows. Only this package and training step models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from pytest_lmeval.engine._executor import Counts, Executor, Scored, Whole
from pytest_lmeval.engine._forked import Forked
from pytest_lmeval.engine._generation import Answer, OnText, Prompt, begin_answers
from pytest_lmeval.engine._policy import Policy, check, chunk_of, policy_for, refused, streaming_refused
from pytest_lmeval.engine._stream import Chunk, carried, in_windows
from pytest_lmeval.engine._tokens import Source, check_vocabulary, tokens_of
from pytest_lmeval.engine._tree import Request
from pytest_lmeval.errors import StreamError
from pytest_lmeval.models._model import Model, State

Sequenced = TypeVar("Sequenced", Request, Answer)


def likeliest(logits: Tensor, input_ids: Tensor) -> Tensor:
    """The most likely next ids [b, 1]. For frames of codes, the frame before: a step does not predict the next frame."""
    return logits[:, -1].argmax(-1, keepdim=True) if logits.ndim == 3 else input_ids[..., -1:]


class Engine:
    """Steps one model.

    policy     what is allowed, and how it is done; by default all that the model declares
    on_logits  called with the logits of each step, as the model returned them: [b, n, v] of its last n positions
    executor   reads and continues sequences instead of the model; texts are still stepped here
    counts     cost of reading sequences so far

    Raises Refused for a policy that asks for more than its certificate allows.
    """

    def __init__(
        self,
        lm: Model,
        policy: Policy | None = None,
        *,
        on_logits: Callable[[Tensor], None] | None = None,
        executor: Executor | None = None,
    ) -> None:
        policy = policy_for(lm) if policy is None else policy
        self.lm, self.policy = lm, policy if lm.stateful else replace(policy, carry=False)
        self.on_logits, self.executor, self.counts = on_logits, executor, Counts()
        self._executors: dict[bool, Executor] = {}
        check(lm, self.policy)

    @cached_property
    def chunk_size(self) -> int:
        """Tokens a step of a text."""
        return chunk_of(self.lm, self.policy)

    def step(self, input_ids: Tensor, state: State | None = None, *, keep: int | None = None) -> tuple[Tensor, State]:
        """One step without gradients (see `LanguageModel.step`), which may write to `state`."""
        with torch.no_grad():
            logits, state = self.lm.step(input_ids, state, keep=keep)
        logits = logits.detach()  # a model that learns as it reads may turn gradients on
        if self.on_logits is not None:
            self.on_logits(logits)
        return logits, state

    def steps(
        self, pieces: Iterable[Tensor], state: State | None = None, *, keep: int | None = None
    ) -> Iterator[tuple[Tensor, State]]:
        """Read pieces [b, t] of one sequence, whatever the policy says; yield logits and state after each."""
        for piece in pieces:
            logits, state = self.step(piece, state, keep=keep)
            yield logits, state
            del logits  # not kept alive during the next step

    def prefill(self, input_ids: Tensor, state: State | None = None, *, keep: int | None = 1) -> tuple[Tensor, State]:
        """Read [b, t] in as few steps as the policy allows; return logits of the last `keep` positions, and the state.

        state  after the tokens before, whose number has to be a multiple of `Policy.multiple`

        Raises Refused if the policy allows neither one step nor several.
        """
        if state is not None and (not self.policy.carry or (self.policy.single and input_ids.shape[-1] > 1)):
            why = f"Its state would be continued by {input_ids.shape[-1]} token(s), which the policy does not allow."
            raise refused(self.lm, self.policy, why, "Read the tokens before them in the same step.")
        longest, left = self.policy.longest, input_ids.shape[-1]
        if longest is None or left <= longest:
            return self.step(input_ids, state, keep=keep)
        size = longest - longest % self.policy.multiple
        if not self.policy.carry or self.policy.single or not size:
            why = f"It reads at most {longest} tokens in a step, and {left} were given; several steps would read them wrongly."
            raise refused(self.lm, self.policy, why, "Shorten the prompt.")
        found, wanted = [], left if keep is None else keep
        for part in torch.split(input_ids, size, dim=-1):
            left -= part.shape[-1]
            logits, state = self.step(part, state, keep=min(max(1, wanted - left), part.shape[-1]))
            found += [logits] * (wanted > left)
        return torch.cat(found or [logits[..., :0, :]], dim=-2), state

    def decode(
        self, input_ids: Tensor, state: State, count: int, choose: Callable[[Tensor, Tensor], Tensor] = likeliest
    ) -> Iterator[tuple[Tensor, State]]:
        """Read `count` tokens a row, one a step, starting with `input_ids` [b, 1]. Yield the next ids after each step, which
        `choose(logits, input_ids)` returns, and the state. Raises Refused if the policy does not allow single tokens."""
        if count and not (self.policy.carry and self.policy.multiple == 1):
            why = "Its state would be continued token by token, which the policy does not allow."
            raise refused(self.lm, self.policy, why, "Read the whole text again for each token, as engine.generate does.")
        for _ in range(count):
            logits, state = self.step(input_ids, state, keep=1)
            input_ids = choose(logits, input_ids)
            del logits  # not kept alive during the next step
            yield input_ids, state

    def stream(self, tokens: Source, *, state: State | None = None, position: int = 0, window: int = 0) -> Iterator[Chunk]:
        """Score a stream chunk by chunk, each target exactly once, with the state carried or in windows as the policy says.

        tokens    ids [T], or frames of codes [T, k], from `position`, or `window` if the policy has windows
        state     resume from this state, after the tokens before `position`
        position  of the token to resume at, in the stream
        window    position at which the current window begins

        Raises StreamError for a stream without a target or a token outside the vocabulary, NotFiniteError for a loss that is
        not finite, with its position, and Refused if the policy has no windows and does not carry the state.
        """
        pieces, windows = tokens_of(tokens, self.lm.codebooks), self.policy.windows
        if windows is not None:
            return in_windows(self, pieces, windows, state, position, window)
        if not self.policy.carry:
            raise streaming_refused(self.lm, self.policy)
        return carried(self, pieces, state, position)

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """The log-likelihood of each requested token, in the order of the requests; it may be infinite or nan. Raises
        StreamError for a token outside the vocabulary, and Refused for a prompt that the policy does not allow to be read."""
        self.refuse_unreadable(requests)
        executor = self._executor(self.policy.share)
        found = [scored for part in self._read_together(requests) for scored in executor.score(part)]
        if len(found) != len(requests):
            raise StreamError(f"the executor answered {len(found)} of {len(requests)} requests; it has to answer each.")
        return found

    def generate(self, prompts: Sequence[Prompt], on_text: OnText | None = None) -> list[Answer]:
        """The answer to each prompt, in order, generated token by token. No answer depends on another prompt.

        Raises TaskError for a tokenizer without `decode`, NotFiniteError for logits without a most likely token, and the errors
        of `score`.
        """
        self.refuse_unreadable(prompts)
        answers, choose = begin_answers(self.lm, prompts, on_text)
        executor = self._executor(self.policy.decode)
        for part in self._read_together(answers):
            executor.generate(part, choose)
        for number, answer in enumerate(answers):
            if not answer.why:
                raise StreamError(f"the executor left the answer to {answer.prompt.name} unfinished; it has to set `why`.")
            if self.executor is not None and on_text is not None and answer.judged is None:  # it chose the tokens itself
                answer.judged = on_text(number, answer.text)
        return answers

    def _read_together(self, sequences: Sequence[Sequenced]) -> list[Sequence[Sequenced]]:
        """The sequences in groups that know of each other: all, or each alone."""
        return [[one] for one in sequences] if self.policy.invariant else [sequences]

    def refuse_unreadable(self, sequences: Sequence[Request] | Sequence[Prompt]) -> None:
        """Raise StreamError for a model of codebooks, which has no prompts, and for a token outside of the vocabulary."""
        if self.lm.codebooks is not None:
            raise StreamError(f"{self.lm.spec} reads frames of codes: it has no prompts and no answers in words.")
        for sequence in sequences:
            check_vocabulary(sequence.ids, 0, self.lm)

    def _executor(self, forked: bool) -> Executor:
        if self.executor is not None:
            return self.executor
        if forked not in self._executors:
            self._executors[forked] = Forked(self) if forked else Whole(self)
        return self._executors[forked]
