"""Step a model as its policy allows. Only this package and training step models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from pytest_lmeval.engine._executor import Executor, Whole
from pytest_lmeval.engine._forked import Forked
from pytest_lmeval.engine._generation import Answer, OnText, Prompt, begin_answers
from pytest_lmeval.engine._joined import Joined
from pytest_lmeval.engine._memory import fitting_chunks, with_less, with_smaller_chunks
from pytest_lmeval.engine._packed import Packed
from pytest_lmeval.engine._policy import Policy, check, chunk_of, policy_for, refused, streaming_refused
from pytest_lmeval.engine._results import Counts, Results, Scored
from pytest_lmeval.engine._served import ServedReader, in_windows as served_windows, side_by_side as served_side_by_side
from pytest_lmeval.engine._state_rows import selection
from pytest_lmeval.engine._stream import Chunk, carried, in_windows, side_by_side
from pytest_lmeval.engine._tokens import Source, Tokens, check_vocabulary, tokens_of
from pytest_lmeval.engine._tree import Request
from pytest_lmeval.errors import OutOfMemory, StreamError
from pytest_lmeval.models._failures import NoMemory, unless_full
from pytest_lmeval.models._model import Model, State
from pytest_lmeval.records._share import WHOLE, Share

Sequenced = TypeVar("Sequenced", Request, Answer)
T = TypeVar("T")


def likeliest(logits: Tensor, input_ids: Tensor) -> Tensor:
    """The most likely next ids [b, 1]. For frames of codes, the frame before: a step does not predict the next frame."""
    return logits[:, -1].argmax(-1, keepdim=True) if logits.ndim == 3 else input_ids[..., -1:]


class Engine:
    """Steps one model.

    policy     what is allowed, and how it is done; by default all that the model declares. If memory runs out, it becomes one
               that takes less, down to one row and one token a step
    on_logits  called with the logits of each step, as the model returned them: [b, n, v] of its last n positions
    executor   reads and continues sequences instead of the model; texts are still stepped here
    counts     cost of reading sequences so far
    less       what was reduced since memory is short, in words; empty if nothing was
    top        most likely tokens that chunks of a served model hold with each target

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
        self.asked, self.less, self.top = self.policy, "", 0
        self._executors: dict[bool, Executor] = {}  # by whether they may continue states
        self._step_shape = (1, 1)  # rows and tokens of the last step
        check(lm, self.policy)

    @cached_property
    def chunk_size(self) -> int:
        """Tokens a step of a text."""
        return chunk_of(self.lm, self.policy)

    def step(self, input_ids: Tensor, state: State | None = None, *, keep: int | None = None) -> tuple[Tensor, State]:
        """One step without gradients (see `LanguageModel.step`), which may write to `state`."""
        self._step_shape = (input_ids.shape[0], input_ids.shape[-1])
        with torch.no_grad():
            logits, state = self.lm.step(input_ids, state, keep=keep)
        logits = logits.detach()  # a model that learns as it reads may turn gradients on
        if self.on_logits is not None:
            self.on_logits(logits)
        return logits, state

    def packed_step(
        self, input_ids: Tensor, state: State, positions: Tensor, visible: Tensor, wanted: Tensor, *, more: bool = False
    ) -> tuple[Tensor, State]:
        """One step over tokens of several sequences in one row, without gradients (see `Packing.step`)."""
        self._step_shape = (1, input_ids.shape[-1])
        with torch.no_grad():
            logits, state = self.lm.packed_step(input_ids, state, positions, visible, wanted, more=more)
        logits = logits.detach()
        if self.on_logits is not None:
            self.on_logits(logits[None])
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

    def stream(
        self, tokens: Source, *, state: State | None = None, position: int = 0, window: int = 0, share: Share = WHOLE
    ) -> Iterator[Chunk]:
        """Score a stream chunk by chunk, each target exactly once, with the state carried or in windows as the policy says.

        tokens    ids [T], or frames of codes [T, k], from `position`, or `window` if the policy has windows
        state     resume from this state, after the tokens before `position`
        position  of the token to resume at, in the stream
        window    position at which the current window begins
        share     of the windows; a stream whose state is carried is read whole

        Raises StreamError for a stream without a target or a token outside the vocabulary, NotFiniteError for a loss that is
        not finite, with its position, and Refused if the policy has no windows and does not carry the state.
        """
        pieces, windows = tokens_of(tokens, self.lm.codebooks), self.policy.windows
        if windows is not None and self.lm.served is not None:
            return served_windows(self, pieces, windows, position, window, share)
        if windows is not None:
            return in_windows(self, pieces, windows, state, position, window, share)
        if not self.policy.carry:
            raise streaming_refused(self.lm, self.policy)
        return carried(self, pieces, state, position)

    def stream_rows(self, texts: Sequence[Tokens]) -> list[Chunk]:
        """Score short texts as rows of one padded batch, of fewer rows if memory runs out (see `_stream.side_by_side`)."""
        if self.lm.served is not None:
            return served_side_by_side(self, texts)
        chunks: list[Chunk] = []
        while left := texts[len(chunks) :]:
            rows = left[: self.policy.batch_size]
            found = unless_full(partial(side_by_side, self, rows)) if len(rows) > 1 else side_by_side(self, rows)
            if isinstance(found, NoMemory):
                self._take_less(with_less(self.policy, *self._step_shape), found.wanted)
            else:
                chunks += found
        return chunks

    def score(self, requests: Sequence[Request], results: Results[Scored] | None = None) -> list[Scored]:
        """The log-likelihood of each requested token, in the order of the requests; it may be infinite or nan.

        results  those that are there are not read again; new ones are added as each batch ends

        Raises StreamError for a token outside the vocabulary, Refused for a prompt that the policy does not allow to be read,
        and OutOfMemory if a single token of one row does not fit.
        """
        self.refuse_unreadable(requests)
        found = []
        for part, known in self._read_together(requests, Results() if results is None else results):
            found += self._within_memory(partial(self._score, part, known))
        if len(found) != len(requests):
            raise StreamError(f"the executor answered {len(found)} of {len(requests)} requests; it has to answer each.")
        return found

    def _score(self, requests: Sequence[Request], results: Results[Scored]) -> list[Scored]:
        if self.lm.served is not None and self.executor is None:
            return ServedReader(self).score(requests, results)
        return self._executor(self.policy.share).score(requests, results)

    def generate(
        self, prompts: Sequence[Prompt], on_text: OnText | None = None, results: Results[Answer] | None = None
    ) -> list[Answer]:
        """The answer to each prompt, in order, generated token by token. No answer depends on another prompt.

        results  those that are there are not generated again; new ones are added as each batch ends

        Raises TaskError for a tokenizer without `decode`, NotFiniteError for logits without a most likely token, and the errors
        of `score`.
        """
        self.refuse_unreadable(prompts)
        answers, choose, take = begin_answers(self.lm, prompts, on_text)

        def attempt(part: Sequence[Answer], known: Results[Answer]) -> None:
            for number, answer in enumerate(part):
                if number not in known.found:  # begun, perhaps, when memory ran out
                    answer.take(Answer(answer.prompt))
            if self.lm.served is not None and self.executor is None:
                ServedReader(self).generate(part, take, known, judged=on_text is not None)
                return
            self._executor(self.policy.decode).generate(part, choose, known)

        for part, known in self._read_together(answers, Results() if results is None else results):
            self._within_memory(partial(attempt, part, known))
        for number, answer in enumerate(answers):
            if not answer.why:
                raise StreamError(f"the executor left the answer to {answer.prompt.name} unfinished; it has to set `why`.")
            whole = self.executor is not None or self.lm.served is not None  # who answers so has chosen the tokens itself
            if whole and on_text is not None and answer.judged is None:
                answer.judged = on_text(number, answer.text)
        return answers

    def _read_together(
        self, sequences: Sequence[Sequenced], results: Results[T]
    ) -> list[tuple[Sequence[Sequenced], Results[T]]]:
        """The sequences in groups that know of each other, all, or each alone; and the results of each group."""
        if not self.policy.invariant:
            return [(sequences, results)]
        return [([one], results.alone(number)) for number, one in enumerate(sequences)]

    def _within_memory(self, work: Callable[[], T]) -> T:
        """What `work` returns. If memory runs out, it is done again with half the rows, then with half the tokens a step."""
        if self.executor is not None:
            return work()
        counts = replace(self.counts)
        while isinstance(found := unless_full(work), NoMemory):
            self.counts = replace(counts)
            self._take_less(with_less(self.policy, *self._step_shape), found.wanted)
        return found

    def take_smaller_chunks(self, wanted: int | None = None) -> None:
        """Halve the chunks of a text, which did not fit into memory. Raises OutOfMemory if that is not possible."""
        self._take_less(with_smaller_chunks(self.lm, self.policy), wanted)

    def fit_chunks(self, read: int, held: int, count: int) -> None:
        """Halve the chunks of a text until the next `count` fit by estimate, after `read` tokens with a state of `held` bytes;
        leave them as they are if none fit."""
        smaller = fitting_chunks(self.lm, self.policy, read, held, count)
        if smaller is not self.policy:
            self._take_less(smaller, None)

    def is_short(self, read: int, held: int, count: int) -> bool:
        """Whether `fit_chunks` would halve them."""
        return fitting_chunks(self.lm, self.policy, read, held, count) is not self.policy

    def _take_less(self, policy: Policy | None, wanted: int | None) -> None:
        """Read as this policy says from here on. Raises OutOfMemory if there is none."""
        rows, tokens = self._step_shape
        if policy is None:
            size = "" if wanted is None else f": an allocation of {wanted:,} bytes ({wanted / 2**30:.1f} GiB) failed"
            less = "and cannot be read in smaller steps" if tokens > 1 else "and there is no smaller one"
            raise OutOfMemory(
                f"{self.lm.spec} on {self.lm.device}: a step of {rows} row(s) of {tokens:,} token(s) does not fit into memory"
                f"{size}, {less}. Nothing finished is lost. Take weights of fewer bits (@bf16), a shorter text or window, or a "
                "machine with more memory.",
                wanted,
            )
        self.policy = policy
        self._executors.clear()  # and the states that they hold
        self.__dict__.pop("chunk_size", None)
        asked, now, chunk = self.asked, policy, chunk_of(self.lm, self.asked)
        parts = [
            (f"batches of {now.batch_size:,} instead of {asked.batch_size:,}", now.batch_size != asked.batch_size),
            (f"steps of at most {now.longest or 0:,} tokens", now.longest is not None and now.longest != asked.longest),
            (f"chunks of {self.chunk_size:,} tokens instead of {chunk:,}", now.chunk_size != asked.chunk_size),
        ]
        self.less = f"memory is short, so it was read in {', '.join(what for what, less in parts if less)}"

    def refuse_unreadable(self, sequences: Sequence[Request] | Sequence[Prompt]) -> None:
        """Raise StreamError for a model of codebooks, which has no prompts, and for a token outside of the vocabulary."""
        if self.lm.codebooks is not None:
            raise StreamError(f"{self.lm.spec} reads frames of codes: it has no prompts and no answers in words.")
        for sequence in sequences:
            check_vocabulary(sequence.ids, 0, self.lm)

    def _executor(self, forks: bool) -> Executor:
        """What reads sequences; `forks`: whether it may continue states."""
        if self.executor is not None:
            return self.executor
        forks = forks or self.policy.pack
        if forks not in self._executors:
            self._executors[forks] = self._kind(forks)(self)
        return self._executors[forks]

    def _kind(self, forks: bool) -> type[Packed | Joined | Forked | Whole]:
        """What reads sequences here best; to find it takes a fingerprint of the model."""
        policy = self.policy
        if policy.pack:
            return Packed
        if forks and policy.share and policy.batch_size > 1 and (rows := selection(self.lm)) is not None and rows.joins:
            return Joined
        return Forked if forks else Whole
