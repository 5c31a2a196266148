"""What a certificate permits: how a model that keeps these laws, and not those, may be read."""

from __future__ import annotations

from typing import Any

from pytest_lmeval._stream import default_chunk_size
from pytest_lmeval.errors import Refused
from pytest_lmeval.laws._verdict import ONLY_ASIDE, multiple_of
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import INEXACT, NON_CAUSAL, STEP_ONLY
from pytest_lmeval.scoring._plan import ROLLING_WINDOW


def how_to_share(lm: Model, certificate: Any, batch_size: int) -> dict[str, Any]:
    """How the questions of a task may be read under this certificate: what they share once, or each prompt whole.

    Raises `Refused` where even a whole prompt says nothing.
    """
    broken, verdict = certificate.broken, certificate.verdict
    if broken & {"causality", "repeat", "isolation", "sums"}:
        raise Refused(
            f"{lm.spec} is {verdict}:\n{certificate.why_not()}\nWhat it says of an answer would depend on what comes after it, "
            "or on what was read before; a score made of that would mean nothing."
        )
    rows = 1 if broken & {"rows", "prefix"} else batch_size  # filling makes a text longer
    multiple = multiple_of(verdict)
    share = lm.stateful and not broken & {"fork", "prefix"} and (not broken & {"splits", "steps"} or multiple is not None)
    carry = lm.stateful and not broken & {"fork", "prefix", "steps"} and multiple is None
    longest = certificate.limit_tokens if certificate.limit_is_step else None
    if longest is not None and not share:
        raise Refused(
            f"{lm.spec} reads at most {longest} tokens at once, and is {verdict}:\n{certificate.why_not()}\nA longer prompt "
            "cannot be read in one step, and would be wrong in several."
        )
    why = "" if share and multiple is None else verdict if lm.stateful else "the model has no state to carry"
    return {"batch_size": rows, "share": share, "carry": carry, "multiple": multiple or 1, "longest": longest, "why": why}


def exact_chunk_size(lm: Model, certificate: Any, asked: int | None, window: int | str | None) -> int | None:
    """The chunk size to stream with under this certificate; None is any. Raises `Refused` where no way is exact.

    A model whose state is wrong can still be read in windows, each in one step, so that nothing is carried.
    """
    broken = certificate.broken - ONLY_ASIDE
    verdict = certificate.verdict
    most = certificate.limit_tokens if certificate.limit_is_step else None  # tokens that the model takes at once
    default = min(most or 1 << 30, default_chunk_size(lm.vocab_size))
    if not broken:
        return asked if most is None else min(asked or default, most)
    if (k := 1 if broken == {"splits"} and verdict in (STEP_ONLY, INEXACT) else multiple_of(verdict)) is not None:
        if asked is None:
            return 1 if k == 1 else max(k, default // k * k)
        if asked == k or (k > 1 and asked % k == 0):
            return asked
        how = "one token at a time" if k == 1 else f"in chunks of multiples of {k}"
        raise Refused(
            f"{lm.spec} is exact {how} only, and chunk_size={asked} was asked for:\n{certificate.why_not()}\n"
            f"A perplexity streamed that way would be wrong, and may look good. Leave chunk_size out, or set it to {k}."
        )
    if (isinstance(window, int) or window == "lm_eval") and not broken & {"repeat", "isolation", "causality", "sums"}:
        return window if isinstance(window, int) else lm.limit or ROLLING_WINDOW
    raise Refused(
        f"{lm.spec} is {verdict}:\n{certificate.why_not()}\n"
        "A perplexity streamed with it would be wrong, and may look good. "
        + (
            "It cannot be scored as a language model at all."
            if verdict == NON_CAUSAL
            else "Repair what makes the same text read differently the second time."
            if broken & {"repeat", "isolation"}
            else "Repair its state, or score it in windows that carry none: window=512."
        )
    )
