"""What the engine may do with a model: one object, made from the certificate of its laws.

    policy = policy_for(lm, certificate)               all that no law forbids
    policy = policy_for(lm, certificate, window=512)   Refused where no way to read so is exact
    policy = policy_for(lm)                            nothing was probed: all that the model declares, on the caller's word

A broken law forbids, and so does one that the model cannot be tried on (its state cannot be copied, it reads single rows). A
law for which the probe had no time forbids nothing: the certificate names it (`Certificate.untried`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pytest_lmeval.errors import Refused, StreamError
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import NON_CAUSAL, OUT_OF_TIME, Certificate

Window: TypeAlias = 'int | Literal["unlimited", "lm_eval"] | None'

WINDOW = 1024  # tokens of a window where the model names no limit of its own
ROLLING_WINDOW = 2048  # the same in lm-evaluation-harness
LOGITS_BUDGET = 256 << 20  # bytes that the logits of a step and what is computed from them may take
LARGEST_CHUNK, SMALLEST_CHUNK = 1024, 16
LARGEST_STEP = 1 << 62  # tokens: any number

ONLY_ASIDE = frozenset({"rows", "fork", "resume", "size"})
"""Laws that one row, streamed once without a stop, does not rest on."""
NOTHING_HOLDS = frozenset({"causality", "repeat", "isolation", "sums"})
"""Laws without which no number says anything, however the text is read."""


@dataclass(frozen=True)
class Windows:
    """How a text is read in windows that know nothing of one another.

    size      tokens that each reads
    overlap   how many of them only as context: they were scored by the window before
    anchored  the last window begins early enough to read `size` tokens too, and scores those left
    why       a text is read so
    """

    size: int
    overlap: int = 0
    anchored: bool = False
    why: str = "windows were asked for"

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise StreamError(
                f"windows of {self.size} tokens cannot overlap by {self.overlap}: a window has to score something new."
            )

    def __str__(self) -> str:
        how = "as lm_eval reads them" if self.anchored else f"{self.overlap:,} of them read again"
        return f"windows of {self.size:,} tokens, {how}"


@dataclass(frozen=True)
class Policy:
    """What may be done with a model, and how it is done.

    carry        continue a sequence from its state; otherwise a sequence is read from its beginning, in one step
    multiple     only after multiples of so many tokens; 1 is any number
    single       only by one token a step
    longest      tokens of any step at most; None is any number
    fork         continue one state several times
    resume       go on from a state that was saved
    batch_size   rows side by side at most
    chunk_size   tokens a step of a text; None: as many as are allowed and fit the memory
    windows      read a text in these; None: with the state carried through it
    why          questions share less than they could; empty where they share all
    certificate  that allows it; None: nothing was probed
    """

    carry: bool = True
    multiple: int = 1
    single: bool = False
    longest: int | None = None
    fork: bool = True
    resume: bool = True
    batch_size: int = 8
    chunk_size: int | None = None
    windows: Windows | None = None
    why: str = ""
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        for name, holds in (("chunk_size", "chunk"), ("batch_size", "batch"), ("longest", "step"), ("multiple", "step")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StreamError(f"{name} is {value}; a {holds} has at least one {'row' if holds == 'batch' else 'token'}.")

    @property
    def share(self) -> bool:
        """Whether what several sequences begin with alike may be read once."""
        return self.carry and self.fork and not self.single

    @property
    def decode(self) -> bool:
        """Whether an answer may be generated token by token from the state."""
        return self.carry and self.fork and self.multiple == 1

    @property
    def reading(self) -> str:
        """How a text is read, in words."""
        chunks = "chunks" if self.chunk_size is None else f"chunks of {self.chunk_size}"
        return f"carried in {chunks}" if self.windows is None else f"{self.windows}, in {chunks}"

    @property
    def sharing(self) -> str:
        """Whether questions share what they begin with, in words."""
        return f"prefix sharing: {'on' if self.share else 'off'}" + (f" ({self.why})" if self.why else "")


def policy_for(
    lm: Model,
    certificate: Certificate | None = None,
    *,
    chunk_size: int | None = None,
    window: Window = None,
    overlap: int | None = None,
    batch_size: int = 8,
    default_chunk: int | None = None,
) -> Policy:
    """All that the certificate allows, used as asked.

    chunk_size     tokens a step of a text, cut to what a step or a window may hold; by default the largest that is exact, up to
                   `default_chunk`, or to what fits the memory
    window         read texts in windows of so many tokens; by default with the state carried, or in windows of the model's
                   context if it is limited, or of 1024 tokens if it has no state; "unlimited" carries the state past the
                   context that the model was made for; "lm_eval" reads as lm-evaluation-harness does (`rolling_windows`)
    overlap        tokens of a window that are only read, not scored; half of it by default
    batch_size     rows side by side at most

    Raises Refused for more than is allowed, and StreamError for what cannot be read so in any case.
    """
    policy = allowed_by(lm, certificate, batch_size)
    asked = window is not None or policy.carry or not lm.stateful  # else a state that is wrong would be passed over in silence
    policy = replace(policy, windows=_windows(lm, window, overlap) if asked else None, chunk_size=chunk_size)
    policy = replace(policy, chunk_size=chunk_of(lm, policy, default_chunk))
    check(lm, policy)
    return policy


def allowed_by(lm: Model, certificate: Certificate | None, batch_size: int = 8) -> Policy:
    """All that may be done with a model of this certificate; without one, all that the model declares.

    Raises Refused where no number says anything.
    """
    stateless = "" if lm.stateful else "the model has no state to carry"
    if certificate is None:
        return Policy(carry=lm.stateful, batch_size=batch_size, why=stateless)
    broken, verdict = certificate.broken, certificate.verdict
    if broken & NOTHING_HOLDS:
        advice = "Repair what makes the same text read differently the second time."
        if verdict == NON_CAUSAL:
            advice = "It cannot be scored as a language model at all."
        why = "A number that is made with it would be wrong, and may look good."
        raise refused(lm, Policy(certificate=certificate), why, advice)
    impossible = {name: law.unavailable for name, law in certificate.laws.items() if law.unavailable not in (None, OUT_OF_TIME)}
    forbidden = broken | impossible.keys()
    core, multiple = broken - ONLY_ASIDE, certificate.multiple
    single = core == {"splits"} and multiple is None
    longest = certificate.limit_tokens if certificate.limit_is_step else None
    exact = not core or single or (multiple is not None and multiple <= (longest or multiple))
    policy = Policy(
        carry=lm.stateful and exact,
        multiple=multiple or 1,
        single=single,
        longest=longest,
        fork=not forbidden & {"fork", "prefix"},
        resume="resume" not in forbidden,
        batch_size=1 if forbidden & {"rows", "prefix"} else batch_size,  # padding makes a text longer
        certificate=certificate,
    )
    return replace(policy, why=stateless or ("" if policy.share and multiple is None else impossible.get("fork") or verdict))


def chunk_of(lm: Model, policy: Policy, default: int | None = None) -> int:
    """Tokens a step of a text: those that the policy asks for, or the largest exact number up to `default`, or to what fits the
    memory; no more than a step may read, or a window holds."""
    windows, multiple = policy.windows, policy.multiple
    if windows is not None and not policy.carry:
        return windows.size
    usual = min(policy.chunk_size or default or default_chunk_size(lm), policy.longest or LARGEST_STEP)
    if policy.carry and (policy.chunk_size is None or usual < policy.chunk_size):
        usual = 1 if policy.single else max(multiple, usual // multiple * multiple)
    return usual if windows is None else min(usual, windows.size)


def check(lm: Model, policy: Policy) -> None:
    """Raises Refused for a policy that asks for more than its certificate allows, or for a text to be read otherwise than it
    allows itself; with what broke, and what to ask for."""
    if policy.certificate is not None:
        allowed = allowed_by(lm, policy.certificate)
        longest = allowed.longest or LARGEST_STEP
        beyond = {
            "to carry its state": policy.carry and not allowed.carry,
            f"to continue its state after multiples of {policy.multiple}": policy.multiple % allowed.multiple,
            "to continue its state by several tokens": policy.carry and allowed.single and not policy.single,
            "to fork its state": policy.fork and not allowed.fork,
            "to go on from a saved state": policy.resume and not allowed.resume,
            "to read rows side by side": policy.batch_size > allowed.batch_size == 1,
            f"for steps of more than {longest} tokens": (policy.longest or LARGEST_STEP) > longest,
        }
        if asked := [what for what, more in beyond.items() if more]:
            why = f"The policy asks {', '.join(asked)}, which its certificate does not allow."
            raise refused(lm, policy, why, "Take what policy_for(lm, certificate) allows.")
    size, windows = policy.chunk_size, policy.windows
    if size is None:
        return
    within = windows is not None and size < windows.size
    if within and not policy.carry:
        raise streaming_refused(lm, policy, f"Chunks of {size} carry its state through {windows}. ")
    if policy.carry and (within or windows is None) and (size % policy.multiple or (policy.single and size > 1)):
        how, exact = ("one token at a time", 1) if policy.single else (f"in multiples of {policy.multiple}", policy.multiple)
        why = f"It is exact {how} only, and chunk_size={size} was asked for. A perplexity streamed that way would be wrong,"
        raise refused(lm, policy, f"{why} and may look good.", f"Leave chunk_size out, or set it to {exact}.")
    if policy.longest is not None and size > policy.longest:
        why = f"It reads at most {policy.longest} tokens in a step, and chunk_size={size} was asked for."
        raise refused(lm, policy, why, f"Leave chunk_size out, or set it to {policy.longest} at most.")


def limited(lm: Model, certificate: Certificate) -> Model:
    """The model with the limit of its context that the probe found, where it declares none."""
    found = None if certificate.limit_is_step else certificate.limit_tokens
    return replace(lm, found_limit=found) if found else lm


def refuse_training(lm: Model, certificate: Certificate) -> None:
    """Raises Refused for a model that sees what it is to predict: all that training needs, since it carries no state."""
    if "causality" in certificate.broken:
        why = "Trained, it would learn to look at the token that it is to predict, and its perplexity would look good and mean"
        raise refused(lm, Policy(certificate=certificate), f"{why} nothing.", "Repair its mask first.")


def refused(lm: Model, policy: Policy, why: str, advice: str) -> Refused:
    """The error that says what the model is, with its counterexamples, why that forbids what was asked for, and what to do."""
    certificate = policy.certificate
    found = "not certified. " if certificate is None else f"{certificate.verdict}:\n{certificate.why_not()}\n"
    return Refused(f"{lm.spec} is {found}{why} {advice}")


def streaming_refused(lm: Model, policy: Policy, asked: str = "") -> Refused:
    """The error for a text that is to be read with a state that may not be carried."""
    if not lm.stateful:
        return Refused(
            f"{asked}{lm.spec} has no state to carry: it can only be read in windows. Take policy_for(lm), which has some."
        )
    why = f"{asked}A perplexity streamed with it would be wrong, and may look good."
    return refused(lm, policy, why, "Repair its state, or score it in windows that carry none: window=512.")


def default_chunk_size(lm: Model) -> int:
    """The power of two, 16 to 1024, whose logits (float32, and as much again twice to score them) fit the budget."""
    logits = lm.vocab_size * (1 if lm.codebooks is None else len(lm.codebooks.scored))
    fitting = LOGITS_BUDGET // (logits * 4 * 3)
    return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, 1 << max(fitting, 1).bit_length() - 1))


def _windows(lm: Model, window: Window, overlap: int | None) -> Windows | None:
    """The windows that a text is read in; None where the state is carried."""
    if window == "lm_eval":
        return rolling_windows(lm, overlap)
    if window == "unlimited" and not lm.stateful:
        raise StreamError(f"{lm.spec} has no state to carry: it can only be read in windows.")
    if window not in (None, "unlimited") and not (isinstance(window, int) and window > 0):
        raise StreamError(f'window={window!r} was asked for; it is a number of tokens, "unlimited", or "lm_eval".')
    why = "windows were asked for"
    if window is None:
        if not lm.stateful:
            window, why = lm.limit or WINDOW, "the model has no state to carry"
        elif lm.limit is not None:
            window, why = lm.limit, f"the model's context is {lm.limit} tokens"
    if window is None or window == "unlimited":
        return None
    return Windows(window, window // 2 if overlap is None else overlap, why=why)


def rolling_windows(lm: Model, overlap: int | None = None) -> Windows:
    """The windows of loglikelihood_rolling of lm-evaluation-harness 0.4.13, so that its numbers can be had again.

    They do not overlap: each predicts as many tokens as the model's context holds, after one token that is only read, which is
    the prefix token at the beginning. The last one begins so early that it fills the context too, and scores what is left. The
    context is `lm.limit`, or 2048 tokens where the model names none: its HFLM takes, in that case, the tokenizer's
    model_max_length first. For its `max_length=N`, give it `dataclasses.replace(lm, context_length=N)`. What stands before the
    text is chosen as there, too (see `data._tokens.beginning`).

    One of its numbers cannot be had again: where a text repeats itself, so that two windows of a batch read the same tokens but
    score different numbers of them, its HFLM takes the wrong rows of logits for one. With batch_size=1 it does not.

    Raises StreamError for another overlap.
    """
    if overlap:
        raise StreamError(
            f"window='lm_eval' was asked for with overlap={overlap}. The windows of lm-evaluation-harness overlap by its own "
            "rule, so the numbers would not be comparable. Leave overlap out, or say how long a window is: window=1024."
        )
    size = lm.limit or ROLLING_WINDOW
    context = "the model's context" if lm.limit else "its default, as the model names no context"
    why = f"asked for as lm-evaluation-harness reads (loglikelihood_rolling); {size} tokens are {context}"
    return Windows(size, anchored=True, why=why)
