"""Find the tokenizer of a served model, and hold it to the server's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_lmeval.errors import HubError, SpecError, described
from pytest_lmeval.models import _specs as specs
from pytest_lmeval.models._identity import TOKENIZED
from pytest_lmeval.models._model import Bytes
from pytest_lmeval.models._served import Asking, ServedAnswer

LAST, READ_BACK = 24, 8  # tokens of a prompt, and of its answer, by which a server's tokenizer is compared that tells no ids


def tokenizer_of(model: dict[str, Any], spec: str) -> str:
    """The tokenizer that the server names: the folder of its model, where this machine has it, or its hub id."""
    for named in (model.get("root"), model.get("id")):
        if isinstance(named, str) and (Path(named).is_dir() or (named.count("/") == 1 and not named.startswith((".", "/")))):
            return named
    raise SpecError(
        f"{spec} needs the tokenizer of {model['id']!r}, which this machine does not have under that name: "
        f"{spec},tokenizer=FOLDER (the model's folder or hub id)."
    )


def encoder_of(name: str, spec: str, trust_remote_code: bool) -> tuple[Any, int]:
    """The tokenizer of a name, and the size of the vocabulary."""
    if name == "bytes":
        return Bytes(), 256
    specs.check_path(spec, name)
    from pytest_lmeval.models import _huggingface as huggingface
    from pytest_lmeval.models._hub import HubCall

    try:
        import transformers

        with HubCall():
            options = {"trust_remote_code": trust_remote_code}
            own = transformers.AutoTokenizer.from_pretrained(str(Path(name).expanduser()), **options)
    except ImportError as error:
        raise SpecError(f"the tokenizer of {spec} needs transformers: pip install 'pytest-lmeval[hf]'") from error
    except Exception as error:
        kind = "" if isinstance(error, HubError) else " Give the folder of the model: tokenizer=FOLDER."
        raise SpecError(f"{spec}: its tokenizer {name!r} could not be loaded: {described(error)}.{kind}") from error
    encoder = huggingface.HFTokenizer(own, name)
    folder = Path(name).expanduser()
    named = _json(folder / "generation_config.json").get("eos_token_id")
    ends = (encoder.eos, *named) if isinstance(named, list) else (encoder.eos, named)
    encoder.ends = tuple(dict.fromkeys(end for end in ends if isinstance(end, int)))
    size = _json(folder / "config.json").get("vocab_size")
    return encoder, size if isinstance(size, int) else len(own)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_tokenizer(served: Any, tokenizer: Any, name: str) -> None:
    """Raise SpecError if the server's own tokenizer encodes a text otherwise. Where it tells no ids of a text, its answer is
    compared with what is decoded of its ids here."""
    theirs, ours = served.tokenized(TOKENIZED), list(map(int, tokenizer.encode(TOKENIZED)[0]))
    advice = "Ids would mean other words: give the tokenizer of the model, tokenizer=FOLDER."
    not_theirs = f"{served.spec}: the tokenizer {name!r} is not that of {served.facts.model!r}"
    if theirs is None:
        found: list[ServedAnswer] = []
        served.answer([Asking(ours[-LAST:], READ_BACK)], lambda _, answer: found.append(answer))
        (answer,) = found
        if answer.ids is not None and _letters(answer.text) not in (decoded := _readings(tokenizer, answer.ids)):
            raise SpecError(f"{not_theirs}: the ids of an answer are {decoded[0]!r} here, and {answer.text!r} there. {advice}")
    elif theirs != ours:
        pairs = enumerate(zip(theirs, ours, strict=False))
        at = next((at for at, (one, own) in pairs if one != own), min(len(theirs), len(ours)))
        raise SpecError(
            f"{not_theirs}: a text is {len(ours)} tokens here and {len(theirs)} there, and differs from token {at} on "
            f"({ours[at : at + 3]} and {theirs[at : at + 3]}). {advice}"
        )


def _readings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of ids, with and without special tokens, and with and without the last, which may have ended it."""
    inner = getattr(tokenizer, "tokenizer", None)
    found = [tokenizer.decode(part) for part in (ids, ids[:-1])]
    if inner is not None:
        found += [inner.decode(list(part), skip_special_tokens=False) for part in (ids, ids[:-1])]
    return [_letters(str(text)) for text in found]


def _letters(text: str) -> str:
    """A text without blanks, and without characters that are not whole: servers differ in both."""
    return "".join(text.replace("\ufffd", "").split())
