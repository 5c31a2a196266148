"""Add up the mean and the covariance of vectors as they come, in float64: exactly, or in few rows with a bound of the error.

A batch is added, and two sums are merged, by the update of Chan, Golub and LeVeque (1979), which subtracts no large numbers.

With a `rank`, the covariance is kept as a sketch of at most twice so many rows by Frequent Directions (Liberty, KDD 2013;
Ghashami et al., SIAM J. Comput. 2016): when they are full, each squared singular value is reduced by the first one that is
dropped. `Moments.lost` adds these up, so the error is known and not only probable: in every direction, the sketch has at most
`lost` less than the exact sums, and never more. It is at most the squared distance of the rows from their best approximation
of rank k, divided by rank - k, in whatever order they come.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

PIECE = 1024  # rows that are centred in float64 at once


@dataclass(frozen=True)
class Directions:
    """The principal directions of a set of vectors, by falling variance.

    vectors    [k, d], of length one; the entry of the largest size of each is positive
    variances  [k] along them (of a sketch at most `error` too small)
    error      bound of the error of each variance; 0.0 if the covariance is exact
    total      variance over all d directions, exact
    """

    vectors: Tensor
    variances: Tensor
    error: float
    total: float

    @property
    def explained(self) -> Tensor:
        """The fraction of the variance along each direction, [k]."""
        return self.variances / self.total if self.total else torch.zeros_like(self.variances)


class Moments:
    """Sums over vectors of `width` numbers.

    count    of the vectors
    mean     [d]
    scatter  [d, d], the sum of (x - mean)(x - mean)'; with a `rank` rows [m, d], m <= 2 rank, of which scatter'scatter stands
             for it
    total    trace of the exact sum
    lost     bound of what a direction of the sketch lacks
    """

    def __init__(self, width: int, rank: int | None = None, device: torch.device | str = "cpu") -> None:
        self.rank, self.count, self.total, self.lost = rank, 0, 0.0, 0.0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = self.mean.new_zeros(width if rank is None else 0, width)

    def add(self, rows: Tensor) -> None:
        """Add vectors [n, d]."""
        for piece in torch.split(rows, PIECE):
            if len(piece):
                piece = piece.to(self.mean)
                mean = piece.mean(dim=0)
                self._take(len(piece), mean, piece - mean)

    def merge(self, other: Moments) -> None:
        """Add all vectors of another sum of the same width and rank."""
        if not other.count:
            return
        scatter, mean = other.scatter.to(self.mean), other.mean.to(self.mean)
        if self.rank is None:
            self.scatter += scatter
            self.total += other.total
            self._take(other.count, mean, scatter[:0])
        else:
            self.lost += other.lost
            sketched = _sum_of_squares(scatter)
            self._take(other.count, mean, scatter)
            self.total += other.total - sketched

    def _take(self, count: int, mean: Tensor, centred: Tensor) -> None:
        """Add `count` vectors of this mean whose scatter is centred'centred, and the scatter between the two means."""
        between = ((mean - self.mean) * math.sqrt(self.count * count / (self.count + count)))[None]
        self.total += _sum_of_squares(centred) + _sum_of_squares(between)
        self.mean += (mean - self.mean) * (count / (self.count + count))
        self.count += count
        if self.rank is None:
            for rows in (centred, between):
                self.scatter.addmm_(rows.T, rows)
            return
        self.scatter = torch.cat([self.scatter, centred, between])
        if len(self.scatter) > 2 * self.rank:
            self.lost += self._shrink(self.rank)

    def _shrink(self, rank: int) -> float:
        """Reduce the sketch to `rank` rows; return by how much each direction has less at most.

        By the eigenvectors of the smaller of its two products with itself, which takes a tenth of the time of a decomposition
        into singular values; what is lost in rounding is a part in 1e16 of the largest square.
        """
        rows = self.scatter
        if len(rows) > rows.shape[1]:
            squares, vectors = torch.linalg.eigh(rows.T @ rows)
            directions = vectors.T.flip(0)[:rank]
        else:
            squares, vectors = torch.linalg.eigh(rows @ rows.T)
            directions = normalize(vectors.T.flip(0)[:rank] @ rows, dim=1, eps=1e-300)
        squares = squares.flip(0).clamp(min=0)
        cut = float(squares[rank]) if len(squares) > rank else 0.0
        self.scatter = (squares[:rank] - cut).clamp(min=0).sqrt()[:, None] * directions
        return cut

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance [d, d], float64; nan for fewer than two vectors. Of a sketch, what it stands for."""
        scatter = self.scatter if self.rank is None else self.scatter.T @ self.scatter
        return scatter / (self.count - 1) if self.count > 1 else torch.full_like(scatter, math.nan)

    @property
    def error(self) -> float:
        """Bound of the error of the variance along any direction; 0.0 if the covariance is exact."""
        return self.lost / max(1, self.count - 1)

    def variance(self, direction: Tensor) -> float:
        """The variance along a direction [d] of length one; of a sketch, at most `error` too small."""
        along = self.scatter @ direction.to(self.scatter)
        return float(along @ (direction.to(along) if self.rank is None else along)) / max(1, self.count - 1)

    def directions(self, most: int | None = None) -> Directions:
        """The first principal directions, at most `most`, and no more than have a variance: fewer than vectors."""
        freedom = max(1, self.count - 1)
        if self.rank is None:
            found, vectors = torch.linalg.eigh(self.scatter)
            squares, vectors = found.flip(0).clamp(min=0), vectors.T.flip(0)
        else:
            _, singular, vectors = torch.linalg.svd(self.scatter, full_matrices=False)
            squares = singular.square()
        count = min(len(squares), freedom if self.count > 1 else 0, self.rank or len(squares), most or len(squares))
        vectors, squares = vectors[:count].cpu(), squares[:count].cpu()
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)) if count else vectors[:, :1]
        return Directions(vectors * largest.sign(), squares / freedom, self.error, self.total / freedom)


def merged(parts: Sequence[Moments]) -> Moments:
    """The sum of all parts, which stay as they are; a single part itself."""
    if len(parts) == 1:
        return parts[0]
    whole = copy.copy(parts[0])
    whole.mean, whole.scatter = whole.mean.clone(), whole.scatter.clone()
    for part in parts[1:]:
        whole.merge(part)
    return whole


def _sum_of_squares(rows: Tensor) -> float:
    """Without a tensor of all squares."""
    return float(torch.dot(rows.reshape(-1), rows.reshape(-1)))
