"""`server:URL`: a model behind an address, which is asked over HTTP: vLLM, SGLang, llama.cpp, or any OpenAI-compatible server.

The address is asked what it is. Token ids are sent wherever the server takes them, so that what is scored is what was encoded
here. Each answer is checked before it counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from pytest_lmeval.errors import LmevalError, ModelError, SpecError, StreamError, described, nearest, some
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._served import (
    Asking,
    Scoring,
    ServedAnswer,
    ServerFacts,
    TokenScores,
    checked,
    checked_answer,
    no_step,
)
from pytest_lmeval.models._servers import _llama_cpp, _openai, _sglang, _vllm
from pytest_lmeval.models._servers._client import Client
from pytest_lmeval.models._servers._kind import Kind
from pytest_lmeval.models._servers._tokenizer import check_tokenizer, encoder_of, tokenizer_of

T = TypeVar("T")
ENDPOINT = re.compile(r"/v1(/(models|completions|chat/completions))?$")
SPARE = 2  # tokens of a sequence that a request needs beside those read: the last target, and one that has to be generated


@dataclass
class HttpServed:
    """A server of some kind, and its client.

    size   of the vocabulary
    names  under which the model may answer, beside that by which it is asked
    """

    client: Client
    kind: Kind
    spec: str
    size: int
    names: list[str] = field(default_factory=list)

    @property
    def facts(self) -> ServerFacts:
        return self.kind.facts

    @property
    def concurrency(self) -> int:
        return self.client.concurrency

    def score(self, asked: Sequence[Scoring], done: Callable[[int, TokenScores], None], *, at_once: int | None = None) -> None:
        for one in asked:
            self._refuse_long(len(one.ids) + 1)

        def read(number: int, answer: Any) -> None:
            one = asked[number]
            done(number, checked(self._read(lambda: self.kind.scores(one, answer), answer), one, self.spec))

        self.client.each([self.kind.scoring(one) for one in asked], read, at_once=at_once)

    def answer(self, asked: Sequence[Asking], done: Callable[[int, ServedAnswer], None], *, at_once: int | None = None) -> None:
        for one in asked:
            self._refuse_long(len(one.ids) + one.max_tokens)

        def read(number: int, answer: Any) -> None:
            one = asked[number]
            done(number, checked_answer(self._read(lambda: self.kind.answered(one, answer), answer), one, self.size, self.spec))

        self.client.each([self.kind.asking(one) for one in asked], read, at_once=at_once)

    def tokenized(self, text: str) -> list[int] | None:
        """The ids of a text by the server's own tokenizer; None if it cannot be asked."""
        job = self.kind.tokenizing(text)
        answer = None if job is None else self.client.post(*job, missing=True)
        return list(map(int, answer["tokens"])) if isinstance(answer, dict) and isinstance(answer.get("tokens"), list) else None

    def templated(self, messages: Sequence[dict[str, str]]) -> list[int] | str | None:
        """The prompt that the server's chat template makes of messages, as ids or as a text; None if it cannot be asked."""
        job = self.kind.templating(messages)
        answer = None if job is None else self.client.post(*job, missing=True)
        if not isinstance(answer, dict):
            return None
        return list(map(int, answer["tokens"])) if "tokens" in answer else answer.get("prompt")

    def _refuse_long(self, tokens: int) -> None:
        if self.facts.longest is not None and tokens > self.facts.longest:
            raise StreamError(
                f"{self.spec} reads at most {self.facts.longest:,} tokens, those that it generates included, and {tokens:,} "
                "were asked for. Shorten the prompt or the answer, or serve it with a larger context."
            )

    def _read(self, read: Callable[[], T], answer: Any) -> T:
        """What `read` makes of an answer. Raises ModelError for one of another model, or of another form."""
        named = answer.get("model") if isinstance(answer, dict) else None
        if named and named not in (self.facts.model, *self.names):
            raise ModelError(
                f"{self.spec}: an answer came from the model {named!r}, and {self.facts.model!r} was asked. Is a router behind "
                "the address? Give the address of one server, or the name of one model: model=NAME."
            )
        try:
            return read()
        except LmevalError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{self.spec} ({self.facts}) gave an answer that is none to what was asked ({described(error)}): "
                f"{json.dumps(answer)[:300]}. It is not used: numbers read from it would be of something else."
            ) from error


