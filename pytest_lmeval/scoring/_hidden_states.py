"""Add up the hidden states of one set of texts, or of two, by layer: sums that merge, with a few vectors kept to be plotted.

Of two sets, the texts of even and of odd number are added up apart. The direction that tells the sets apart is found in the one
half and tried on the other, so that the separation is not that of the texts it was chosen for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pytest_lmeval.errors import ArgumentError
from pytest_lmeval.records._metric import value_of
from pytest_lmeval.records._value import Value
from pytest_lmeval.statistics._moments import Directions, Moments, merged

KEPT = 64  # vectors of each set that are kept to be plotted
SHOWN = 64  # directions in the plot of explained variance
LEAST = 2  # texts of each half of a set from which a separation is computed
Z = 1.959964  # of a 95 % interval
ONE_SET = "there is one set of texts, and a contrast has two: hidden_states(lm, texts, other)."


@dataclass(eq=False)
class LayerStates:
    """The hidden states of one layer.

    first    moments of the first set: `count`, `mean` [d], `covariance` [d, d], `directions(most)`
    second   those of the second set; None if there is only one
    halves   moments of even and odd texts of each set, [sets][halves]; of one set a single part
    sampled  vectors of each set that are kept, [n, d] float32, and the half that each is of

    one_a_text: each vector is of another text, and not of another token
    """

    name: str
    halves: list[list[Moments]]
    sampled: list[tuple[Tensor, np.ndarray]]
    one_a_text: bool = True

    @cached_property
    def first(self) -> Moments:
        return merged(self.halves[0])

    @cached_property
    def second(self) -> Moments | None:
        return merged(self.halves[1]) if len(self.halves) > 1 else None

    @cached_property
    def both(self) -> Moments:
        """Moments of all vectors, of both sets."""
        return merged([part for parts in self.halves for part in parts])

    @cached_property
    def directions(self) -> Directions:
        """The principal directions of all vectors."""
        return self.both.directions()

    @cached_property
    def leading_directions(self) -> Directions:
        """The first `SHOWN` of them, in a small part of the memory of all."""
        return self.both.directions(SHOWN)

    @cached_property
    def difference(self) -> Tensor:
        """Mean of the first set minus mean of the second, [d]. Raises ArgumentError if there is only one set."""
        if self.second is None:
            raise ArgumentError(ONE_SET)
        return self.first.mean.cpu() - self.second.mean.cpu()

    @cached_property
    def direction(self) -> Tensor:
        """The difference of the two means, of length one. Raises ArgumentError if there is only one set, or no difference."""
        if not (length := float(self.difference.norm())):
            raise ArgumentError(f"both sets have the same mean at {self.name}, so no direction leads from one to the other.")
        return self.difference / length

    @cached_property
    def separation(self) -> Value | None:
        """By how many standard deviations of a set the means of the two lie apart, along the direction found in the other half
        of the texts; mean of both halves. Of a sketch it is a lower bound. None with fewer than two texts of a set in a half,
        or if nothing varies along the direction.

        Its interval holds for this direction, and for one vector a text.
        """
        if self.second is None or min(part.count for parts in self.halves for part in parts) < LEAST:
            return None
        found = [self._separation(tried) for tried in (0, 1)]
        if not all(map(math.isfinite, (value for value, _ in found))):
            return None
        mean, half_width = sum(value for value, _ in found) / 2, Z * math.sqrt(sum(error**2 for _, error in found)) / 2
        interval = (
            {"interval": (mean - half_width, mean + half_width)} if self.one_a_text else {"why": "Tokens of a text are alike."}
        )
        return value_of("separation_at_*", mean, n=self.both.count, **interval)

    def _separation(self, tried: int) -> tuple[float, float]:
        """The separation along the direction of the other half, and its standard error; nan if there is none."""
        own, along = [parts[tried] for parts in self.halves], self._direction_of(1 - tried)
        counts = [part.count for part in own]
        if along is None:
            return math.nan, math.nan
        within = sum((part.count - 1) * (part.variance(along) + part.error) for part in own) / (sum(counts) - 2)
        if within <= 0:
            return math.nan, math.nan
        distance = float((own[0].mean - own[1].mean).cpu() @ along) / math.sqrt(within)
        error = math.sqrt(sum(counts) / math.prod(counts) + distance**2 / (2 * sum(counts)))  # Hedges and Olkin 1985
        return distance, error

    def _direction_of(self, half: int) -> Tensor | None:
        """The difference of the means of a half, of length one; None if it has no text of a set, or no difference."""
        first, second = (parts[half] for parts in self.halves)
        difference = first.mean.cpu() - second.mean.cpu()
        length = float(difference.norm())
        return difference / length if first.count and second.count and length else None

    def plotted(self) -> list[tuple[list[float], list[float]]]:
        """Two coordinates of the vectors of each set that are kept: along the first two principal directions; of two sets,
        along the direction that tells them apart in the other half of the texts, and along the first principal direction across
        it."""
        axes = self.leading_directions.vectors
        if len(axes) < 2 - (self.second is not None):
            return []
        middle, found = self.both.mean.cpu(), []
        for vectors, half in self.sampled:
            centred = vectors.double() - middle
            if self.second is None:
                first, second = (centred @ axes[:2].T).T
            else:
                units = [unit for own in (1, 0) if (unit := self._direction_of(own)) is not None]
                if len(units) < 2:
                    return []
                along = torch.stack(units)[torch.from_numpy(half)]
                first = (centred * along).sum(dim=1)
                across = axes[0] - along * (along @ axes[0])[:, None]
                second = (centred * normalize(across, dim=1)).sum(dim=1)
            found.append((first.tolist(), second.tolist()))
        return found


@dataclass(eq=False, repr=False)
class HiddenStates(Mapping[str, LayerStates]):
    """The hidden states of texts by layer: a mapping from names of layers to `LayerStates`. A number means a position.

    about    what was read: model, layers, token, rank; only sums of the same are merged
    moments  [sets][halves], name of a layer -> its moments
    sample   of each set, the vectors that are kept
    texts    how many of each set were read
    skipped  how many had no token
    tokens   that were read
    """

    about: dict[str, Any]
    moments: list[list[dict[str, Moments]]]
    sample: list[Sample] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    skipped: int = 0
    tokens: int = 0

    @classmethod
    def empty(
        cls, about: dict[str, Any], sets: int, widths: Mapping[str, tuple[int, Any]], ranks: Mapping[str, int | None]
    ) -> HiddenStates:
        """Sums of nothing. `widths`: name of a layer -> its width, and the device on which it is added up."""
        parts = [
            [{name: Moments(width, ranks[name], device) for name, (width, device) in widths.items()} for _ in range(sets)]
            for _ in range(sets)
        ]
        return cls(about, parts, [Sample() for _ in range(sets)], [0] * sets)

    def __getitem__(self, layer: str | int) -> LayerStates:
        names = [*self.moments[0][0]]
        name = names[layer] if isinstance(layer, int) else layer
        halves = [[half[name] for half in parts] for parts in self.moments]
        sampled = [(own.vectors[name], own.halves) for own in self.sample if name in own.vectors]
        return LayerStates(name, halves, sampled, self.about["token"] != "all")

    def __repr__(self) -> str:
        return f"<hidden states of {' and '.join(map(str, self.texts))} texts at {', '.join(self)}>"

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.moments[0][0])

    def __len__(self) -> int:
        return len(self.moments[0][0])

    def add(self, which: int, texts: np.ndarray, positions: np.ndarray, vectors: Mapping[str, Tensor]) -> None:
        """Add vectors [n, d] of each layer to a set. `texts`, `positions`: [n] number of the text of each, and its token."""
        halves = texts % len(self.moments[which])
        for half, sums in enumerate(self.moments[which]):
            own = np.flatnonzero(halves == half)
            for name, moments in sums.items():
                moments.add(vectors[name] if len(own) == len(halves) else vectors[name][torch.from_numpy(own)])
        self.texts[which] += int((positions == 0).sum()) if self.about["token"] == "all" else len(texts)
        self.sample[which].add(which, texts, positions, halves, vectors)

    @staticmethod
    def merged(parts: Sequence[HiddenStates]) -> HiddenStates:
        """The sums of several parts of the texts, such as shards, which stay as they are. Raises ArgumentError unless they are
        of the same model, layers, token and rank."""
        if not parts:
            raise ArgumentError("there are no hidden states to merge; give one at least.")
        first = parts[0]
        for other in parts[1:]:
            differing = {key for key in {*first.about, *other.about} if first.about.get(key) != other.about.get(key)}
            if differing or len(first.moments) != len(other.moments):
                told = [f"{key} {first.about.get(key)!r} and {other.about.get(key)!r}" for key in sorted(differing)]
                raise ArgumentError(
                    f"hidden states of {'; '.join(told) or 'one set and of two'} cannot be merged: their sums mean other "
                    "things. Read all parts with the same model and arguments."
                )
        moments = [
            [
                {name: merged([part.moments[a][b][name] for part in parts]) for name in first}
                for b in range(len(first.moments[a]))
            ]
            for a in range(len(first.moments))
        ]
        sample = [Sample.merged([part.sample[a] for part in parts]) for a in range(len(first.moments))]
        texts = [sum(part.texts[a] for part in parts) for a in range(len(first.moments))]
        skipped, tokens = (sum(getattr(part, name) for part in parts) for name in ("skipped", "tokens"))
        return HiddenStates(dict(first.about), moments, sample, texts, skipped, tokens)


@dataclass
class Sample:
    """The vectors with the lowest of numbers that are drawn for each by its text and position: whatever parts they come in,
    the same are kept.

    drawn    [n] the numbers, ascending
    halves   [n] the half that each is of
    vectors  name of a layer -> [n, d] float32, on the CPU
    """

    drawn: np.ndarray = field(default_factory=lambda: np.empty(0))
    halves: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, which: int, texts: np.ndarray, positions: np.ndarray, halves: np.ndarray, vectors: Mapping[str, Tensor]
    ) -> None:
        drawn = _drawn(which, texts, positions)
        new = np.flatnonzero(drawn < (self.drawn[-1] if len(self.drawn) == KEPT else math.inf))
        new = new[np.argsort(drawn[new], kind="stable")][:KEPT]
        if len(new):
            rows = torch.from_numpy(new)
            taken = {name: part[rows.to(part.device)].float().cpu() for name, part in vectors.items()}
            self._keep([self, Sample(drawn[new], halves[new], taken)])

    def _keep(self, parts: Sequence[Sample]) -> None:
        parts = [part for part in parts if len(part.drawn)]
        drawn = np.concatenate([part.drawn for part in parts])
        order = np.argsort(drawn, kind="stable")[:KEPT]
        self.halves = np.concatenate([part.halves for part in parts])[order]
        rows = torch.from_numpy(order)
        self.vectors = {name: torch.cat([part.vectors[name] for part in parts])[rows] for name in parts[0].vectors}
        self.drawn = drawn[order]

    @staticmethod
    def merged(parts: Sequence[Sample]) -> Sample:
        whole = Sample()
        if any(len(part.drawn) for part in parts):
            whole._keep(parts)
        return whole


def _drawn(which: int, texts: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A number between 0 and 1 for each vector, the same in every run: splitmix64 of set, text and position."""
    with np.errstate(over="ignore"):
        mixed = texts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64)
        mixed = mixed * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(which + 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed / 2.0**64
