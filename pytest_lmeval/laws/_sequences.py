"""Make the sequences that a model reads: random ids, or frames of codes, and others in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from pytest_lmeval.models._model import Model


def random_tokens(lm: Model, length: int, seed: int) -> Tensor:
    """[1, t] ids, or [1, k, t] codes; a longer sequence of the same seed begins with the shorter one.

    Every third seed gives runs of one repeated token, many of them of id 0, as padding looks (of codes: missing ones, where the
    model takes them).
    """
    generator = torch.Generator().manual_seed(seed)
    books = lm.codebooks
    sizes = torch.tensor(books.sizes if books else [lm.vocab_size])
    ids = torch.randint(0, int(sizes.max()), (length, len(sizes)), generator=generator) % sizes
    if seed % 3 == 2:
        blank = -1 if books and books.gaps else 0
        ids = torch.where(torch.arange(length)[:, None] % 2 == 1, ids, blank).repeat_interleave(3, dim=0)[:length]
    return (ids.T if books else ids[:, 0])[None].to(lm.device)


def other_tokens(lm: Model, ids: Tensor) -> Tensor:
    """Another id in the position of each."""
    sizes = torch.tensor(lm.codebooks.sizes, device=ids.device)[:, None] if lm.codebooks else lm.vocab_size
    return (ids + 1) % sizes


def other_future(lm: Model, ids: Tensor, change: int) -> tuple[Tensor, int, str]:
    """(ids that differ from position `change` on, number of leading logit rows [t, v] or [t * s, v] that must not change, and
    the beginning of the change in words).

    Of the frame at `change` the last codes change and the first stay: the codes before the first changed one, and that one
    itself, must be predicted as before. A delayed code counts where it is predicted.
    """
    positions, books = torch.arange(ids.shape[-1], device=ids.device), lm.codebooks
    if not books:
        return torch.where(positions >= change, other_tokens(lm, ids), ids), change, f"the tokens from position {change}"
    column = change % len(books.scored)
    book, delays = books.scored[column], dict(zip(books.scored, books.delays, strict=True))
    begins = [change - delays.get(k, 0) + (k < book) for k in range(len(books.sizes))]
    future = positions >= torch.tensor(begins, device=ids.device)[:, None]
    unchanged = change * len(books.scored) + column + 1
    return torch.where(future, other_tokens(lm, ids), ids), unchanged, f"the codes from codebook {book} at position {change}"


def name_row(lm: Model, row: int) -> str:
    """The position, and the codebook, of a row of the logits [t, v], or [t * s, v]."""
    if not lm.codebooks:
        return f"position {row}"
    position, column = divmod(row, len(lm.codebooks.scored))
    return f"codebook {lm.codebooks.scored[column]} at position {position}"