def load(
    url: str,
    *,
    spec: str,
    tokenizer: str = "",
    model: str = "",
    dtype: torch.dtype | None = None,
    concurrency: int | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """The model behind an address.

    tokenizer  a folder or hub id, or "bytes"; by default that which the server names
    model      the name of one of several models that it serves
    dtype      the precision that it computes in, where it does not tell

    Raises SpecError for an address that names no server, another model behind it, or another tokenizer, and ServerError if it
    cannot be reached.
    """
    specs.check_address(spec, url)
    base = ENDPOINT.sub("", url.rstrip("/"))
    client = Client(base, spec, concurrency)
    chosen, names = _chosen(client, model, spec)
    name = tokenizer or tokenizer_of(chosen, spec)
    encoder, size = encoder_of(name, spec, trust_remote_code)
    told = "" if dtype is None else str(dtype).removeprefix("torch.")
    owner = str(chosen.get("owned_by", "")).lower()
    found: Kind
    if owner == "vllm" or (owner not in ("sglang", "llamacpp") and client.described("/version").get("version")):
        found = _vllm.find(client, chosen, told)
    elif owner == "sglang" or client.described("/get_model_info").get("model_path"):
        found = _sglang.find(client, chosen, told)
    elif owner == "llamacpp" or "default_generation_settings" in client.described("/props"):
        found = _llama_cpp.find(client, chosen, told)
    else:
        found = _openai.find(client, chosen, told, encoder, _openai.text_of(encoder, spec))
    if told and found.facts.dtype not in ("", told):
        raise SpecError(f"{spec} says that the server computes in {told}, and {found.facts} says {found.facts.dtype}.")
    served = HttpServed(client, found, spec, size, names)
    if not isinstance(found, _openai.OpenAI):  # which is asked for no ids, and was compared when it was found
        check_tokenizer(served, encoder, name)
    return served_model(served, spec, encoder, size, f"{base} {found.facts} {found.facts.model} {told}")


def served_model(served: Any, spec: str, tokenizer: Any, vocab_size: int, identity: str) -> Model:
    """The model that a server serves."""
    longest = served.facts.longest
    return Model(
        no_step(served, spec),
        spec,
        form=f"served by {served.facts}",
        stateful=False,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        context_length=None if longest is None else max(1, longest - SPARE),
        source=SimpleNamespace(fingerprint=identity),
    )


def _chosen(client: Client, model: str, spec: str) -> tuple[dict[str, Any], list[str]]:
    """What the server says of the model, and its other names. Raises SpecError unless it is there."""
    listed = client.described("/v1/models", missing=(404, 405)).get("data")
    found = [
        one for one in (listed if isinstance(listed, list) else []) if isinstance(one, dict) and isinstance(one.get("id"), str)
    ]
    if not found:
        raise SpecError(f"{spec}: {client.url}/v1/models lists no model, so this is no server of language models.")
    names = [str(one["id"]) for one in found]
    if model and model not in names:
        raise SpecError(
            f"{spec} asks for the model {model!r}, and {client.url} serves {some(names)}.{nearest(model, names)} Numbers would "
            "be of another model."
        )
    bases = [one for one in found if not one.get("parent")]
    if not model and len(bases) != 1:
        raise SpecError(f"{spec}: {client.url} serves {some(names)}; say which: server:{client.url},model={names[0]}.")
    chosen = found[names.index(model)] if model else bases[0]
    aliases = chosen.get("aliases")
    return chosen, list(map(str, aliases)) if isinstance(aliases, list) else []
