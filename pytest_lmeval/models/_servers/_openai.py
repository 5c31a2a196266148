"""Any other server with `/v1/completions`: token ids where it takes them, else text; log-probabilities by `echo`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_lmeval.errors import SpecError, StreamError
from pytest_lmeval.models._identity import TOKENIZED
from pytest_lmeval.models._served import Asking, Scoring, ServedAnswer, ServerFacts, TokenScores
from pytest_lmeval.models._servers._client import Client
from pytest_lmeval.models._servers._kind import Job, count, first_is_none, numbers, refuse_unfinished

PATH = "/v1/completions"
ADDED = 2  # special tokens that a server may put around a text
TOP = 5  # the most log-probabilities that the protocol gives of a position


@dataclass(frozen=True)
class OpenAI:
    """A server of the OpenAI protocol.

    text_of  the text of ids, with special tokens written out, for servers that take no ids, if it is read back so
    begins   the id that such a server puts before each text itself; None: it puts none
    """

    facts: ServerFacts
    text_of: Callable[[Sequence[int]], str]
    begins: int | None = None

    def _prompt(self, ids: Sequence[int]) -> Any:
        if not self.facts.text_only:
            return list(map(int, ids))
        if self.begins is None:
            return self.text_of(ids)
        if not ids or int(ids[0]) != self.begins:
            raise StreamError(
                f"{self.facts.model} is served as text, and its server puts a token (id {self.begins}) before each. This "
                "prompt does not begin with it, so it cannot be asked as it is. Use a server that takes token ids."
            )
        return self.text_of(ids[1:])

    def scoring(self, asked: Scoring) -> Job:
        if asked.top > TOP:
            asked = replace(asked, top=TOP)
        return PATH, {
            "model": self.facts.model,
            "prompt": self._prompt(asked.ids),
            "echo": True,
            "logprobs": max(1, asked.top),
            "max_tokens": 1,
            "temperature": 0.0,
            "top_p": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def scores(self, asked: Scoring, answer: Any) -> TokenScores:
        """Entries are tokens of the prompt, and perhaps one that was generated."""
        found = answer["choices"][0]["logprobs"]
        entries, tokens, tops = found["token_logprobs"], found["tokens"], found.get("top_logprobs") or []
        count = len(asked.ids)
        if len(entries) not in (count, count + 1) or len(tokens) != len(entries):
            raise ValueError(f"{len(entries)} token_logprobs for {count} tokens (and one that is generated)")
        if int((answer.get("usage") or {}).get("prompt_tokens", count)) != count:
            raise ValueError(f"it read {answer['usage']['prompt_tokens']} tokens of {count}")
        first_is_none(entries)
        logprobs = numbers(entries[asked.start : count])
        more_likely = [
            sum(value is not None and value > own for token, value in (most or {}).items() if token != text)
            for own, text, most in zip(logprobs.tolist(), tokens[asked.start : count], tops[asked.start : count], strict=False)
        ]
        ranks = numbers(more_likely if len(more_likely) == len(logprobs) else [-1] * len(logprobs)).astype("int64")
        return TokenScores(logprobs, ranks)

    def asking(self, asked: Asking) -> Job:
        more: dict[str, Any] = {}
        if asked.top_k or asked.min_p:
            more = {"top_k": asked.top_k, "min_p": asked.min_p}
        return PATH, {
            "model": self.facts.model,
            "prompt": self._prompt(asked.ids),
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": asked.seed,
            "n": 1,
            **({"stop": list(asked.stop)[:4]} if asked.stop else {}),
            **more,
        }

    def answered(self, asked: Asking, answer: Any) -> ServedAnswer:
        choice = answer["choices"][0]
        if _read(answer) not in (None, len(asked.ids)):
            raise ValueError(
                f"it read {_read(answer)} tokens of {len(asked.ids)}: it has another tokenizer, or adds some of its own"
            )
        refuse_unfinished(choice["finish_reason"])
        return ServedAnswer(choice["text"], cut=choice["finish_reason"] == "length")

    def tokenizing(self, text: str) -> Job | None:
        return None

    def templating(self, messages: Sequence[dict[str, str]]) -> Job | None:
        return None


def find(client: Client, model: dict[str, Any], dtype: str, tokenizer: Any, text_of: Callable[[Sequence[int]], str]) -> OpenAI:
    """The server, as it answers to a short text: whether it takes ids, and whether it gives log-probabilities of a prompt."""
    longest = count(model.get("max_model_len")) or count(model.get("context_length"))
    facts = ServerFacts("OpenAI-compatible", "", str(model["id"]), dtype=dtype, longest=longest)
    ids = [int(token) for token in tokenizer.encode("The cat sat on the mat. ")[0]]
    kind = OpenAI(facts, text_of)
    path, payload = kind.asking(Asking(ids, 1))
    answer = client.post(path, payload, missing=True)
    if answer is None or _read(answer) not in (None, len(ids)):
        kind = OpenAI(replace(facts, text_only=True), text_of)
        answer = client.post(*kind.asking(Asking(ids, 1)))
        if _read(answer) == len(ids) + 1 and (begins := getattr(tokenizer, "bos", None)) is not None:
            kind, ids = replace(kind, begins=begins), [begins, *ids]
        elif (read := _read(answer)) not in (None, len(ids)):
            raise SpecError(
                f"{client.spec}: a text of {len(ids)} tokens here is {read} tokens there. Give the tokenizer of the model: "
                "tokenizer=FOLDER."
            )
    _check_count(client, kind, tokenizer)
    scored = Scoring(ids, 1)
    try:
        echoed = client.post(*kind.scoring(scored), missing=True)
        if echoed is None:
            raise ValueError("it refuses `echo` with `logprobs`")
        kind.scores(scored, echoed)
    except (LookupError, TypeError, ValueError) as error:
        why = (
            f"asked with echo and logprobs, {error or 'it answers otherwise'}"
            if not isinstance(error, LookupError | TypeError)
            else ("asked with echo and logprobs, it answers without any")
        )
        return replace(kind, facts=replace(kind.facts, no_scores=why))
    return kind


def _check_count(client: Client, kind: OpenAI, tokenizer: Any) -> None:
    """Raise SpecError if a text that tells tokenizers apart is another number of tokens there."""
    count = len(tokenizer.encode(TOKENIZED)[0])
    if kind.facts.longest is not None and kind.facts.longest <= count + ADDED:
        return
    asked = {"model": kind.facts.model, "prompt": TOKENIZED, "max_tokens": 1, "temperature": 0.0}
    read = _read(client.post(PATH, asked, missing=True))
    if read is not None and not count <= read <= count + ADDED:
        raise SpecError(
            f"{client.spec}: a text of {count} tokens here is {read} tokens there, so its tokenizer is another. Ids would mean "
            "other words: give the tokenizer of the model, tokenizer=FOLDER."
        )


def _read(answer: Any) -> int | None:
    """Tokens of the prompt that it read, if it says so."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    found = (usage or {}).get("prompt_tokens")
    return found if isinstance(found, int) else None


def text_of(tokenizer: Any, spec: str) -> Callable[[Sequence[int]], str]:
    """The function from ids to a text that is read back as these ids. It raises StreamError where there is none."""
    reading = tokenizer.with_special_tokens() if hasattr(tokenizer, "with_special_tokens") else tokenizer
    inner = getattr(tokenizer, "tokenizer", None)

    def text(ids: Sequence[int]) -> str:
        plain = list(map(int, ids))
        found = tokenizer.decode(plain) if inner is None else str(inner.decode(plain, skip_special_tokens=False))
        again = [int(token) for token in reading.encode(found)[0]]
        if again != plain:
            at = next(
                (at for at, (one, own) in enumerate(zip(again, plain, strict=False)) if one != own), min(len(again), len(plain))
            )
            raise StreamError(
                f"{spec} takes texts alone, and the text of these {len(plain)} tokens is read back as {len(again)} others, "
                f"from token {at} on: {found[:60]!r}. Its answer would be to another prompt. Use a server that takes token ids."
            )
        return found

    return text
