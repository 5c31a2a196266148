"""Render conversations by the chat template of a model's tokenizer, and encode them.

The ids are those of transformers' `apply_chat_template(messages, tokenize=True)`: nothing is put before them, since a template
writes the beginning-of-sequence token itself. Special tokens that the template writes are control tokens; those that are
written in a message are text, unless the tokenizer reads them as control tokens (see `_model.with_special_tokens`).
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from pytest_lmeval.errors import SpecError, TaskError, described, nearest
from pytest_lmeval.models._model import Model

Message: TypeAlias = "dict[str, str]"
"""{"role": "system", "user" or "assistant", "content": text}"""

Span: TypeAlias = "tuple[int, int]"

MARKS = "".join(map(chr, range(0xE000, 0xF900)))  # characters without a meaning, which mark special tokens in messages


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it.

    text     up to where the model goes on
    written  (begin, end) of each special token in `text` that a message wrote, and not the template
    """

    text: str
    written: tuple[Span, ...] = ()


def has_template(lm: Model) -> bool:
    """Whether the tokenizer of the model has a chat template."""
    return callable(getattr(lm.tokenizer, "apply_chat_template", None))


def render(lm: Model, messages: Sequence[Message]) -> Rendered:
    """The conversation up to where the model goes on: with the template's beginning of an answer after a turn of the user, and
    within the last message if that is the assistant's.

    Raises SpecError if the model has no template. Raises TaskError, with the message of the template, if it refuses the
    conversation, and if it does otherwise with a message because of a special token that is written there.
    """
    text, pattern = _applied(lm, messages), _read_as_text(lm)
    together = "\0".join(message["content"] for message in messages)
    if pattern is None or (token := pattern.search(together)) is None:
        return Rendered(text)
    begin, end, *_ = (mark for mark in MARKS if mark not in together)
    marked = [{**one, "content": pattern.sub(rf"{begin}\g<0>{end}", one["content"])} for one in messages]
    found = _unmarked(_applied(lm, marked), begin, end)
    if found.text != text:
        raise TaskError(
            f"the chat template of {lm.spec} looks for special tokens in messages, and {token[0]!r} is written in one, so that "
            "it cannot be read as the text that it is. With Task(..., special_tokens=True) it is a control token."
        )
    return found


def encode(lm: Model, rendered: Rendered, text: str) -> np.ndarray:
    """The ids [n] of a text that is a rendered conversation, without blanks at its end or with text of the assistant after it.

    Raises TaskError if the tokenizer cannot read a special token as text in this place.
    """
    tokenizer: Any = lm.tokenizer
    control = tokenizer.with_special_tokens() if hasattr(tokenizer, "with_special_tokens") else tokenizer
    pattern, after = _read_as_text(lm), len(rendered.text)
    written = {*rendered.written, *(match.span() for match in (pattern.finditer(text, after) if pattern else ()))}
    if pattern is None or not written:
        return _ids(control.encode(text))
    controls = [match.span() for match in pattern.finditer(text) if match.span() not in written]
    parts, done = [], 0
    for before, following in itertools.pairwise([(0, 0), *controls, (len(text), len(text))]):
        if inside := [(a - before[1], b - before[1]) for a, b in sorted(written) if before[1] <= a and b <= following[0]]:
            parts.append(_ids(control.encode(text[done : before[1]])))
            parts.append(
                _as_text(lm, control, text[slice(*before)], text[before[1] : following[0]], inside, text[slice(*following)])
            )
            done = following[0]
    return np.concatenate([*parts, _ids(control.encode(text[done:]))])


def with_template_kwargs(lm: Model, kwargs: Mapping[str, Any]) -> Model:
    """The model, whose chat template is rendered with these keywords of `apply_chat_template`.

    Raises SpecError if `chat_template` is a name, and the tokenizer has no template of this name.
    """
    if not kwargs or not has_template(lm):
        return lm
    tokenizer: Any = copy.copy(lm.tokenizer)
    vars(tokenizer).pop("control_tokens", None)  # cached of another template
    tokenizer.chat_template_kwargs = dict(kwargs)
    name = str(kwargs.get("chat_template") or "")
    known = getattr(tokenizer, "templates", None)
    if name and known is not None and name not in known and not re.search(r"\{[{%]", name):
        has = ", ".join(known) if known else "one template, without a name"
        raise SpecError(f"{lm.spec} has no chat template {name!r}.{nearest(name, known)} Its tokenizer has {has}.")
    return replace(lm, tokenizer=tokenizer)


def unread_kwargs(lm: Model) -> list[str]:
    """The keywords that the chat template of the model never mentions, so that they change nothing."""
    text = getattr(lm.tokenizer, "template", None)
    kwargs = getattr(lm.tokenizer, "chat_template_kwargs", {})
    return [name for name in kwargs if name != "chat_template" and text and not re.search(rf"\b{re.escape(name)}\b", text)]


