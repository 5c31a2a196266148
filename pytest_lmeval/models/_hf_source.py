"""Find where the files of a transformers model are: folder, GGUF file, hub, or an adapter over one of these."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import SpecError, described
from pytest_lmeval.models import _specs as specs

ADAPTER = "adapter_config.json"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Source:
    """Where the files of a model are.

    name      folder or hub id, as transformers takes it
    where     what it is, as the end of a message
    folder    the folder, if it is one here
    keywords  of `from_pretrained`, which choose the files in it: `revision`, `subfolder`, `gguf_file`
    adapter   folder or hub id of the adapter over it; "" for none
    """

    name: str
    where: str
    folder: Path | None = None
    keywords: dict[str, str] = field(default_factory=dict)
    adapter: str = ""


def find(name: str, spec: str, *, adapter: str = "", revision: str = "", subfolder: str = "") -> Source:
    """The source that a spec names. A folder that holds an adapter only is that adapter over the base that it names.

    Raises SpecError for what is not there, and for options that contradict what is.
    """
    specs.check_path(spec, name)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise SpecError(f"{spec}: {name} is a file; a model is a folder, an id of the hub, or a file that ends with .gguf.")
    if adapter:
        adapter = _checked_adapter(adapter, spec)
    if path.exists():
        if revision:
            raise SpecError(
                f"{spec}: {name} is here, and what is here has one revision; {revision!r} is one of a model of the hub. Leave "
                "revision= out, or check that revision out."
            )
        return _local(path, spec, adapter, subfolder)
    parts, keywords = name.split("/"), {}
    if name.endswith(".gguf"):
        if len(parts) < 3:
            raise SpecError(f"{spec}: there is no file {name} here; a GGUF file of the hub is OWNER/NAME/FILE.gguf.")
        name, keywords["gguf_file"] = "/".join(parts[:2]), "/".join(parts[2:])
    if revision:
        keywords["revision"] = revision
    if subfolder:
        keywords["subfolder"] = subfolder
    at = f" at the revision {revision!r}" if revision else ""
    where = f"({name!r} is no folder here, so it was looked up on the hub{at}.){specs.nearest_folder(name)}"
    return Source(name, where, keywords=keywords, adapter=adapter)


def _local(path: Path, spec: str, adapter: str, subfolder: str) -> Source:
    """The source in a folder or file that exists."""
    folder = path if path.is_dir() else path.parent
    if subfolder:
        folder = path / subfolder
        if not folder.is_dir():
            below = sorted(one.name for one in path.iterdir() if one.is_dir()) if path.is_dir() else []
            near = difflib.get_close_matches(subfolder, below, n=1)
            listed = f"it has {', '.join(below)}" if below else "it has none"
            raise SpecError(
                f"{spec}: there is no folder {subfolder!r} in {path}; {listed}.{f' Did you mean {near[0]}?' if near else ''}"
            )
    found = Source(str(folder), f"({str(folder)!r} is a folder here.)", folder, adapter=adapter)
    if path.is_file():
        return replace(found, keywords={"gguf_file": path.name}, where=f"({str(path)!r} is a file here.)")
    if not (folder / ADAPTER).is_file():
        return found
    if any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise SpecError(
            f"{spec}: {folder} holds the weights of a model and an adapter ({ADAPTER}), so which is meant is unclear. Move "
            f"the adapter into a folder of its own, and write hf:{folder},adapter=ITS_FOLDER for both."
        )
    if adapter:
        raise SpecError(
            f"{spec}: {folder} is an adapter itself, and one adapter is put over a model, not over another adapter."
        )
    return over_its_base(str(folder), json_of(folder / ADAPTER, spec), spec)


def over_its_base(adapter: str, config: dict[str, Any], spec: str) -> Source:
    """The source of the base that the configuration of an adapter names, with the adapter. Raises SpecError without a base."""
    base = config.get("base_model_name_or_path")
    write = f"Write hf:BASE,adapter={adapter}, with the model that it was trained on."
    if not base or not isinstance(base, str):
        raise SpecError(f"{spec}: {adapter} is an adapter, whose {ADAPTER} names no base model. {write}")
    if not os.path.exists(base) and (base.startswith(("/", ".")) or base.count("/") > 1):
        raise SpecError(f"{spec}: {adapter} is an adapter over {base}, which is not here (looked from {Path.cwd()}). {write}")
    source = find(base, spec, revision=config.get("revision") or "" if not os.path.exists(base) else "")
    if source.adapter:
        raise SpecError(f"{spec}: {adapter} is an adapter over {base}, which is an adapter too. Merge that into its base.")
    return replace(source, adapter=adapter)


def json_of(file: Path, spec: str) -> dict[str, Any]:
    """The object in a JSON file. Raises SpecError for anything else."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SpecError(f"{spec}: {file} cannot be read: {described(error)}.") from error
    if not isinstance(found, dict):
        raise SpecError(f"{spec}: {file} holds {type(found).__name__}, and a configuration is an object.")
    return found


def _checked_adapter(adapter: str, spec: str) -> str:
    """The folder or hub id of an adapter. Raises SpecError for a folder that is not there, or holds none."""
    path = Path(adapter).expanduser()
    if not path.exists():
        if adapter.startswith((".", "/", "~")) or adapter.count("/") != 1:
            raise SpecError(f"{spec}: there is no folder {adapter} with an adapter.{specs.nearest_folder(adapter)}")
        return adapter
    if not (path / ADAPTER).is_file():
        raise SpecError(
            f"{spec}: {adapter} holds no adapter: there is no {ADAPTER} in it. Name the folder that `save_pretrained` of a "
            "PEFT model wrote."
        )
    return str(path)
