"""Choose the next token of answers, decode them, and end them. Each row has its own random numbers, and depends on no other.

A stop is searched for in the text with its special tokens written out, since chat models end their turns with one; what judges
and metrics see is the text before the stop, without special tokens, and without half a character at its end. What the model
thinks is taken out before all that, with its markers and the blanks after them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pytest_lmeval.engine._losses import score
from pytest_lmeval.engine._results import Counts
from pytest_lmeval.engine._tokens import ids_of
from pytest_lmeval.errors import NotFiniteError, StreamError, TaskError
from pytest_lmeval.models._model import Model

OnText: TypeAlias = "Callable[[int, str], bool | None]"
"""(number of the prompt, text so far) -> None to continue, or a truth value that ends the answer."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how its answer is generated. Raises StreamError for values that make no sense.

    ids          [n], n >= 1
    name         of its row: seeds the random numbers together with `seed`, and is named in errors
    max_tokens   of the answer, at least one
    stop         texts that end the answer and are not part of it: the first in the text does. Special tokens are written as in
                 the vocabulary: "<|im_end|>"
    temperature  0 takes the most likely token; otherwise logits are divided by it before a token is drawn
    thinking     texts between which the model thinks; None: it does not
    thinks       whether the prompt ends with the first of these
    top_k        draw from this many of the likeliest tokens; 0: from all
    top_p        then from the likeliest ones that together have this probability
    min_p        then from those at least this times as likely as the likeliest
    repeat       which of several answers to the row it is: each has random numbers of its own
    """

    ids: np.ndarray
    name: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    thinking: tuple[str, str] | None = None
    thinks: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", ids_of(self.ids, f"the prompt of {self.name}"))
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise StreamError(f"the prompt of {self.name} has stop={self.stop!r}: expected a tuple of non-empty texts.")
        if self.max_tokens < 1 or not 0 <= self.temperature < np.inf:
            raise StreamError(
                f"the prompt of {self.name} has max_tokens={self.max_tokens} and temperature={self.temperature}; "
                "expected at least one token, and a finite temperature of 0 or more."
            )


@dataclass(eq=False)
class Answer:
    """The answer to one prompt, while it is generated.

    ids       generated so far
    logprobs  of each of these under the model's own logits, whatever the temperature, in nats
    text      decoded from `ids`, truncated before the stop that ended it; without thoughts and special tokens, and without an
              incomplete character at its end
    special   (position in `decoded`, own text) of each special token
    judged    the truth value that `on_text` returned
    read      tokens read for it
    why       it ended: stop, end (the model's own), judged, length, or "thinking", of which there was no end; empty while it is
              unfinished
    counts    of the batch that it was generated in, if it is the first of it
    decoded   all of `ids`, without special tokens
    thought   what the model thought
    thinks    whether it has not ended thinking
    """

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    special: list[tuple[int, str]] = field(default_factory=list)
    judged: bool | None = None
    read: int = 0
    why: str = ""
    counts: Counts = field(default_factory=Counts)
    decoded: str = ""
    thought: str = ""
    thinks: bool = False

    def __post_init__(self) -> None:
        self.thinks = self.prompt.thinks and not self.why

    def take(self, other: Answer) -> None:
        """Become another answer to the prompt."""
        for each in fields(self):
            if each.name != "prompt":
                setattr(self, each.name, getattr(other, each.name))


def begin_answers(
    lm: Model, prompts: Sequence[Prompt], on_text: OnText | None
) -> tuple[list[Answer], Callable[[Tensor, list[Answer]], None], Callable[[Answer, int, float], None]]:
    """An answer to each prompt; a function that chooses the next token of b answers from logits [b, v]; and one that takes a
    token, of this log-probability, as the next one of an answer."""
    tokenizer: Any = lm.tokenizer
    if not hasattr(tokenizer, "decode"):
        raise TaskError(f"the tokenizer of {lm.spec} has no decode(ids) -> text, which makes texts of answers. Add the method.")
    ends = getattr(tokenizer, "ends", (getattr(tokenizer, "eos", None),))
    special: Mapping[int, str] = getattr(tokenizer, "special", {})
    answers = [Answer(prompt) for prompt in prompts]
    numbers = {id(answer): number for number, answer in enumerate(answers)}
    generators: dict[int, np.random.Generator] = {}

    def choose(logits: Tensor, rows: list[Answer]) -> None:
        _check_finite(logits, rows, lm)
        tokens = logits.argmax(1).tolist()
        for index, row in enumerate(rows):
            if row.prompt.temperature:
                if not row.ids:  # also of an answer that begins again
                    generators[id(row)] = _generator(row.prompt)
                tokens[index] = _sample(logits[index], row.prompt, generators[id(row)])
        nll, _ = score(logits, torch.tensor(tokens, device=logits.device))
        for row, token, loss in zip(rows, tokens, nll.tolist(), strict=True):
            take(row, token, -loss)

    def take(row: Answer, token: int, logprob: float) -> None:
        number = numbers[id(row)]
        if token in ends:
            row.why = "end"
        else:
            _append(row, token, logprob, tokenizer, special)
        if row.thinks:
            row.why = row.why and "thinking"
        if on_text is not None and (row.why or not row.thinks) and (judged := on_text(number, row.text)) is not None:
            row.judged, row.why = judged, row.why or "judged"

    return answers, choose, take


def take_text(row: Answer, text: str) -> None:
    """Take a text whose tokens are not known as the whole answer."""
    row.decoded = text
    if _read_text(row):
        row.why = "stop"


def _append(row: Answer, token: int, logprob: float, tokenizer: Any, special: Mapping[int, str]) -> None:
    """Append a token to an answer; end the answer at a stop or at its largest length.

    special  id -> text of the tokens that `decode` of the tokenizer leaves out
    """
    row.ids.append(token)
    row.logprobs.append(logprob)
    if token in special:
        row.special.append((len(row.decoded), special[token]))
    else:
        row.decoded = whole_characters(tokenizer.decode(row.ids), row.decoded)
    if _read_text(row):
        row.why = "stop"
    elif len(row.ids) >= row.prompt.max_tokens:
        row.why = "length"


def whole_characters(decoded: str, before: str) -> str:
    r"""A decoded text without the U+FFFD at its end, which stand for bytes of a character that is not complete yet.

    before  the same of one token less. Some decoders replace whole characters before such bytes too, until all are complete:
            then this stays.

    >>> whole_characters("caf\ufffd", "caf"), whole_characters("café", "caf"), whole_characters("\ufffd\ufffd\ufffd", "é")
    ('caf', 'café', 'é')
    """
    whole = decoded.rstrip("\ufffd")
    return before if whole != decoded and len(whole) < len(before) else whole


def _read_text(row: Answer) -> bool:
    """Set the text and the thought of an answer from what is decoded. Returns whether there is a stop in the text."""
    written, special = _written(row)
    spans, row.thinks = _thoughts(written, row.prompt)
    inner = (_without(written[begin:end], _moved(special, [(0, begin)])).strip() for _, begin, end, _ in spans)
    row.thought = "\n".join(filter(None, inner))
    thoughts = [(begin, after) for begin, _, _, after in spans]
    said, special = _without(written, thoughts), _moved(special, thoughts)
    stops = [index for stop in row.prompt.stop if (index := said.find(stop)) >= 0]
    row.text = _without(said[: min(stops, default=None)], special)
    return bool(stops)


def _written(row: Answer) -> tuple[str, list[tuple[int, int]]]:
    """What is decoded, with its special tokens written out, and where these begin and end."""
    parts, spans, begin, length = [], [], 0, 0
    for position, token in row.special:
        length += position - begin
        parts += [row.decoded[begin:position], token]
        spans.append((length, length + len(token)))
        begin, length = position, length + len(token)
    return "".join([*parts, row.decoded[begin:]]), spans


def _thoughts(written: str, prompt: Prompt) -> tuple[list[tuple[int, int, int, int]], bool]:
    """Where each thought begins with its marker (of the first one the prompt may have it), and after that; where it ends, and
    after its marker and blanks; and whether the last one has no end."""
    found: list[tuple[int, int, int, int]] = []
    if prompt.thinking is None:
        return found, False
    first, last = prompt.thinking
    begin, inside = (0, 0) if prompt.thinks else (written.find(first), len(first))
    while begin >= 0:
        if (end := written.find(last, begin + inside)) < 0:
            return [*found, (begin, begin + inside, len(written), len(written))], True
        rest = written[end + len(last) :]
        after = len(written) - len(rest.lstrip())
        found.append((begin, begin + inside, end, after))
        begin, inside = written.find(first, after), len(first)
    return found, False


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without these parts of it, which may end after it."""
    for begin, end in reversed(spans):
        text = text[:begin] + text[end:]
    return text


def _moved(spans: Sequence[tuple[int, int]], cuts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The places of spans in a text without these cuts; those that begin in one are gone."""
    kept = [span for span in spans if not any(begin <= span[0] < end for begin, end in cuts)]
    lost = [sum(end - begin for begin, end in cuts if end <= span[0]) for span in kept]
    return [(begin - less, end - less) for (begin, end), less in zip(kept, lost, strict=True)]


def _check_finite(logits: Tensor, rows: list[Answer], lm: Model) -> None:
    """Raise NotFiniteError for a row with nan or +inf, or of -inf alone; single logits of -inf are masked tokens."""
    wrong = (torch.isnan(logits) | (logits == torch.inf)).any(1) | torch.isneginf(logits).all(1)
    for row in wrong.nonzero().flatten().tolist():
        raise NotFiniteError(
            f"{lm.spec} gave logits that are not finite after {len(rows[row].ids)} generated token(s) of row "
            f"{rows[row].prompt.name}, in {lm.dtype} on {lm.device}, so no token can be chosen. Finished questions are kept. "
            "Look for an overflow."
        )


def warped(logits: Tensor, prompt: Prompt) -> Tensor:
    """Logits [v] in float64 on the CPU, divided by the temperature, and -inf for tokens that are not to be drawn.

    In the order and with the rules of transformers: top_k, of which ties are kept, then top_p, then min_p.
    """
    scores = logits.double().cpu() / prompt.temperature
    if 0 < prompt.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(prompt.top_k).values[-1], -torch.inf)
    if prompt.top_p < 1:
        ordered, indices = scores.sort()  # the least likely first
        unlikely = ordered.softmax(0).cumsum(0) <= 1 - prompt.top_p
        unlikely[-1] = False
        scores = scores.index_fill(0, indices[unlikely], -torch.inf)
    if prompt.min_p > 0:
        chances = scores.softmax(0)
        scores = scores.masked_fill(chances < prompt.min_p * chances.max(), -torch.inf)
    return scores


def _sample(logits: Tensor, prompt: Prompt, generator: np.random.Generator) -> int:
    """A token drawn from logits [v]."""
    cumulative = torch.softmax(warped(logits, prompt), 0).cumsum(0).numpy()
    draw = generator.random() * cumulative[-1]
    return int(np.searchsorted(cumulative, draw, side="right").clip(max=len(cumulative) - 1))


def _generator(prompt: Prompt) -> np.random.Generator:
    """The random numbers of one answer to a row."""
    again = f"/{prompt.repeat}" if prompt.repeat else ""
    digest = hashlib.sha256(f"{prompt.seed}/{prompt.name}{again}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))
