"""Mask what looks like a secret before it is written: the report of a run is read by others than the one who started it.

Masked are the forms that services give their tokens, the user and password of a URL, and the value of an option, a setting or
an environment variable whose name says that it is secret.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

MASK = "***"
LONG = 8  # characters of an environment variable's value from which on it is masked wherever it stands

# A word of a name; "tokens" and "tokenizer" are others. Special tokens of a tokenizer are no secrets.
SPECIAL = {
    "bos",
    "eos",
    "pad",
    "unk",
    "sep",
    "cls",
    "mask",
    "special",
    "stop",
    "end",
    "start",
    "image",
    "first",
    "last",
    "next",
}
WORDS = {
    "token",
    "secret",
    "secrets",
    "password",
    "passwd",
    "passphrase",
    "apikey",
    "authorization",
    "credential",
    "credentials",
}
PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("auth", "key"), ("secret", "key")}

SHAPES = re.compile(
    r"""\b(?:hf|gh[pousr]|npm)_[A-Za-z0-9]{16,}             # Hugging Face, GitHub, npm
    | \bgithub_pat_\w{16,}
    | \bglpat-[\w-]{16,}                                   # GitLab
    | \bsk-(?=[\w-]*\d)[\w-]{16,}                         # OpenAI, Anthropic
    | \bxox[abeprs]-[\w-]{10,}                            # Slack
    | \b(?:AKIA|ASIA)[A-Z0-9]{12,}                        # AWS
    | \bAIza[\w-]{20,}                                    # Google
    | \beyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*)?             # a JSON web token
    """,
    re.VERBOSE,
)
SCHEMES = re.compile(r"\b(Bearer|Basic)(\s+)[\w.~+/=-]{6,}", re.IGNORECASE)
IN_URL = re.compile(r"(?<=://)[^\s/?#@'\"]+(?:@[^\s/?#@'\"]+)*(?=@)")
NAMED = re.compile(  # NAME=value, NAME: value, "NAME": "value"; neither NAME == value nor NAME::value
    r"""(?<![\w-])(-{0,2}[A-Za-z][\w-]*)(["']?\s*=(?!=)\s*|["']?:\s+|["']:)("[^"]*"|'[^']*'|[^\s,;&"'()\[\]{}]+)"""
)


def without_secrets(plain: Any) -> Any:
    """Plain values (of JSON) with secrets masked in all texts, also those whose key in a dict says that they are secret."""
    if isinstance(plain, str):
        return masked(plain)
    if isinstance(plain, dict):
        return {
            name: MASK if isinstance(value, str) and value and is_secret(str(name)) else without_secrets(value)
            for name, value in plain.items()
        }
    return [without_secrets(part) for part in plain] if isinstance(plain, list | tuple) else plain


def masked(text: str) -> str:
    """The text with its secrets masked.

    >>> masked("server:http://me:pw@host, api_key=abc, --lmeval-tokens=500, tokenizer=a/b")
    'server:http://***@host, api_key=***, --lmeval-tokens=500, tokenizer=a/b'
    """
    return text if len(text) < 4 else NAMED.sub(_without_value, masked_values(text))


def masked_values(text: str) -> str:
    """The text with what looks like a secret by itself masked, whatever name stands before it: for files that hold code."""
    for value in _environment():
        text = text.replace(value, MASK)
    return IN_URL.sub(MASK, SHAPES.sub(MASK, SCHEMES.sub(rf"\1\2{MASK}", text)))


def masked_command(arguments: Sequence[str]) -> str:
    """A command line, also with the value of an option whose name is secret as an argument of its own."""
    shown, secret = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and is_secret(name):
            shown.append(f"{masked(name)}={MASK}")
        else:
            shown.append(MASK if secret and not argument.startswith("-") else masked(argument))
        secret = argument.startswith("-") and not equals and is_secret(argument)
    return shlex.join(shown).replace(shlex.quote(MASK), MASK)


def is_secret(name: str) -> bool:
    """Whether a name says that its value is a secret.

    >>> [is_secret(name) for name in ("--hf-token", "apiKey", "OPENAI_API_KEY", "max_tokens", "eos_token", "tokenizer")]
    [True, True, True, False, False, False]
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    if any(pair in PAIRS for pair in pairwise(words)):
        return True
    before = zip(["", *words], words, strict=False)
    return any(word in WORDS and not (word == "token" and other in SPECIAL) for other, word in before)


def _without_value(found: re.Match[str]) -> str:
    name, between, value = found.groups()
    if not is_secret(name) or (name.lower().endswith("token") and (value.isdigit() or ": " in between)):
        return f"{name}{between}{NAMED.sub(_without_value, value)}"  # "the first token: 5" is no secret
    return f"{name}{between}{MASK}"


def _environment() -> Iterator[str]:
    """The values of environment variables whose names say that they are secret, the longest first."""
    values = {value for name, value in os.environ.items() if len(value) >= LONG and is_secret(name)}
    return iter(sorted(values, key=len, reverse=True))
