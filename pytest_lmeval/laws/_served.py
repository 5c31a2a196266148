"""Try the laws of a served model: its answers depend on the tokens alone, not on when and beside what they are asked.

| law | says |
|---|---|
| repeat | the same sequence has the same log-probabilities again |
| batch | a sequence is read beside others as it is alone |
| order | a sequence is read the same whatever was asked before it |
| cache | what the prefix cache holds changes nothing: read first, after another with the same beginning, and again |
| decode | generated tokens have the log-probabilities of the same tokens in a prompt |
| chunks | a long prompt, read in chunks, begins with the log-probabilities of its beginning, and is the same in a crowd |

A server has no float64 reference. So two readings may differ by what its stated precision explains, or, where it states
none, by as much as in the coarsest usual one and some times the noise that repeated readings show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pytest_lmeval.laws._served_readings import Reading, beginning_of, comparable, relative_difference
from pytest_lmeval.models._model import Model
from pytest_lmeval.models._served import Asking, Scoring, Served, ServedAnswer, TokenScores
from pytest_lmeval.records import _certificate as verdicts
from pytest_lmeval.records._certificate import Certificate, Counterexample, LawResult

LAWS = ("repeat", "batch", "order", "cache", "decode", "chunks")
ROUNDINGS = 12  # of 1 in the stated precision, that two readings of a log-probability near 0 may differ by
LEAST = 1e-4  # nats; engines in float32 differ by 2e-5 from one another
NOISE = 8  # times the noise of repeated readings, where no precision is stated
SHORT, MIDDLE = (2, 17, 24, 40), 160  # tokens of prompts, beside the longest of the floor
CROWD = 8  # prompts that are read together, at least
GENERATED = 12  # tokens of an answer
SHARED = 10  # tokens that prompts have in common where a block of the cache is not known
LONG = 4097  # tokens of a prompt that is read in chunks by most servers
Ids = tuple[int, ...]


@dataclass
class _Law:
    """What was tried of one law: the largest error over the allowed one, and where."""

    cases: int = 0
    longest: int = 0
    ratio: float = 0.0
    error: float = 0.0
    where: str = ""
    length: int = 0
    seed: int = 0
    unavailable: str = ""
    missing: str = ""


@dataclass(eq=False)
class ServedHarness:
    """A served model under test.

    longest  tokens of the longest prompt of the floor
    noise    largest difference of two readings of one sequence, alone, over 1 + |log-probability|
    largest  difference of any two readings that may differ, nats
    """

    lm: Model
    longest: int
    laws: dict[str, _Law] = field(default_factory=lambda: {name: _Law() for name in LAWS})
    noise: float = 0.0
    largest: float = 0.0
    asked: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        served = self.lm.served
        assert served is not None
        self.served: Served = served
        self.scores = not served.facts.no_scores
        if served.facts.longest is not None:  # an answer has to fit, too
            self.longest = max(2, min(self.longest, served.facts.longest - 2 * GENERATED))
        lengths = sorted(
            {length for length in (*SHORT, MIDDLE, self.longest // 2, self.longest) if 2 <= length <= self.longest}
        )
        self.prompts = [self._ids(length, seed) for seed, length in enumerate(lengths)]
        more = range(len(self.prompts), max(CROWD, min(2 * self.served.concurrency, 32)))
        self.prompts += [self._ids(lengths[number % len(lengths)], number) for number in more]

    @property
    def base(self) -> float:
        """The allowed difference of a log-probability near 0, in nats."""
        told = self.served.facts.dtype
        if told:
            return max(LEAST, ROUNDINGS * torch.finfo(getattr(torch, told)).eps)
        return max(ROUNDINGS * torch.finfo(torch.bfloat16).eps, NOISE * self.noise)

    @property
    def reference(self) -> str:
        """What differences are measured against, in words."""
        told = self.served.facts.dtype
        why = f"as {told} allows" if told else f"the server states no precision; repeated readings differ by {self.noise:.1g}"
        return f"the same tokens asked otherwise; allowed {self.base:.2g} nats x (1 + |log-probability|): {why}"

    def run(self, progress: Callable[[int, float, int | None], None] | None = None) -> None:
        """Try every law on its floor. Raises ServerError for a server that fails."""
        for number, law in enumerate((self._repeat, self._batch, self._order, self._cache, self._decode, self._chunks)):
            law()
            if progress is not None:
                progress(number + 1, sum(one.ratio > 1 for one in self.laws.values()), len(LAWS))

    def _repeat(self) -> None:
        self.alone = self._read(self.prompts, at_once=1)
        some = [self.prompts[index] for index in (0, len(SHORT) - 1, -1) if len(self.prompts) > abs(index)]
        for _ in range(2):
            again = self._read(some, at_once=1)
            pairs = [(ids, self.alone[self.prompts.index(ids)], found) for ids, found in zip(some, again, strict=True)]
            self.noise = max([self.noise, *(relative_difference(one, other) for _, one, other in pairs)])
            for ids, one, other in pairs:
                self._compare("repeat", ids, one, other, "asked again")

    def _batch(self) -> None:
        for most in {min(CROWD, self.served.concurrency), self.served.concurrency}:
            if most < 2:
                self.laws["batch"].unavailable = "one request at a time is asked (concurrency 1)"
                return
            together = self._read(self.prompts, at_once=most)
            for ids, one, other in zip(self.prompts, self.alone, together, strict=True):
                self._compare("batch", ids, one, other, f"asked beside {most - 1} others")

    def _order(self) -> None:
        for ids, one, other in zip(
            self.prompts[::-1], self.alone[::-1], self._read(self.prompts[::-1], at_once=1), strict=True
        ):
            self._compare("order", ids, one, other, "asked in the opposite order")

    def _cache(self) -> None:
        """Prompts that share their beginning, at lengths within and past a block of the cache; each is read first, after the
        others, and again, also by an answer, since some servers read their cache only then."""
        law = self.laws["cache"]
        if self.served.facts.prefix_cache is False:
            law.unavailable = "the server keeps no prefix cache"
            return
        block = int(self.served.facts.settings.get("block_size", 0) or 0) or 2 * SHARED
        for seed, shared in enumerate((SHARED, block, 2 * block + 1), start=100):
            if shared + SHARED > self.longest and seed > 100:
                continue
            head = self._ids(min(shared, self.longest - 2), seed)
            family = [head + self._ids(SHARED, seed + 50 * k)[: max(1, self.longest - len(head))] for k in (1, 2, 3)]
            cold = [self._read([ids], at_once=1)[0] for ids in family]
            for _ in range(2):
                hot = [self._read([ids], at_once=1)[0] for ids in family]
                for ids, one, other in zip(family, cold, hot, strict=True):
                    self._compare("cache", ids, one, other, f"asked after others that share its first {len(head)} tokens", seed)
            if self.scores:
                first, again = self._generate(family), self._generate(family)
                for ids, one, other in zip(family, first, again, strict=True):
                    self._compare(
                        "cache", ids, one, other, f"answered after others that share its first {len(head)} tokens", seed
                    )

    def _decode(self) -> None:
        law = self.laws["decode"]
        if not self.scores:
            law.unavailable = "the server gives no log-probabilities of a prompt to compare with"
            return
        room = max(2, self.longest - GENERATED)
        prompts = [ids[:room] for ids in self.prompts[:CROWD]]
        found = self._generate(prompts)
        if all(answer.logprobs is None or answer.ids is None for answer in found):
            law.unavailable = "the server tells no ids or log-probabilities of what it generates"
            return
        for ids, answer in zip(prompts, found, strict=True):
            self._read_back("decode", ids, answer, "generated one by one")

    def _chunks(self) -> None:
        facts, law = self.served.facts, self.laws["chunks"]
        limit = self.lm.limit
        if not self.scores:
            law.unavailable = "the server gives no log-probabilities of a prompt to compare with"
            return
        if facts.chunk is not None and limit is not None and limit <= facts.chunk:
            law.unavailable = f"its prompts, of at most {limit:,} tokens, fit into one chunk of {facts.chunk:,}"
            return
        length = min(2 * facts.chunk + 1 if facts.chunk else LONG, limit or self.longest)
        long = self._ids(length, 200)
        whole = self._read([long], at_once=1)[0]
        for part in sorted({max(2, length // 3), length // 2 + 1, max(2, length - 7)}):
            found = self._read([long[:part]], at_once=1)[0]
            self._compare(
                "chunks", long[:part], beginning_of(whole, part - 1), found, f"read as the beginning of {length:,} tokens", 200
            )
        if self.served.concurrency > 1:
            crowd = [long, self._ids(length, 201), *self.prompts[: CROWD // 2]]
            found = self._read(crowd, at_once=min(len(crowd), self.served.concurrency))[0]
            self._compare("chunks", long, whole, found, "asked beside another long one", 200)

    def _ids(self, length: int, seed: int) -> Ids:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(0, self.lm.vocab_size, (length,), generator=generator).tolist())

    def _read(self, prompts: Sequence[Ids], *, at_once: int) -> list[Reading]:
        """The log-probabilities of each prompt's tokens but the first; of a server that gives none, an answer to it."""
        if not self.scores:
            return list(self._generate(prompts, at_once=at_once))
        found: dict[int, np.ndarray] = {}

        def done(number: int, scores: TokenScores) -> None:
            found[number] = scores.logprobs

        self.served.score([Scoring(ids, 1) for ids in prompts], done, at_once=at_once)
        self.asked, self.tokens = self.asked + len(prompts), self.tokens + sum(map(len, prompts))
        return [found[number] for number in range(len(prompts))]

    def _generate(self, prompts: Sequence[Ids], *, at_once: int = 1) -> list[ServedAnswer]:
        """The likeliest tokens after each prompt."""
        found: dict[int, ServedAnswer] = {}
        self.served.answer([Asking(ids, GENERATED) for ids in prompts], found.__setitem__, at_once=at_once)
        self.asked, self.tokens = self.asked + len(prompts), self.tokens + sum(map(len, prompts)) + GENERATED * len(prompts)
        return [found[number] for number in range(len(prompts))]

    def _read_back(self, law: str, ids: Ids, answer: ServedAnswer, how: str) -> None:
        """Compare the log-probabilities of an answer with those of its tokens as the end of a prompt."""
        if answer.ids is None or answer.logprobs is None or not answer.ids:
            return
        whole = (*ids, *map(int, answer.ids))
        read = self._read([whole], at_once=1)[0]
        assert isinstance(read, np.ndarray)
        self._compare(law, whole, read[len(ids) - 1 :], np.array(answer.logprobs), how, first=len(ids))

    def _compare(
        self, law: str, ids: Ids, one: Reading, other: Reading, how: str, seed: int = 0,
        first: int = 1,
    ) -> None:  # fmt: skip
        """Note how far two readings of a sequence are from each other; `first` is the token of their first entry."""
        tried = self.laws[law]
        tried.cases, tried.longest = tried.cases + 1, max(tried.longest, len(ids))
        ours, theirs = comparable(one, other)
        difference = np.abs(ours - theirs)
        difference[np.isneginf(ours) & np.isneginf(theirs)] = 0.0
        if not len(difference):
            return
        scale = np.abs(np.where(np.isfinite(ours), ours, 0.0))
        ratios = np.nan_to_num(difference / (self.base * (1 + scale)), nan=math.inf)
        at = int(ratios.argmax())
        if ratios[at] <= 1:
            self.largest = max(self.largest, float(difference.max()))
        if ratios[at] > tried.ratio or not tried.where:
            tried.ratio, tried.error, tried.length, tried.seed = float(ratios[at]), float(difference[at]), len(ids), seed
            tried.where = f"token {first + at} of {len(ids)}, {how}: {theirs[at]:.6g} in place of {ours[at]:.6g}"

    def certificate(self) -> Certificate:
        """What was found."""
        replay = f"pytest_lmeval.equivalence({self.lm.spec!r})"
        results = {}
        for name, law in self.laws.items():
            broken = law.ratio > 1
            message = f"{law.where}: off by {law.error:.3g} nats, {law.ratio:.3g} times what is allowed. {LIKELY[name]}"
            examples = (Counterexample({"length": law.length}, verdicts.finite(law.error), message, replay),) if broken else ()
            results[name] = LawResult(
                cases=law.cases,
                longest=law.longest,
                worst_ratio=verdicts.finite(law.ratio) if law.cases else None,
                worst_at=law.where or None,
                counterexamples=examples,
                missing=law.missing or None,
                unavailable=law.unavailable or None,
            )
        told, limit = self.served.facts.dtype, self.lm.limit
        broken_laws = {name for name, law in results.items() if law.status == "broken"}
        untried = any(law.status == "untried" for law in results.values())
        return Certificate(
            verdict=served_verdict(broken_laws, told, untried=untried),
            dtype=told or "unknown",
            reference=self.reference,
            laws=results,
            longest=max(law.longest for law in results.values()),
            limit=None if limit is None else f"a prompt and its answer have at most {self.served.facts.longest:,} tokens",
            rounding=self.largest,
        )


