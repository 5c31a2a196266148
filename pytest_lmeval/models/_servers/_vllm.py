"""vLLM over HTTP: token ids in and out, prompt log-probabilities with ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pytest_lmeval.models._served import Asking, Scoring, ServedAnswer, ServerFacts, TokenScores
from pytest_lmeval.models._servers._client import Client
from pytest_lmeval.models._servers._kind import Job, count, first_is_none, numbers, same_ids, was_cut

PATH = "/v1/completions"
EVERY_CHOICE = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
                "frequency_penalty": 0.0, "n": 1, "min_tokens": 0, "ignore_eos": False}  # fmt: skip
"""What its `generation_config` would decide otherwise."""


@dataclass(frozen=True)
class Vllm:
    """vLLM's own completions. Prompt log-probabilities do not read its prefix cache; one token has to be generated."""

    facts: ServerFacts

    def scoring(self, asked: Scoring) -> Job:
        return PATH, {
            **EVERY_CHOICE,
            "model": self.facts.model,
            "prompt": list(map(int, asked.ids)),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": asked.top,
            "return_token_ids": True,
        }

    def scores(self, asked: Scoring, answer: Any) -> TokenScores:
        choice = answer["choices"][0]
        entries = choice["prompt_logprobs"]
        if choice.get("prompt_token_ids") is not None:
            same_ids(choice["prompt_token_ids"], asked.ids, "prompt_token_ids")
        if len(entries) != len(asked.ids):
            raise ValueError(f"{len(entries)} prompt_logprobs for {len(asked.ids)} tokens")
        first_is_none(entries)
        own = [entry[str(token)] for entry, token in zip(entries[asked.start :], asked.ids[asked.start :], strict=True)]
        ranks = np.array([int(one["rank"]) - 1 for one in own], dtype=np.int64)
        top = [
            {
                int(token): float(one["logprob"])
                for token, one in entry.items()
                if one["rank"] is None or one["rank"] <= asked.top
            }
            for entry in (entries[asked.start :] if asked.top else ())
        ]
        return TokenScores(numbers([one["logprob"] for one in own]), ranks, top)

    def asking(self, asked: Asking) -> Job:
        return PATH, {
            **EVERY_CHOICE,
            "model": self.facts.model,
            "prompt": list(map(int, asked.ids)),
            "max_tokens": asked.max_tokens,
            "stop": list(asked.stop),
            "stop_token_ids": list(asked.ends),
            "include_stop_str_in_output": True,
            "temperature": asked.temperature,
            "top_k": asked.top_k,
            "top_p": asked.top_p,
            "min_p": asked.min_p,
            "seed": asked.seed,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }

    def answered(self, asked: Asking, answer: Any) -> ServedAnswer:
        choice = answer["choices"][0]
        ids, logprobs = choice.get("token_ids"), choice["logprobs"]["token_logprobs"]
        if ids is not None and len(ids) != len(logprobs):
            raise ValueError(f"{len(logprobs)} log-probabilities for {len(ids)} tokens of an answer")
        ids = None if ids is None else list(map(int, ids))
        return ServedAnswer(choice["text"], ids, numbers(logprobs).tolist(), was_cut(choice["finish_reason"]))

    def tokenizing(self, text: str) -> Job | None:
        return "/tokenize", {"model": self.facts.model, "prompt": text, "add_special_tokens": False}

    def templating(self, messages: Sequence[dict[str, str]]) -> Job | None:
        return "/tokenize", {"model": self.facts.model, "messages": list(messages), "add_generation_prompt": True}


def find(client: Client, model: dict[str, Any], dtype: str) -> Vllm:
    """The server, as it describes itself."""
    version, metrics = client.described("/version"), client.text("/metrics")
    labels = dict(re.findall(r'(\w+)="([^"]*)"', next(iter(re.findall(r"^vllm:cache_config_info\{(.*)\}", metrics, re.M)), "")))
    caching = {"True": True, "False": False}.get(labels.get("enable_prefix_caching", ""))
    settings = {name: labels[name] for name in ("block_size", "cache_dtype") if name in labels}
    facts = ServerFacts(
        "vLLM",
        str(version.get("version", "")),
        str(model["id"]),
        dtype=dtype,
        longest=count(model.get("max_model_len")),
        prefix_cache=caching,
        settings=settings | ({"base_model": model["parent"]} if model.get("parent") else {}),
    )
    return Vllm(facts)
