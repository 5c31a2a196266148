"""llama.cpp's own `/completion`: token ids in and out, and log-probabilities of what it generates, none of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.models._served import Asking, Scoring, ServedAnswer, ServerFacts, TokenScores
from pytest_lmeval.models._servers._client import Client
from pytest_lmeval.models._servers._kind import Job, count, numbers, was_cut

PATH = "/completion"
NO_SCORES = "llama.cpp answers with those of generated tokens alone"
EVERY_CHOICE = {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "typical_p": 1.0, "top_n_sigma": -1.0,
                "xtc_probability": 0.0, "dry_multiplier": 0.0, "mirostat": 0, "dynatemp_range": 0.0, "n_keep": 0,
                "ignore_eos": False, "samplers": ["top_k", "top_p", "min_p", "temperature"]}  # fmt: skip


@dataclass(frozen=True)
class LlamaCpp:
    """A server for generated answers."""

    facts: ServerFacts

    def scoring(self, asked: Scoring) -> Job:
        raise TypeError(NO_SCORES)

    def scores(self, asked: Scoring, answer: Any) -> TokenScores:
        raise TypeError(NO_SCORES)

    def asking(self, asked: Asking) -> Job:
        return PATH, {
            **EVERY_CHOICE,
            "prompt": list(map(int, asked.ids)),
            "n_predict": asked.max_tokens,
            "stop": list(asked.stop),
            "temperature": asked.temperature,
            "top_k": asked.top_k,
            "top_p": asked.top_p,
            "min_p": asked.min_p,
            "seed": asked.seed,
            "n_probs": 1,
            "return_tokens": True,
            "cache_prompt": True,
        }

    def answered(self, asked: Asking, answer: Any) -> ServedAnswer:
        if int(answer["tokens_evaluated"]) != len(asked.ids):
            raise ValueError(f"it read {answer['tokens_evaluated']} tokens of {len(asked.ids)}")
        if answer.get("truncated") and answer["stop_type"] == "limit" and len(answer["tokens"]) < asked.max_tokens:
            raise ValueError(f"its context was full after {len(answer['tokens'])} tokens of the answer")
        ids = [int(token) for token in answer["tokens"]]
        entries = answer.get("completion_probabilities", [])
        logprobs = numbers([entry["logprob"] for entry in entries]).tolist()
        if [int(entry["id"]) for entry in entries] != ids:
            logprobs = None
        return ServedAnswer(answer["content"], ids, logprobs, was_cut(answer["stop_type"], ("eos", "word"), "limit"))

    def tokenizing(self, text: str) -> Job | None:
        return "/tokenize", {"content": text, "add_special": False, "parse_special": False}

    def templating(self, messages: Sequence[dict[str, str]]) -> Job | None:
        return "/apply-template", {"messages": list(messages)}


def find(client: Client, model: dict[str, Any], dtype: str) -> LlamaCpp:
    """The server, as it describes itself."""
    props = client.described("/props")
    defaults = props.get("default_generation_settings")
    settings: dict[str, Any] = {name: props[name] for name in ("model_ftype", "total_slots") if name in props}
    return LlamaCpp(
        ServerFacts(
            "llama.cpp",
            str(props.get("build_info", "")),
            str(model["id"]),
            dtype=dtype,
            longest=count(defaults.get("n_ctx")) if isinstance(defaults, dict) else None,
            prefix_cache=True,
            no_scores=NO_SCORES,
            settings=settings,
        )
    )
