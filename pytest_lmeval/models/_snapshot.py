"""Keep named tensors of a module, and put them back bit for bit: on the CPU, on their device, or in a file.

Kept is the content of the plain tensors that each consists of: itself, the inner tensors of a packed one, the part of this rank
of one that is split over several. Layers of bitsandbytes keep scales beside their weight, and repack it at their first step, so
the objects that hold them are kept too. A tensor with several names is kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pytest_lmeval.errors import UnreadableError
from pytest_lmeval.models._named import matching
from pytest_lmeval.models._packed_layers import holders
from pytest_lmeval.models._tensors import is_packed, is_split
from pytest_lmeval.records._replacing import replacing


class Snapshot:
    """Named tensors of a module as they were. A context manager: at the end of its block they are put back.

    names     of the tensors, all names of those that have several
    nbytes    of their content
    replaced  names at which another tensor, or a module around it, stood when they were last put back
    """

    def __init__(self, module: nn.Module, patterns: Iterable[str], on: str | Path = "cpu", whose: str = "") -> None:
        self._slots = _slots(module, patterns, whose or type(module).__name__)
        self.names, self.replaced = [slot.full_name for slot in self._slots], list[str]()
        self._parts = [part for slot in {id(slot.tensor): slot for slot in self._slots}.values() for part in slot.parts()]
        self.nbytes = sum(part.plain.nbytes for part in self._parts)
        self._read = _keep([part.plain for part in self._parts], on)

    def __repr__(self) -> str:
        return f"<snapshot of {len(self.names)} tensors, {self.nbytes:,} bytes>"

    @torch.no_grad()
    def restore(self) -> None:
        """Put the tensors back: the same objects with the same bits. Raises UnreadableError if the file is gone or broken;
        then they are as they were found."""
        contents = self._read()
        self.replaced = [slot.full_name for slot in self._slots if slot.put_back()]
        for part, content in zip(self._parts, contents, strict=True):
            part.put_back(content)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()


@dataclass(frozen=True, eq=False)
class _Part:
    """A plain tensor, as the attribute of an object.

    holder, name  whose attribute it is; "data" of a plain tensor itself
    plain         it shares its storage, and torch's count of changes
    beside        objects whose attributes are put back first, and these
    """

    holder: Any
    name: str
    plain: Tensor
    beside: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def put_back(self, content: Tensor) -> None:
        for holder, attributes in self.beside:
            vars(holder).clear()
            vars(holder).update(attributes)
        now: Tensor = getattr(self.holder, self.name)
        if now.device != self.plain.device:  # the module was moved
            setattr(self.holder, self.name, content.to(now.device, copy=True))
            return
        self.plain.copy_(content)
        same = (now.data_ptr(), now.shape, now.stride(), now.dtype) == (
            self.plain.data_ptr(), self.plain.shape, self.plain.stride(), self.plain.dtype,
        )  # fmt: skip
        if not same:
            setattr(self.holder, self.name, self.plain)


@dataclass(frozen=True, eq=False)
class _Slot:
    """Where a module holds a tensor.

    path   the modules that lead to it, from the outermost, each with its name in the one before
    table  `_parameters` or `_buffers`, of the last of them
    """

    path: list[tuple[str, nn.Module]]
    table: str
    name: str
    tensor: Tensor

    @property
    def owner(self) -> nn.Module:
        return self.path[-1][1]

    @property
    def full_name(self) -> str:
        return ".".join([name for name, _ in self.path[1:]] + [self.name])

    def put_back(self) -> bool:
        """Put the tensor and the modules that lead to it back where they were; return whether another stood there."""
        replaced, held = False, getattr(self.owner, self.table)
        for (_, outer), (name, inner) in zip(self.path, self.path[1:], strict=False):
            replaced |= outer._modules.get(name) is not inner
            outer._modules[name] = inner
        if held.get(self.name) is not self.tensor:
            replaced = True
            for other in (vars(self.owner), self.owner._parameters, self.owner._buffers):
                if other is not held:
                    other.pop(self.name, None)
            held[self.name] = self.tensor
        return replaced

    def parts(self) -> Iterator[_Part]:
        """The plain tensors that it consists of, with the scales that its layer keeps beside it."""
        around = holders(self.owner) if self.name == "weight" else []
        yield from _parts_of(self.tensor, [(holder, dict(vars(holder))) for holder in around])
        for holder in around:
            for name, value in vars(holder).items():
                if isinstance(value, Tensor):
                    yield _Part(holder, name, value.detach())


def _parts_of(tensor: Tensor, beside: list[tuple[Any, dict[str, Any]]]) -> Iterator[_Part]:
    if is_split(tensor):
        yield _Part(tensor, "_local_tensor", tensor._local_tensor)  # type: ignore[attr-defined]
    elif not is_packed(tensor):
        yield _Part(tensor, "data", tensor.detach(), beside)
    else:
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            inner = getattr(tensor, name)
            if is_packed(inner) or is_split(inner):
                yield from _parts_of(inner, [])
            else:
                yield _Part(tensor, name, inner)


def _slots(module: nn.Module, patterns: Iterable[str], whose: str) -> list[_Slot]:
    """The slots of all tensors that the patterns match. Raises ArgumentError for one that matches none."""
    known: dict[str, _Slot] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        path, at = [("", module)], module
        for name in prefix.split(".") if prefix else ():
            at = at._modules[name]  # type: ignore[assignment]
            path.append((name, at))
        for table in ("_parameters", "_buffers"):
            for name, tensor in getattr(owner, table).items():
                if tensor is not None:
                    slot = _Slot(path, table, name, tensor)
                    known[slot.full_name] = slot
    wanted = {name for pattern in patterns for name in matching(pattern, [*known], "tensor", whose)}
    return [slot for name, slot in known.items() if name in wanted]


def _keep(tensors: list[Tensor], on: str | Path) -> Callable[[], Iterable[Tensor]]:
    """Copy the tensors; return a function that gives the copies."""
    if str(on) in ("cpu", "device"):
        copies = [tensor.to("cpu", copy=True) if str(on) == "cpu" else tensor.clone() for tensor in tensors]
        return lambda: copies
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    file = Path(f"{on}.{torch.distributed.get_rank()}" if ranks else on)
    with replacing(file) as new:
        save_file({str(number): tensor.cpu().contiguous() for number, tensor in enumerate(tensors)}, new)

    def read() -> Iterable[Tensor]:
        try:
            with safe_open(file, framework="pt") as content:
                if set(content.keys()) != set(map(str, range(len(tensors)))):
                    raise OSError("it holds other tensors")
            return _contents(file, len(tensors))
        except (SafetensorError, OSError) as error:
            raise UnreadableError(
                f"the snapshot in {file} cannot be read ({error}), so the tensors stay as they are now. Load the model again."
            ) from error

    return read


def _contents(file: Path, count: int) -> Iterator[Tensor]:
    """The tensors of a file, one at a time."""
    with safe_open(file, framework="pt") as content:
        for number in range(count):
            yield content.get_tensor(str(number))
