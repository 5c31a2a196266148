"""Say what the differences between a model and its reference point to, by how they lie over the positions of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pytest_lmeval.measures._agreement_sums import Piece, packed, unpacked
from pytest_lmeval.models._chat import has_template, render
from pytest_lmeval.models._model import Model

ALARM = 1.05  # of the mean exp |difference|, as those who train on answers of a server set it
ROUNDINGS = 12  # of 1 in the coarser precision, that a difference may have on average by rounding alone
LEAST = 1e-4  # nats
EARLY = 32  # tokens before a target that count as the beginning of a window
GROWS = 3.0  # times the early differences that late ones are, where positions are read otherwise
SINGLE = 0.02  # of the mean difference, up to which there is none after a single token
SMALL = 0.2  # nats of a mean difference, up to which coarser numbers explain it
FEW = 16  # targets of a part of a window that say anything
BEFORE, AFTER = 24, 4  # tokens of the text around the worst place
TEMPLATE = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And  three?"},
)


@dataclass
class Differences:
    """The difference of each target's loss, and how many tokens were read before it in its window.

    worst     the place with the largest difference
    rounding  of 1 in the coarser precision of the two models
    template  how their chat templates differ, in words
    """

    sizes: list[np.ndarray] = field(default_factory=list)
    offsets: list[np.ndarray] = field(default_factory=list)
    worst: dict[str, Any] = field(default_factory=dict)
    rounding: float = 0.0
    template: str = ""
    _recent: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    _document: int = -1

    def add(self, ours: Piece, theirs: Piece) -> None:
        size = np.abs(ours.nll - theirs.nll)
        if ours.document != self._document:
            self._document, self._recent = ours.document, self._recent[:0]
        at = int(size.argmax()) if len(size) else 0
        if len(size) and (not self.worst or size[at] > self.worst["difference"]):
            around = np.concatenate([self._recent, ours.ids])
            place = len(self._recent) + at
            self.worst = {
                "difference": float(size[at]),
                "token": ours.start + at,
                "document": ours.document,
                "id": int(ours.ids[at]),
                "lm": -float(ours.nll[at]),
                "reference": -float(theirs.nll[at]),
                "_ids": [
                    part.tolist() for part in np.split(around[max(0, place - BEFORE) : place + AFTER], [min(place, BEFORE)])
                ],
            }
        self._recent = np.concatenate([self._recent, ours.ids])[-BEFORE:]
        self.sizes.append(size.astype(np.float32))
        self.offsets.append(ours.offsets.astype(np.int32))

    def explain(self, lm: Model, reference: Any) -> None:
        """Note what is to be known of the two models: the text around the worst place, the coarser precision, and how their
        chat templates differ."""
        self.rounding = max(torch.finfo(one.dtype).eps for one in (lm, reference))
        if not self.sizes:
            return
        before, after = self.worst.pop("_ids")
        if hasattr(lm.tokenizer, "decode"):
            self.worst["text"] = f"{_decoded(lm, before)}>>>{_decoded(lm, after[:1])}<<<{_decoded(lm, after[1:])}"
        self.template = _templates(lm, reference)

    def details(self) -> dict[str, Any]:
        """The details of a record: the worst place with the text around it, the mean difference by position, and in words what
        the pattern points to; no words if the precision explains all."""
        sizes, offsets = np.concatenate(self.sizes), np.concatenate(self.offsets)
        words = [*_pattern(sizes, offsets, self.rounding), *([self.template] if self.template else [])]
        return {"worst": self.worst, "difference_by_position": _course(sizes, offsets), "explanation": words}

    def to_json(self) -> dict[str, Any]:
        """Everything of a text that was read to its end, exactly."""
        arrays = {"sizes": packed(self.sizes), "offsets": packed(self.offsets)}
        return {**arrays, "worst": self.worst, "rounding": self.rounding, "template": self.template}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Differences:
        return cls(**{**data, "sizes": [unpacked(data["sizes"])], "offsets": [unpacked(data["offsets"])]})

    @classmethod
    def merged(cls, parts: Sequence[Differences]) -> Differences:
        """The differences over a text of which each part holds a share."""
        return cls(
            [array for part in parts for array in part.sizes],
            [array for part in parts for array in part.offsets],
            max((part.worst for part in parts), key=lambda worst: worst.get("difference", -1.0)),
            max(part.rounding for part in parts),
            next((part.template for part in parts if part.template), ""),
        )


def _pattern(sizes: np.ndarray, offsets: np.ndarray, rounding: float) -> list[str]:
    """What the differences of two models point to, of which the coarser has this relative rounding."""
    mean, exp = float(sizes.mean()), float(np.exp(np.minimum(sizes, 50.0)).mean())
    expected = max(LEAST, ROUNDINGS * rounding)
    if mean <= expected and exp <= ALARM:
        return []
    early, late = sizes[offsets <= EARLY], sizes[offsets > EARLY]
    last = sizes[offsets > offsets.max() // 2]
    found = f"the log-probabilities of targets differ by {mean:.3g} nats on average (mean exp |difference| {exp:.4g})"
    if exp > ALARM:
        found += f", more than the alarm of {ALARM} that is usual where answers of a server are trained on"
    if min(len(early), len(late)) < FEW:
        return [f"{found}; the text is too short to tell where they come from."]
    ratio = float(last.mean()) / max(float(early.mean()), 1e-12)
    where = f"{early.mean():.3g} nats within the first {EARLY} tokens of a window, {last.mean():.3g} in its second half"
    first = sizes[offsets <= 1]  # after a single token, which has no other to attend to
    if ratio >= GROWS or (len(first) > 1 and first.max() <= SINGLE * mean):
        grows = ratio >= GROWS
        how = "They grow with the position" if grows else "After a single token there is none, and then there is"
        also = "" if grows else " So are queries and keys of other weights: look at an adapter that changes these alone."
        return [
            f"{found}. {how}: {where}. Positions are read otherwise: look at rope theta and scaling, at "
            f"the window of the attention, and at the precision of the KV cache.{also}"
        ]
    if mean <= SMALL:
        return [
            f"{found}. They are small, and alike everywhere: {where}. So is coarser arithmetic: look at the precision of the "
            "weights (a quantized twin), of the activations and of the KV cache. So are weights that training has moved a "
            "little: look at the adapter, and at the step of the checkpoint."
        ]
    return [
        f"{found}. They are there from the first tokens on: {where}. So are other weights: look at the checkpoint, its "
        "revision and its adapter, at a coarse quantization (4 bits), and at a server that scales logits first "
        "(logprobs of processed logits)."
    ]


def _course(sizes: np.ndarray, offsets: np.ndarray) -> dict[str, float]:
    """The mean difference by the number of tokens before the target, in octaves."""
    octaves = np.floor(np.log2(np.maximum(offsets, 1))).astype(int)
    return {
        f"{2**octave}-{2 ** (octave + 1) - 1}": float(sizes[octaves == octave].mean()) for octave in np.unique(octaves).tolist()
    }


def _templates(lm: Model, reference: Any) -> str:
    """That a server's chat template writes another prompt than that of the tokenizer here, in words; empty if it does not, or
    does not tell."""
    for one, other in ((lm, reference), (reference, lm)):
        if one.served is None or not hasattr(one.served, "templated"):
            continue
        theirs = one.served.templated(TEMPLATE)
        if theirs is None:
            continue
        if other.served is not None and hasattr(other.served, "templated"):
            ours: Any = other.served.templated(TEMPLATE)
        elif has_template(other):
            ours = _rendered(other, as_text=isinstance(theirs, str))
        else:
            continue
        if ours is not None and type(ours) is type(theirs) and ours != theirs:
            return (
                f"the chat template of {one.spec} writes another prompt than that of {other.spec}: {_shown(one, theirs)!r} "
                f"in place of {_shown(other, ours)!r}. Answers to the same messages are to different prompts."
            )
    return ""


def _rendered(lm: Model, *, as_text: bool) -> str | list[int]:
    text = render(lm, TEMPLATE).text
    tokenizer: Any = lm.tokenizer
    reading = tokenizer.with_special_tokens() if hasattr(tokenizer, "with_special_tokens") else tokenizer
    return text if as_text else list(map(int, reading.encode(text)[0]))


def _shown(lm: Model, prompt: str | list[int]) -> str:
    return (prompt if isinstance(prompt, str) else _decoded(lm, prompt))[-120:]


def _decoded(lm: Model, ids: Sequence[int]) -> str:
    """The text of ids, with special tokens where the tokenizer can write them."""
    tokenizer: Any = lm.tokenizer
    inner = getattr(tokenizer, "tokenizer", None)
    return str(tokenizer.decode(ids) if inner is None else inner.decode(list(ids), skip_special_tokens=False)) if ids else ""