LIKELY = {
    "repeat": "Does it draw at random, or are its kernels not deterministic?",
    "batch": "What shares a batch is seen by others: look at masks, padding, or kernels that depend on the batch (vLLM: "
    "VLLM_BATCH_INVARIANT=1, SGLang: --enable-deterministic-inference).",
    "order": "Something of one request stays for the next.",
    "cache": "Its prefix cache holds states of other tokens: serve without it (vLLM: --no-enable-prefix-caching).",
    "decode": "Its decoding computes otherwise than its reading of a prompt: an answer is not what its scores say.",
    "chunks": "What comes before a chunk is lost or read at other positions: look at chunked prefill.",
}


def served_verdict(broken: set[str], dtype: str, *, untried: bool = False) -> str:
    """The verdict on a served model. It carries no state, so that what keeps all laws in float32 is `stateless`; coarser
    arithmetic hides small faults, and an unknown one may: `consistent`."""
    if broken & {"repeat", "batch", "order", "cache"}:
        return verdicts.INEXACT
    if "chunks" in broken:
        return verdicts.LENGTH_DEPENDENT
    if broken:
        return verdicts.INEXACT
    if untried:
        return verdicts.UNPROVEN
    return verdicts.STATELESS if dtype in ("float32", "float64") else verdicts.CONSISTENT


def nothing_tried(missing: str, dtype: str) -> Certificate:
    """The certificate of a served model that was not tried."""
    laws = {name: LawResult(cases=0, missing=missing) for name in LAWS}
    return Certificate(verdict=verdicts.UNPROVEN, dtype=dtype or "unknown", laws=laws)
