"""`vllm:FOLDER`: a model in vLLM's engine in this process. This package is then installed in vLLM's environment.

What is asked and read is what `server:` asks and reads of vLLM; the requests of a block are given to its scheduler together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pytest_lmeval.errors import ModelError, SpecError, StreamError, described
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._served import Asking, Scoring, ServedAnswer, ServerFacts, TokenScores, checked, checked_answer
from pytest_lmeval.models._servers import served_model
from pytest_lmeval.models._servers._tokenizer import encoder_of

BLOCK = 32  # requests for each that is under way, which are given to the scheduler together
SETTINGS = {"generation_config": "vllm", "seed": 0, "disable_log_stats": True}  # no default sampling of the model


class VllmHere:
    """vLLM's engine as a server. `Served` says what its methods do."""

    def __init__(self, engine: Any, facts: ServerFacts, spec: str, size: int, concurrency: int) -> None:
        self.engine, self.facts, self.spec, self.size, self.concurrency = engine, facts, spec, size, concurrency

    def score(self, asked: Sequence[Scoring], done: Callable[[int, TokenScores], None], *, at_once: int | None = None) -> None:
        from vllm import SamplingParams

        for number, found in self._run(
            [
                (one.ids, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=one.top, detokenize=False))
                for one in asked
            ],
            at_once,
        ):
            one, entries = asked[number], found.prompt_logprobs
            if len(entries) != len(one.ids) or entries[0] is not None:
                raise ModelError(f"{self.spec} gave {len(entries)} log-probabilities for {len(one.ids)} tokens of a prompt.")
            pairs = list(zip(entries[one.start :], one.ids[one.start :], strict=True))
            own = [entry[int(token)] for entry, token in pairs]
            top = [
                {int(token): float(best.logprob) for token, best in entry.items() if best.rank is None or best.rank <= one.top}
                for entry, _ in (pairs if one.top else ())
            ]
            logprobs = np.array([best.logprob for best in own], dtype=np.float64)
            ranks = np.array([best.rank - 1 for best in own], dtype=np.int64)
            done(number, checked(TokenScores(logprobs, ranks, top), one, self.spec))

    def answer(self, asked: Sequence[Asking], done: Callable[[int, ServedAnswer], None], *, at_once: int | None = None) -> None:
        from vllm import SamplingParams

        jobs = [
            (
                one.ids,
                SamplingParams(
                    max_tokens=one.max_tokens,
                    stop=list(one.stop),
                    stop_token_ids=list(one.ends),
                    include_stop_str_in_output=True,
                    temperature=one.temperature,
                    top_k=one.top_k,
                    top_p=one.top_p,
                    min_p=one.min_p,
                    seed=one.seed,
                    skip_special_tokens=False,
                    spaces_between_special_tokens=False,
                    logprobs=0,
                ),
            )
            for one in asked
        ]
        for number, found in self._run(jobs, at_once):
            answer = found.outputs[0]
            ids = list(answer.token_ids)
            logprobs = [float(entry[token].logprob) for entry, token in zip(answer.logprobs, ids, strict=True)]
            whole = ServedAnswer(answer.text, ids, logprobs, answer.finish_reason == "length")
            done(number, checked_answer(whole, asked[number], self.size, self.spec))

    def _run(self, jobs: Sequence[tuple[Sequence[int], Any]], at_once: int | None) -> Iterator[tuple[int, Any]]:
        """The number and the output of each job."""
        from vllm import TokensPrompt

        longest, size = self.facts.longest or 0, 1 if at_once == 1 else (at_once or self.concurrency * BLOCK)
        for ids, parameters in jobs:
            if len(ids) + parameters.max_tokens > longest:
                raise StreamError(
                    f"{self.spec} reads at most {longest:,} tokens, and {len(ids) + parameters.max_tokens:,} were asked for."
                )
        for begin in range(0, len(jobs), size):
            part = jobs[begin : begin + size]
            prompts = [TokensPrompt(prompt_token_ids=list(map(int, ids))) for ids, _ in part]
            found = self.engine.generate(prompts, [parameters for _, parameters in part], use_tqdm=False)
            yield from enumerate(found, start=begin)


def load(
    name: str,
    *,
    spec: str,
    dtype: torch.dtype | None = None,
    tokenizer: str = "",
    length: int | None = None,
    concurrency: int | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """The model of a folder or hub id in vLLM's engine.

    dtype   the precision that it computes in; by default as the checkpoint says
    length  tokens of a prompt and its answer, at most; by default as the checkpoint says

    Raises SpecError without vLLM, or if it cannot load the model.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
    except ImportError as error:
        raise SpecError(
            f"{spec} needs vLLM in this environment: install this package where vLLM is (pip install 'pytest-lmeval[hf]'), or "
            f"serve the model and ask server:URL."
        ) from error
    source = str(folder) if (folder := Path(name).expanduser()).is_dir() else name
    encoder, size = encoder_of(tokenizer or source, spec, trust_remote_code)
    told = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    options = {"max_model_len": length} if length else {}
    try:
        engine = vllm.LLM(model=source, dtype=told, trust_remote_code=trust_remote_code, **options, **SETTINGS)
        config = engine.llm_engine.vllm_config
    except Exception as error:
        raise SpecError(f"{spec} could not be loaded by vLLM: {described(error)}.") from error
    facts = ServerFacts(
        "vLLM, in this process,",
        str(vllm.__version__),
        name,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        longest=int(config.model_config.max_model_len),
        chunk=int(config.scheduler_config.max_num_batched_tokens),
        prefix_cache=bool(config.cache_config.enable_prefix_caching),
        settings={"block_size": config.cache_config.block_size, "quantization": config.model_config.quantization},
    )
    served = VllmHere(engine, facts, spec, size, concurrency or 8)
    return served_model(served, spec, encoder, size, f"vllm {source} {vllm.__version__} {facts.dtype}")
