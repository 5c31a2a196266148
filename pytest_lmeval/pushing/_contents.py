"""Choose what of an output folder is sent: record, report and one trained model, with secrets masked.

Never sent are resume points (which are pickles), journals, examples and what is kept of answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_lmeval.errors import ArgumentError, DocumentError, UnreadableError, described, some
from pytest_lmeval.pushing import _shards as shards
from pytest_lmeval.records import _schema as schema
from pytest_lmeval.records._document import NAME, RunDocument, load
from pytest_lmeval.records._replacing import inside
from pytest_lmeval.records._secrets import masked_values, without_secrets
from pytest_lmeval.training._weights import BEST, SENT

REPORT = "report.html"
OF_TRAINING = ("protocol.json", "record.json")


@dataclass(frozen=True)
class Sent:
    """A file to send.

    path   in the repository
    write  folder for a new file -> the file to send, there or elsewhere
    note   what was done to it
    last   it is sent after all others, since it says that they are there
    """

    path: str
    size: int
    write: Callable[[Path], Path]
    note: str = ""
    last: bool = False


def text_file(path: str, text: str, note: str = "", *, last: bool = False) -> Sent:
    content = text.encode("utf-8", errors="backslashreplace")

    def write(folder: Path) -> Path:
        file = folder / path.replace("/", "-")
        file.write_bytes(content)
        return file

    return Sent(path, len(content), write, note, last)


def record_of(folder: Path, *, report: bool = True) -> tuple[RunDocument, list[Sent]]:
    """The document of a finished run; metrics.json, and report.html unless not wanted. Raises DocumentError without them."""
    if not folder.is_dir():
        raise DocumentError(f"{folder} is no folder. Give the output folder of a run (--lmeval-dir), with its {NAME}.")
    document = load(folder)
    files = [_without_secrets(folder, NAME)]
    if report:
        text = _text(folder, REPORT)
        found = masked_values(text)
        files.append(text_file(REPORT, found, "" if found == text else "secrets masked"))
    return document, files


def model_of(folder: Path, key: str | None) -> Path | None:
    """The folder of the trained model. None if there is none; raises ArgumentError if there are several, or not that one."""
    root = folder / "models"
    found = {file.parent.name: file.parent for file in sorted(root.glob(f"*/{BEST}"))}
    if key is not None and key not in found:
        raise ArgumentError(f"{root} holds no trained model {key!r}. It holds: {some(list(found)) if found else 'none'}.")
    if key is None and len(found) > 1:
        raise ArgumentError(
            f"{root} holds {len(found)} trained models, and a repository is for one: {some(list(found))}. Choose it by --model "
            "KEY (the setting `key` of its record), or send none (--no-model)."
        )
    return None if not found else found[key or next(iter(found))]


def files_of(trained: Path, shard_size: str) -> list[Sent]:
    """The files of a trained model; that which names the shards is the last."""
    files = [_without_secrets(trained, name, to=f"training/{name}") for name in OF_TRAINING if (trained / name).exists()]
    try:
        source = inside(trained, BEST)
    except OSError as error:
        raise UnreadableError(f"{trained / BEST} cannot be read ({error.strerror or error}).") from error
    parts, index = shards.split(source, shard_size, SENT)
    files += [Sent(part.name, part.size, part.write) for part in parts]
    if index:
        files.append(text_file(f"{SENT}.index.json", index, last=True))
    return files


def fingerprint_of(trained: Path | None) -> str:
    """The fingerprint of the trained model, by the record of its training; empty if that is not finished."""
    if trained is None or not (trained / "record.json").exists():
        return ""
    try:
        return str(json.loads(_text(trained, "record.json"))["lm"]["fingerprint"])
    except (ValueError, KeyError, TypeError):
        return ""


def _without_secrets(folder: Path, name: str, to: str = "") -> Sent:
    """A JSON file, as it is unless it holds secrets."""
    text = _text(folder, name)
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise DocumentError(f"{folder / name} is no JSON ({described(error)}); it was probably cut off.") from error
    found = without_secrets(plain)
    return text_file(to or name, text) if found == plain else text_file(to or name, schema.text_of(found), "secrets masked")


def _text(folder: Path, name: str) -> str:
    try:
        return inside(folder, name).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        again = f" `lmeval render {folder}` writes it again; or leave it out (--no-report)." if name == REPORT else ""
        raise DocumentError(f"{folder / name} cannot be read ({described(error)}).{again}") from error
