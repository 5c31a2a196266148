"""Derive from a certificate what the engine may do with a model, and refuse more.

Only what was proven is done: a law that is broken, untried, or not applicable to the model allows nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pytest_lmeval.errors import Refused, StreamError
from pytest_lmeval.models._model import Model
from pytest_lmeval.records._certificate import NON_CAUSAL, UNPROVEN, Certificate, Costs

Window: TypeAlias = 'int | Literal["unlimited", "lm_eval"] | None'

WINDOW = 1024  # tokens of a window for a model without a context limit
ROLLING_WINDOW = 2048  # the same in lm-evaluation-harness
LOGITS_BUDGET = 256 << 20  # bytes for the logits of a step and what is computed from them
LARGEST_CHUNK, SMALLEST_CHUNK = 1024, 16
USUAL = Costs(call=32, reach=4096)  # of a model whose operations were not counted
UNLIMITED = 1 << 62  # tokens of a step
MORE_SHORT_ROWS = 4  # times the rows of a batch, that one of short sequences may have
CALL = 46  # tokens that a call costs beside those it reads, as measured on a model of 135 million parameters

NOT_FOR_STREAMING = frozenset(
    {"rows", "fork", "resume", "size", "packed"}
)  # laws that an uninterrupted stream of one row does not need
FOR_EVERYTHING = frozenset(
    {"causality", "repeat", "isolation", "sums", "order", "cache"}
)  # laws without which every number is meaningless; the last two are of servers


@dataclass(frozen=True)
class Windows:
    """Independent windows that a text is read in.

    size      tokens that each reads
    overlap   how many of them are only context: the window before has scored them
    anchored  the last window begins early enough to read `size` tokens too, and scores the remaining ones
    why       the text is read in windows
    """

    size: int
    overlap: int = 0
    anchored: bool = False
    why: str = "windows were asked for"

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise StreamError(f"windows of {self.size} tokens cannot overlap by {self.overlap}: each has to score a token.")

    def __str__(self) -> str:
        how = "as lm_eval reads them" if self.anchored else f"{self.overlap:,} of them read again"
        return f"windows of {self.size:,} tokens, {how}"


@dataclass(frozen=True)
class Policy:
    """What the engine may do with a model, and how it does it.

    carry        continue a sequence from its state; otherwise read each sequence from its beginning, in one step
    multiple     continue a state only after multiples of so many tokens; 1: after any number
    single       continue a state only by one token a step
    longest      the most tokens in a step; None: any number
    fork         continue one state several times
    pack         read several sequences in one row, each with its own past
    resume       resume from a saved state
    batch_size   the most rows in a batch
    costs        what calls cost the model, by which packs and batches are formed; None: nothing was counted
    chunk_size   tokens a step of a text; None: as many as are allowed and fit the memory
    windows      read a text in these; None: carry the state through it
    why          questions share less than they could; empty if they share all
    withheld     what is not done because a law is not kept, in words
    invariant    read each sequence alone, and the chunks of a text in one shape: the same bits for any batch, order and limit
    certificate  that allows it; None: nothing was probed
    """

    carry: bool = True
    multiple: int = 1
    single: bool = False
    longest: int | None = None
    fork: bool = True
    pack: bool = False
    resume: bool = True
    batch_size: int = 8
    costs: Costs | None = None
    chunk_size: int | None = None
    windows: Windows | None = None
    why: str = ""
    withheld: tuple[str, ...] = ()
    invariant: bool = False
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        for name, holds in (("chunk_size", "chunk"), ("batch_size", "batch"), ("longest", "step"), ("multiple", "step")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StreamError(f"{name} is {value}; a {holds} has at least one {'row' if holds == 'batch' else 'token'}.")

    @property
    def call(self) -> int:
        """What a call costs, in tokens."""
        return (self.costs or USUAL).call

    @property
    def short_rows(self) -> int:
        """The most rows in a batch of sequences so short that they take no more than whole ones in `batch_size` rows."""
        known = None if self.certificate is None else self.certificate.limit_rows
        return 1 if self.batch_size == 1 else min(MORE_SHORT_ROWS * self.batch_size, known or UNLIMITED)

    @property
    def share(self) -> bool:
        """Whether a prefix that several sequences share may be read once."""
        return self.carry and self.fork and not self.single

    @property
    def decode(self) -> bool:
        """Whether an answer may be generated token by token from a state."""
        return self.carry and (self.fork or self.invariant) and self.multiple == 1  # one sequence is not forked

    @property
    def reading(self) -> str:
        """How texts are read, in words."""
        chunks = "chunks" if self.chunk_size is None else f"chunks of {self.chunk_size}"
        chunks += ", the last one padded" if self.invariant else ""
        return f"carried in {chunks}" if self.windows is None else f"{self.windows}, in {chunks}"

    @property
    def sharing(self) -> str:
        """Whether questions share prefixes, in words."""
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
    invariant: bool = False,
) -> Policy:
    """All that the certificate allows (without one: that the model declares), with these choices.

    chunk_size     tokens a step of a text, reduced to the size of a step or a window; by default the largest exact size up to
                   `default_chunk`, or that fits the memory
    window         read texts in windows of so many tokens; by default carry the state, or read windows of the model's context
                   limit if it has one, or of 1024 tokens if it has no state or nothing is proven about it; "unlimited" carries
                   the state past that limit;
                   "lm_eval" reads as lm-evaluation-harness does (`rolling_windows`)
    overlap        tokens of a window that are read but not scored; by default half of it, which reads each token twice
    batch_size     the most rows in a batch
    invariant      read each sequence alone, and pad the last chunk of a text: see `Policy`

    Raises Refused for more than the certificate allows, and StreamError for impossible choices.
    """
    policy = allowed_by(lm, certificate, batch_size)
    if invariant:
        policy = replace(
            policy, invariant=True, fork=False, pack=False, batch_size=1, why=policy.why or "each is read alone: invariant=True"
        )
    withheld = lm.stateful and not policy.carry
    unproven = withheld and certificate is not None and certificate.verdict == UNPROVEN and lm.codebooks is None
    if window is None and unproven:
        size = lm.limit or WINDOW
        windows: Windows | None = Windows(
            size, size // 2 if overlap is None else overlap, why=f"no state is carried, since {policy.why}"
        )
    else:  # windows by default would hide that the state is wrong
        windows = None if window is None and withheld else _windows(lm, window, overlap)
    policy = replace(policy, windows=windows, chunk_size=chunk_size)
    policy = replace(policy, chunk_size=chunk_of(lm, policy, default_chunk))
    check(lm, policy)
    return policy


def allowed_by(lm: Model, certificate: Certificate | None, batch_size: int = 8) -> Policy:
    """All that a certificate allows; without one, all that the model declares. Raises Refused if no number can be trusted."""
    stateless = "" if lm.stateful else "the model has no state to carry"
    if certificate is None:
        return Policy(carry=lm.stateful, batch_size=batch_size, why=stateless)
    broken, verdict, laws = certificate.broken, certificate.verdict, certificate.laws
    if broken & FOR_EVERYTHING:
        advice = "Repair what makes the same text read differently the second time."
        if verdict == NON_CAUSAL:
            advice = "It cannot be scored as a language model at all."
        raise refused(lm, Policy(certificate=certificate), "Its numbers would be wrong, and may look good.", advice)

    def lacking(*names: str) -> list[str]:
        return [f"{name} is {laws[name].status}" for name in names if name in laws and not laws[name].kept]

    core, multiple = set(laws) - NOT_FOR_STREAMING - set(certificate.with_status("not applicable")), certificate.multiple
    single = "splits" in broken and multiple is None and not lacking(*core - {"splits"})
    longest = certificate.limit_tokens if certificate.limit_is_step else None
    fits = multiple is not None and multiple <= (longest or multiple)
    exact = lm.stateful and (single or not lacking(*core) or (fits and not lacking(*core - {"splits", "steps"})))
    no_carry = [] if exact or not lm.stateful else lacking(*sorted(core)) or [verdict]
    no_fork = lacking("fork", "prefix") if lm.stateful else []
    no_rows = lacking("rows", "prefix", "batch")  # padding changes the length of a text; the last one is of servers
    any_chunk = exact and not single and multiple is None
    denied = {
        "no state is carried": no_carry,
        "no prefix is shared": no_fork,
        "batches of one": no_rows,
    }
    policy = Policy(
        carry=exact,
        multiple=multiple or 1,
        single=single,
        longest=longest,
        fork=not no_fork,
        pack=lm.packing is not None and any_chunk and not no_fork and "packed" in laws and not lacking("packed"),
        resume=not lacking("resume"),
        batch_size=1 if no_rows else min(batch_size, certificate.limit_rows or batch_size),
        costs=certificate.costs,
        withheld=tuple(f"{what}, since {' and '.join(why)}" for what, why in denied.items() if why),
        certificate=certificate,
    )
    unavailable = laws["fork"].unavailable if "fork" in laws else None
    return replace(policy, why=stateless or ("" if policy.share and multiple is None else unavailable or verdict))


def chunk_of(lm: Model, policy: Policy, default: int | None = None) -> int:
    """Tokens a step of a text: as the policy says, or the largest exact number up to `default` or that fits the memory; at
    most those of a step or a window."""
    windows, multiple = policy.windows, policy.multiple
    if windows is not None and not policy.carry:
        return windows.size
    usual = min(policy.chunk_size or default or default_chunk_size(lm, policy.costs), policy.longest or UNLIMITED)
    if policy.carry and (policy.chunk_size is None or usual < policy.chunk_size):
        usual = 1 if policy.single else max(multiple, usual // multiple * multiple)
    return usual if windows is None else min(usual, windows.size)


def check(lm: Model, policy: Policy) -> None:
    """Raise Refused for a policy that asks for more than its certificate allows, or that contradicts itself."""
    if policy.certificate is not None:
        allowed = allowed_by(lm, policy.certificate, policy.batch_size)
        longest = allowed.longest or UNLIMITED
        beyond = {
            "to carry its state": policy.carry and not allowed.carry,
            f"to continue its state after multiples of {policy.multiple}": policy.multiple % allowed.multiple,
            "to continue its state by several tokens": policy.carry and allowed.single and not policy.single,
            "to fork its state": policy.fork and not allowed.fork,
            "to read several sequences in one row": policy.pack and not allowed.pack,
            "to resume from a saved state": policy.resume and not allowed.resume,
            f"to read {policy.batch_size} rows at once": policy.batch_size > allowed.batch_size,
            f"for steps of more than {longest} tokens": (policy.longest or UNLIMITED) > longest,
        }
        if asked := [what for what, more in beyond.items() if more]:
            why = f"The policy asks {', '.join(asked)}, which its certificate does not allow."
            raise refused(lm, policy, why, "Use policy_for(lm, certificate).")
    size, windows = policy.chunk_size, policy.windows
    if size is None:
        return
    within = windows is not None and size < windows.size
    if within and not policy.carry:
        raise streaming_refused(lm, policy, f"Chunks of {size} carry its state through {windows}. ")
    if policy.carry and (within or windows is None) and (size % policy.multiple or (policy.single and size > 1)):
        how, exact = ("one token at a time", 1) if policy.single else (f"in multiples of {policy.multiple}", policy.multiple)
        why = f"It is exact {how} only, and chunk_size={size} was asked for. Its perplexity would be wrong, and may look good."
        raise refused(lm, policy, why, f"Leave chunk_size out, or set it to {exact}.")
    if policy.longest is not None and size > policy.longest:
        why = f"It reads at most {policy.longest} tokens in a step, and chunk_size={size} was asked for."
        raise refused(lm, policy, why, f"Leave chunk_size out, or set it to {policy.longest} at most.")


def limited(lm: Model, certificate: Certificate) -> Model:
    """The model, with the context limit that the probe found if it declares none."""
    found = None if certificate.limit_is_step else certificate.limit_tokens
    return replace(lm, found_limit=found) if found else lm


def refuse_training(lm: Model, certificate: Certificate) -> None:
    """Raise Refused for a model that is not causal. Training needs no other law, since it carries no state."""
    if "causality" in certificate.broken:
        why = "Trained, it would learn to look at the token that it predicts: its perplexity would look good and mean nothing."
        raise refused(lm, Policy(certificate=certificate), why, "Repair its mask first.")


def refused(lm: Model, policy: Policy, why: str, advice: str) -> Refused:
    """The error that gives the verdict and the counterexamples, why they forbid what was asked for, and what to do."""
    certificate = policy.certificate
    found = "not certified. " if certificate is None else f"{certificate.verdict}:\n{certificate.why_not()}\n"
    return Refused(f"{lm.spec} is {found}{why} {advice}")


def streaming_refused(lm: Model, policy: Policy, asked: str = "") -> Refused:
    """The error for a text that would need a state that may not be carried."""
    if not lm.stateful:
        return Refused(f"{asked}{lm.spec} has no state to carry: it can only be read in windows. Use policy_for(lm).")
    if policy.certificate is not None and policy.certificate.verdict == UNPROVEN:
        why, advice = (
            f"{asked}Nothing is proven about its state, so it is not carried.",
            "Let the laws be tried on their floors",
        )
    else:
        why, advice = f"{asked}Its perplexity would be wrong, and may look good.", "Repair its state"
    return refused(lm, policy, why, f"{advice}, or score it in windows that carry none: window=512.")


def default_chunk_size(lm: Model, costs: Costs | None = None) -> int:
    """The power of two, 16 to 1024, at which a token costs least, as far as that is known, and whose float32 logits fit the
    budget."""
    logits = lm.vocab_size * (1 if lm.codebooks is None else len(lm.codebooks.scored))
    fitting = 1 << max(LOGITS_BUDGET // (logits * 4), 1).bit_length() - 1
    return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, fitting, LARGEST_CHUNK if costs is None else costs.chunk))


def _windows(lm: Model, window: Window, overlap: int | None) -> Windows | None:
    """The windows to read texts in; None to carry the state."""
    if window == "lm_eval":
        return rolling_windows(lm, overlap)
    if window == "unlimited" and not lm.stateful:
        raise StreamError(f"{lm.spec} has no state to carry: it can only be read in windows.")
    if window not in (None, "unlimited") and not (isinstance(window, int) and window > 0):
        raise StreamError(f'window={window!r} was asked for; expected a number of tokens, "unlimited" or "lm_eval".')
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
    """The windows of loglikelihood_rolling of lm-evaluation-harness 0.4.13, which give the same numbers.

    They do not overlap: each predicts as many tokens as the model's context holds, after one that is only read, at first the
    prefix token (`data._tokens.beginning`). The last begins early enough to fill the context, and scores the remaining tokens.
    The context is `lm.limit`, or 2048 tokens for a model without one; its HFLM then tries the tokenizer's model_max_length
    first. For its `max_length=N`, give `dataclasses.replace(lm, context_length=N)`.

    If two windows of a batch read the same tokens but score different numbers of them, its HFLM uses the wrong rows of logits
    for one; with batch_size=1 it does not.
    """
    if overlap:
        raise StreamError(
            f"window='lm_eval' was asked for with overlap={overlap}. lm-evaluation-harness has a fixed overlap, so the numbers "
            "would not be comparable. Leave overlap out, or set the length of a window: window=1024."
        )
    size = lm.limit or ROLLING_WINDOW
    context = "the model's context" if lm.limit else "its default, since the model has no context limit"
    return Windows(size, anchored=True, why=f"as lm-evaluation-harness (loglikelihood_rolling); {size} tokens are {context}")
