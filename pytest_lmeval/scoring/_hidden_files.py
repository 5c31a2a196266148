"""Write and read sums of hidden states: safetensors files for shards and later runs, and checkpoints of a reading."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pytest_lmeval.errors import UnreadableError
from pytest_lmeval.models._model import Model, State
from pytest_lmeval.records._journal import Checkpoints
from pytest_lmeval.records._replacing import replacing
from pytest_lmeval.scoring._hidden_states import HiddenStates, Sample
from pytest_lmeval.scoring._text_files import safe_load
from pytest_lmeval.statistics._moments import Moments

KEY = "pytest-lmeval hidden states"
NUMBERS = ("rank", "count", "total", "lost")  # of `Moments`, beside its tensors


@dataclass
class Point:
    """Where the reading of hidden states goes on.

    which     number of the set
    text      number of the text in it
    position  of the next token in the text
    state     of the model before it
    vectors   of a text that has begun, by layer: the one of its last token, or the sum of all so far
    """

    which: int = 0
    text: int = 0
    position: int = 0
    state: State = None
    vectors: dict[str, Tensor] = field(default_factory=dict)


def save_hidden_states(states: HiddenStates, path: str | Path) -> None:
    """Write sums to a safetensors file, which `load_hidden_states` reads. Replaces a file that is there, in one move."""
    about, tensors = _to_plain(states)
    with replacing(Path(path)) as new:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, new, metadata={KEY: about})


def load_hidden_states(path: str | Path, device: torch.device | str = "cpu") -> HiddenStates:
    """Read sums that `hidden_states(..., save=path)` wrote. Raises UnreadableError for a file that is missing, cut off or
    another."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = (file.metadata() or {})[KEY]
            return _from_plain(about, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError as error:
        raise UnreadableError(f"there are no hidden states at {path}.") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UnreadableError(
            f"{path} is no whole file of hidden states ({type(error).__name__}: {error}); it was cut off, or is another file."
        ) from error


def write_checkpoint(checkpoints: Checkpoints, key: str, states: HiddenStates, point: Point) -> None:
    """Save sums and the point up to which they reach. Raises OSError, also for a state that cannot be saved."""
    about, tensors = _to_plain(states)
    saved = {"about": about, "tensors": tensors, "point": {**vars(point)}}
    try:
        checkpoints.write(key, lambda file: torch.save(saved, file))
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
        raise OSError(f"its state raises {type(error).__name__}: {error}") from error


def read_checkpoint(checkpoints: Checkpoints | None, key: str, lm: Model) -> tuple[HiddenStates, Point] | None:
    """The saved sums with their point, or None if there are none that can be used."""

    def read(file: IO[bytes]) -> tuple[HiddenStates, Point]:
        saved = safe_load(file.read(), lm)
        return _from_plain(saved["about"], saved["tensors"]), Point(**saved["point"])

    return None if checkpoints is None else checkpoints.read(key, read)


def _to_plain(states: HiddenStates) -> tuple[str, dict[str, Tensor]]:
    """Everything as JSON, which keeps every bit of a float, and tensors by name."""
    tensors: dict[str, Tensor] = {}
    parts: list[list[dict[str, dict[str, Any]]]] = []
    for a, halves in enumerate(states.moments):
        parts.append([])
        for b, half in enumerate(halves):
            parts[a].append({name: {key: getattr(sums, key) for key in NUMBERS} for name, sums in half.items()})
            for name, sums in half.items():
                tensors |= {f"moments/{a}/{b}/{name}/mean": sums.mean, f"moments/{a}/{b}/{name}/scatter": sums.scatter}
    for a, sample in enumerate(states.sample):
        tensors |= {f"sample/{a}/drawn": torch.from_numpy(sample.drawn), f"sample/{a}/halves": torch.from_numpy(sample.halves)}
        tensors |= {f"sample/{a}/vectors/{name}": vectors for name, vectors in sample.vectors.items()}
    plain = {"about": states.about, "texts": states.texts, "skipped": states.skipped, "tokens": states.tokens, "parts": parts}
    return json.dumps(plain), tensors


def _from_plain(text: str, tensors: dict[str, Tensor]) -> HiddenStates:
    plain = json.loads(text)
    moments = [
        [
            {name: _moments(numbers, tensors, f"moments/{a}/{b}/{name}") for name, numbers in half.items()}
            for b, half in enumerate(halves)
        ]
        for a, halves in enumerate(plain["parts"])
    ]
    sample = []
    for a in range(len(moments)):
        prefix = f"sample/{a}/vectors/"
        vectors = {name.removeprefix(prefix): own.cpu() for name, own in tensors.items() if name.startswith(prefix)}
        drawn, halves = (tensors[f"sample/{a}/{name}"].cpu().numpy() for name in ("drawn", "halves"))
        sample.append(Sample(drawn, halves, vectors))
    return HiddenStates(plain["about"], moments, sample, plain["texts"], plain["skipped"], plain["tokens"])


def _moments(numbers: dict[str, Any], tensors: dict[str, Tensor], name: str) -> Moments:
    mean, scatter = tensors[f"{name}/mean"], tensors[f"{name}/scatter"]
    if scatter.ndim != 2 or scatter.shape[1:] != mean.shape or (numbers["rank"] is None and len(scatter) != len(mean)):
        raise ValueError(f"{name} has a mean of {list(mean.shape)} and sums of {list(scatter.shape)}")
    found = Moments(len(mean), numbers["rank"], mean.device)
    found.mean, found.scatter, found.count = mean, scatter, int(numbers["count"])
    found.total, found.lost = float(numbers["total"]), float(numbers["lost"])
    return found
