"""What a model is given to read: random ids, or frames of codes, and others in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from pytest_lmeval.models._model import Model


def drawn(lm: Model, length: int, seed: int) -> Tensor:
    """[1, t] ids, or [1, k, t] codes; a longer sequence of the same seed begins with the shorter one.

    Random ones; of every third seed, runs of one token repeated, many of them of id 0, as padding looks (of codes: of none,
    where there may be none).
    """
    generator = torch.Generator().manual_seed(seed)
    books = lm.codebooks
    sizes = torch.tensor(books.sizes if books else [lm.vocab_size])
    ids = torch.randint(0, int(sizes.max()), (length, len(sizes)), generator=generator) % sizes
    if seed % 3 == 2:
        blank = -1 if books and books.gaps else 0
        ids = torch.where(torch.arange(length)[:, None] % 2 == 1, ids, blank).repeat_interleave(3, dim=0)[:length]
    return (ids.T if books else ids[:, 0])[None].to(lm.device)


def beside(ids: Tensor, rows: int) -> Tensor:
    """So many rows of the one in `ids`."""
    return ids.expand(rows, *ids.shape[1:])


def others(lm: Model, ids: Tensor) -> Tensor:
    """Another id in the place of each."""
    sizes = torch.tensor(lm.codebooks.sizes, device=ids.device)[:, None] if lm.codebooks else lm.vocab_size
    return (ids + 1) % sizes


def other_future(lm: Model, ids: Tensor, change: int) -> tuple[Tensor, int, str]:
    """The same beginning with another future from place `change` on, how many rows of the logits [t, v], or [t * s, v], must
    not know of it, and in words where it begins.

    Of a frame the last codes are changed and the first ones kept: all before the first one that is other, and that one itself,
    are predicted as if nothing had changed. A delayed code counts where it is predicted.
    """
    places, books = torch.arange(ids.shape[-1], device=ids.device), lm.codebooks
    if not books:
        return torch.where(places >= change, others(lm, ids), ids), change, f"the tokens from position {change}"
    turn = change % len(books.scored)
    book, delays = books.scored[turn], dict(zip(books.scored, books.delays, strict=True))
    begins = [change - delays.get(k, 0) + (k < book) for k in range(len(books.sizes))]
    future = places >= torch.tensor(begins, device=ids.device)[:, None]
    kept = change * len(books.scored) + turn + 1
    return torch.where(future, others(lm, ids), ids), kept, f"the codes from codebook {book} at place {change}"


def named(lm: Model, row: int) -> str:
    """What a row of the logits [t, v], or [t * s, v], is about."""
    if not lm.codebooks:
        return f"position {row}"
    place, turn = divmod(row, len(lm.codebooks.scored))
    return f"codebook {lm.codebooks.scored[turn]} at place {place}"
