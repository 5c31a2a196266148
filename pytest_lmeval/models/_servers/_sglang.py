"""SGLang's own `/generate`: token ids in and out, log-probabilities of a prompt from a position on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_lmeval.models._served import Asking, Scoring, ServedAnswer, ServerFacts, TokenScores
from pytest_lmeval.models._servers._client import Client
from pytest_lmeval.models._servers._kind import Job, count, numbers, ranks_of, was_cut

PATH = "/generate"
EVERY_CHOICE = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
                "frequency_penalty": 0.0, "min_new_tokens": 0, "ignore_eos": False, "n": 1}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
RANKED = 5  # most likely tokens that are asked for, since it gives no ranks: `token_accuracy_top5`


@dataclass(frozen=True)
class Sglang:
    """The entry at `logprob_start_len` is always null, so it is set one token before the first that is wanted; what comes
    before is then read from the radix cache."""

    facts: ServerFacts

    def scoring(self, asked: Scoring) -> Job:
        return PATH, {
            "input_ids": list(map(int, asked.ids)),
            "sampling_params": {**EVERY_CHOICE, "max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": asked.start - 1,
            "top_logprobs_num": max(asked.top, RANKED),
        }

    def scores(self, asked: Scoring, answer: Any) -> TokenScores:
        meta, wanted = answer["meta_info"], list(map(int, asked.ids[asked.start :]))
        if int(meta.get("prompt_tokens", len(asked.ids))) != len(asked.ids):
            raise ValueError(f"it read {meta['prompt_tokens']} tokens of {len(asked.ids)}")
        entries, tops = meta["input_token_logprobs"], meta["input_top_logprobs"]
        if len(entries) != len(wanted) + 1 or len(tops) != len(entries):
            raise ValueError(f"{len(entries)} input_token_logprobs for {len(wanted) + 1} tokens from logprob_start_len on")
        if entries[0][0] is not None:
            raise ValueError(f"its first entry is {entries[0][0]!r}, not null")
        if (found := [int(entry[1]) for entry in entries[1:]]) != wanted:
            at = next(at for at, (one, own) in enumerate(zip(found, wanted, strict=True)) if one != own)
            raise ValueError(f"id {found[at]} in place of {wanted[at]} at token {asked.start + at}")
        logprobs = numbers([entry[0] for entry in entries[1:]])
        top = [{int(one[1]): float(one[0]) for one in most} for most in tops[1:]]
        return TokenScores(logprobs, ranks_of(logprobs, wanted, top), top if asked.top else ())

    def asking(self, asked: Asking) -> Job:
        drawn: dict[str, Any] = {"sampling_seed": asked.seed} if asked.temperature else {}
        return PATH, {
            "input_ids": list(map(int, asked.ids)),
            "sampling_params": {
                **EVERY_CHOICE,
                "max_new_tokens": asked.max_tokens,
                "stop": list(asked.stop),
                "stop_token_ids": list(asked.ends),
                "temperature": asked.temperature,
                "top_k": asked.top_k or -1,
                "top_p": asked.top_p,
                "min_p": asked.min_p,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "no_stop_trim": True,
                **drawn,
            },
            "return_logprob": True,
        }

    def answered(self, asked: Asking, answer: Any) -> ServedAnswer:
        meta = answer["meta_info"]
        entries = meta["output_token_logprobs"]
        ids = [int(entry[1]) for entry in entries]
        if (own := answer.get("output_ids")) is not None and list(own) != ids:
            raise ValueError(f"{len(entries)} log-probabilities for the {len(own)} tokens of an answer, or of others")
        return ServedAnswer(
            answer["text"],
            ids,
            numbers([entry[0] for entry in entries]).tolist(),
            was_cut(meta["finish_reason"]["type"]),
        )

    def tokenizing(self, text: str) -> Job | None:
        return "/tokenize", {"model": self.facts.model, "prompt": text, "add_special_tokens": False}

    def templating(self, messages: Sequence[dict[str, str]]) -> Job | None:
        return None


def find(client: Client, model: dict[str, Any], dtype: str) -> Sglang:
    """The server, as it describes itself."""
    info = client.described("/get_server_info") or client.described("/server_info")
    own = client.described("/get_model_info") or client.described("/model_info")
    longest = (
        count(told.get(name)) for told, name in ((model, "max_model_len"), *((one, "context_length") for one in (info, own)))
    )
    settings = {
        name: info[name] for name in ("enable_deterministic_inference", "attention_backend", "quantization") if name in info
    }
    told = str(info.get("dtype") or "")
    told = {"half": "float16", "float": "float32"}.get(told, told)
    facts = ServerFacts(
        "SGLang",
        str(info.get("version", "")),
        str(model["id"]),
        dtype=told if told in DTYPES else dtype,
        longest=next(filter(None, longest), None),
        chunk=count(info.get("chunked_prefill_size")),
        prefix_cache=None if "disable_radix_cache" not in info else not info["disable_radix_cache"],
        settings=settings | ({"weights": own["model_path"]} if own.get("model_path") else {}),
    )
    return Sglang(facts)
