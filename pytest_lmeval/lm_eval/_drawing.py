"""Generate answers as lm_eval's own model of transformers, `hf`, does.

What a task does not say of how tokens are drawn, the generation config of the model says, and else transformers: from the 50
likeliest tokens. All models are asked so, of transformers or not, so that they can be compared.
"""

from __future__ import annotations

from typing import Any

from pytest_lmeval.errors import TaskError
from pytest_lmeval.models._model import Model
from pytest_lmeval.tasks._questions import Generate

TOP_K = 50  # of transformers, where neither the task nor the model says another
LIMITS = ("top_k", "top_p", "min_p")
MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
DEFAULT_TOKENS = 256
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "num_return_sequences": 1}
"""What else may stand beside these, with the value that changes nothing."""


def answers_to(lm: Model, prompt: str, options: dict[str, Any], *, times: int) -> list[Generate]:
    """The answers that a request of lm_eval asks for with these `generation_kwargs`: several only if they are drawn.

    Raises TaskError for an option that changes answers in a way that is not known here.
    """
    known = {"until", "do_sample", "temperature", *LIMITS, *MOST_TOKENS}
    if strange := [f"{name}={value!r}" for name, value in options.items() if name not in known and NEUTRAL.get(name) != value]:
        raise TaskError(f"its answers are to be generated with {', '.join(strange)}, which is not known here.")
    until = options.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(options.get("temperature") or 0.0)
    draws = options.get("do_sample")
    if draws is None:
        draws = temperature > 0
    elif draws and "temperature" not in options:
        temperature = 1.0
    temperature = temperature if draws else 0.0
    limits = _limits(lm, options) if temperature else {}
    most = next((int(options[name]) for name in MOST_TOKENS if options.get(name)), DEFAULT_TOKENS)
    one = Generate(prompt, (), tuple(text for text in stop if text), most, temperature, **limits)
    return [one] * (times if temperature else 1)


def unlike_lm_eval(lm: Model) -> str:
    """What the generation config of the model changes in lm_eval's answers, greedy ones too, and not here; empty: nothing."""
    config = getattr(lm.module, "generation_config", None)
    own = {name: getattr(config, name, None) for name in NEUTRAL}
    return ", ".join(f"{name}={value!r}" for name, value in own.items() if value is not None and value != NEUTRAL[name])


def _limits(lm: Model, options: dict[str, Any]) -> dict[str, Any]:
    """What limits the tokens that are drawn."""
    config = getattr(lm.module, "generation_config", None)
    own = {name: getattr(config, name, None) for name in LIMITS}
    given = {name: options.get(name, own[name]) for name in LIMITS}
    top_k = TOP_K if given["top_k"] is None else given["top_k"]
    return {**{name: value for name, value in given.items() if value is not None}, "top_k": top_k}