def takes_system(lm: Model) -> bool:
    """Whether the template writes a system turn; some refuse it, and some leave it out."""
    try:
        return "be kind" in _applied(lm, [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a"}])
    except TaskError:
        return False


def blank_before_answers(lm: Model) -> str:
    r"""The blanks that the template writes between the beginning of an answer and its text: " " after "[/INST]"."""
    question = {"role": "user", "content": "a"}
    try:
        begun, answered = (_applied(lm, [question, *more]) for more in ([], [{"role": "assistant", "content": "b"}]))
    except TaskError:  # of templates that refuse to go on with an answer
        return ""
    blank = answered.removeprefix(begun).removesuffix("b")
    return blank if answered == f"{begun}{blank}b" and not blank.strip() else ""


def with_end_of_turn(lm: Model) -> Model:
    """The model, whose answers also end with the special token that its template writes after a turn of the assistant."""
    tokenizer: Any = lm.tokenizer
    pattern, turns = _pattern(tokenizer), [("user", "a"), ("assistant", "so be it"), ("user", "c")]
    try:
        after = _applied(lm, [{"role": role, "content": content} for role, content in turns]).partition("so be it")[2]
    except TaskError:  # raised again, with its row, when a question is rendered
        return lm
    if pattern is None or (match := pattern.match(after.lstrip())) is None:
        return lm
    end = int(_ids(tokenizer.with_special_tokens().encode(match[0]))[0])
    ends = tuple(getattr(tokenizer, "ends", (getattr(tokenizer, "eos", None),)))
    if end in ends:
        return lm
    tokenizer = copy.copy(tokenizer)
    tokenizer.ends = (*ends, end)
    return replace(lm, tokenizer=tokenizer)


def template_of(lm: Model) -> Callable[..., Any]:
    """What applies the chat template of a model, with its keywords. Raises SpecError if it has none."""
    if not has_template(lm):
        raise SpecError(
            f"{lm.spec} has no chat template, so nothing can be asked of it in turns. Take the version of the model that was "
            "trained on conversations, set the `chat_template` of its tokenizer, or ask with chat=False."
        )
    tokenizer: Any = lm.tokenizer
    return functools.partial(tokenizer.apply_chat_template, **getattr(tokenizer, "chat_template_kwargs", {}))


def _applied(lm: Model, messages: Sequence[Message]) -> str:
    template = template_of(lm)
    goes_on = messages[-1]["role"] == "assistant"
    options = {"continue_final_message": True} if goes_on else {}
    try:
        text = template([dict(one) for one in messages], add_generation_prompt=not goes_on, tokenize=False, **options)
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise TaskError(f"the chat template of {lm.spec} refuses the turns {roles}: {described(error)}") from error
    if not isinstance(text, str):
        raise TaskError(f"the chat template of {lm.spec} returned {type(text).__name__} instead of the text of the turns.")
    return text


def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds the special tokens by which a template divides turns; None if the tokenizer has none."""
    texts = getattr(tokenizer, "control_tokens", None) or getattr(tokenizer, "special", {}).values()
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    known = longest_first and hasattr(tokenizer, "with_special_tokens")
    return re.compile("|".join(map(re.escape, longest_first))) if known else None


def _read_as_text(lm: Model) -> re.Pattern[str] | None:
    """What finds the special tokens that are text where a message writes them; None if all are control tokens."""
    return None if getattr(lm.tokenizer, "special_tokens", False) else _pattern(lm.tokenizer)


def _unmarked(text: str, begin: str, end: str) -> Rendered:
    """A text without its marks; what stands between two is written in a message. A template may have divided a pair."""
    parts, written, size, opened = [], [], 0, None
    for part in re.split(f"([{begin}{end}])", text):
        if part == begin:
            opened = size
        elif part == end:
            written += [] if opened is None else [(opened, size)]
            opened = None
        else:
            parts.append(part)
            size += len(part)
    return Rendered("".join(parts), tuple(written))


def _as_text(lm: Model, control: Any, before: str, text: str, written: Sequence[Span], after: str) -> np.ndarray:
    """The ids of the text between two control tokens, in which special tokens are written.

    What a tokenizer does at its ends (a blank before the first word of all, blanks that belong to a control token) is what it
    does with the same text that has a letter in place of each special token: that decides which reading is right.
    """
    cuts = [0, *itertools.chain.from_iterable(written), len(text)]
    letters = "x".join(text[begin:end] for begin, end in zip(cuts[::2], cuts[1::2], strict=True))
    whole = _ids(control.encode(before + letters + after))
    sizes = [len(_ids(control.encode(part))) if part else 0 for part in (before, after)]
    expected = whole[sizes[0] : len(whole) - sizes[1]]
    refused = np.concatenate([_ids(control.encode(text[begin:end])) for begin, end in written])
    for read, stripped in itertools.product(_readings(lm.tokenizer), (str, str.lstrip, str.rstrip, str.strip)):
        ids: np.ndarray = read(stripped(text))
        if np.array_equal(read(stripped(letters)), expected) and not np.isin(refused, ids).any():
            return ids
    raise TaskError(
        f"the tokenizer of {lm.spec} cannot read {text[slice(*written[0])]!r}, which is written in a message, as the text that "
        "it is in this place. With Task(..., special_tokens=True) it is a control token."
    )


def _readings(tokenizer: Any) -> Iterator[Callable[[str], np.ndarray]]:
    """How a text may be read as text: without special tokens, or without any that were added to the vocabulary; as the first
    word of all, or after another."""
    for read in (lambda part: _ids(tokenizer.encode(part)), getattr(tokenizer, "encode_plain", None)):
        if read is not None:
            yield read
            yield functools.partial(_after_newline, read)


def _after_newline(read: Callable[[str], np.ndarray], text: str) -> np.ndarray:
    newline, ids = read("\n"), read(f"\n{text}")
    return ids[len(newline) :] if np.array_equal(ids[: len(newline)], newline) else ids


def _ids(encoded: tuple[Any, Any]) -> np.ndarray:
    return np.asarray(encoded[0], dtype=np.int64)
