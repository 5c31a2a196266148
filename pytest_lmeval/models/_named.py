"""Find modules and tensors of a model by name, by pattern, or by number of a block."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from pytest_lmeval.errors import ArgumentError, nearest, some
from pytest_lmeval.models._model import Model

Layers: TypeAlias = "str | int | Sequence[str | int] | None"
"""Modules, by name or pattern ("model.layers.*"), or numbers of blocks, -1 for the last; None: all blocks."""


def blocks_of(module: nn.Module) -> list[str]:
    """The names of the blocks that a model consists of: the entries of its longest `nn.ModuleList`, the outermost if several
    are as long; empty if it has none."""
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    lists.sort(key=lambda item: (-len(item[1]), item[0].count(".")))
    return [f"{lists[0][0]}.{index}" for index in range(len(lists[0][1]))] if lists else []


def modules_of(lm: Model, layers: Layers = None) -> dict[str, nn.Module]:
    """The modules that `layers` means, by name, in the order of the model. Raises ArgumentError, with the nearest names."""
    if lm.module is None:
        raise ArgumentError(
            f"{lm.spec} ({lm.form}) is no torch module, so it has no layers whose hidden states could be read. Load its "
            "weights as a torch module or a transformers folder."
        )
    known = {name: part for name, part in lm.module.named_modules() if name}
    blocks, wanted = blocks_of(lm.module), set[str]()
    for layer in [None] if layers is None else [layers] if isinstance(layers, str | int) else layers:
        if layer is None or (isinstance(layer, int) and not isinstance(layer, bool)):
            if not blocks:
                raise ArgumentError(
                    f"{lm.spec} has no list of blocks (nn.ModuleList), so layers are given by name: {some([*known])}."
                )
            if layer is not None and not -len(blocks) <= layer < len(blocks):
                raise ArgumentError(
                    f"layer {layer} was asked for, and {lm.spec} has {len(blocks)} blocks, {blocks[0]} to {blocks[-1]}: 0 to "
                    f"{len(blocks) - 1}, or -1 for the last."
                )
            wanted |= set(blocks if layer is None else [blocks[layer]])
        else:
            wanted |= set(matching(layer, [*known], "module", lm.spec))
    return {name: part for name, part in known.items() if name in wanted}


def matching(pattern: Any, known: Sequence[str], kind: str, whose: str) -> list[str]:
    """The names that a pattern matches. Raises ArgumentError, with the nearest names, if it matches none."""
    if not isinstance(pattern, str):
        raise ArgumentError(f"a {kind} is named by a text such as {known[0]!r}; got {pattern!r}.")
    found = [name for name in known if fnmatchcase(name, pattern)]
    if not found:
        raise ArgumentError(
            f"{pattern!r} matches no {kind} of {whose}.{nearest(pattern, known)} There are: {some(known)}; * stands "
            "for any text."
        )
    return found
