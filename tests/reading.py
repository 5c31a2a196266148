"""Short ways to read texts in tests: with nothing probed, the choices of a policy as keywords, and interrupted."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, Functional

from pytest_lmeval import as_model
from pytest_lmeval.data._corpus import Corpus, Document
from pytest_lmeval.engine import Chunk, Engine, Policy, Windows, policy_for
from pytest_lmeval.measures import _agreement, _perplexity, _task
from pytest_lmeval.records._certificate import Costs
from pytest_lmeval.records._journal import Saver
from pytest_lmeval.scoring._loss_accumulator import LossAccumulator

LM = as_model(Functional())
CHEAP = Costs(call=16, reach=0)  # sixteen tokens are worth a call


def ids_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def losses_of(ids, lm=LM):
    """The losses of one step over a whole text, computed from its logits in float64."""
    ids = torch.as_tensor(np.asarray(ids))
    with torch.no_grad():
        logits, _ = lm.step(ids[None, :-1])
    return torch.nn.functional.cross_entropy(logits[0].double(), ids[1:], reduction="none").numpy()


def texts(*documents, as_stream=True):
    """A corpus of texts, or of (name, text)."""
    named = [part if isinstance(part, tuple) else (str(number), part) for number, part in enumerate(documents)]
    return Corpus("texts", "test", lambda: (Document(*part) for part in named), "fp", as_stream=as_stream)


def stream(lm, tokens, *, chunk_size=None, **where):
    """The state carried, whatever the model's context."""
    return Engine(lm, Policy(chunk_size=chunk_size)).stream(tokens, **where)


def stream_in_windows(lm, tokens, *, window, overlap, anchored=False, chunk_size=None, **where):
    return Engine(lm, Policy(windows=Windows(window, overlap, anchored), chunk_size=chunk_size)).stream(tokens, **where)


def nll_of(chunks):
    return np.concatenate([chunk.nll for chunk in chunks])


def chunk_of(start, nll, rank=0, *, seconds=0.0, state_bytes=0):
    """A chunk of these losses [n], of a byte each."""
    n = len(nll)
    return Chunk(start, start + n, nll, np.broadcast_to(rank, n), np.ones(n), seconds, state_bytes, None)


def accumulated(nll, sizes, positions=(), documents=None):
    """The sums of losses [n] in chunks of these sizes, the rest in a last one; `documents` are lengths."""
    sums = LossAccumulator(documents is not None, positions)
    for part in np.split(nll, np.cumsum(documents)[:-1]) if documents else [nll]:
        sums.start_document()
        start = 1
        for size in (*sizes, len(part)):
            if len(losses := part[start - 1 : start - 1 + size]):
                sums.add(chunk_of(start, losses, (losses * 7).astype(int) % 9))
                start += len(losses)
    return sums


def engine_of(lm, batch_size=8, share=True, multiple=1):
    """An engine for requests. Without `share`, each is read whole."""
    return Engine(lm, Policy(batch_size=batch_size, fork=share, multiple=multiple, costs=CHEAP))


def measure_perplexity(lm, corpus, *, certificate=None, chunk_size=None, window=None, overlap=None, **options):
    policy = policy_for(lm, certificate, chunk_size=chunk_size, window=window, overlap=overlap)
    return _perplexity.measure_perplexity(lm, corpus, policy=policy, **options)


class Killed(Exception):
    pass


@contextmanager
def saving_every_chunk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "PAUSE", 0.0)
        patch.setattr(Saver, "SHARE", 0.0)
        yield


def measure_until_killed(tokens, lm, corpus, **options):
    """Read until so many tokens are scored, save every chunk, and end as if the process was killed."""

    def kill(done, nats, expected):
        if done >= tokens:
            raise Killed

    with pytest.raises(Killed), saving_every_chunk():
        measure_perplexity(lm, corpus, progress=kill, **options)


def assert_equal_but_for_time(result, expected):
    """All metrics and curves, to the last bit, but for those of time."""
    for name, metric in expected.record.metrics.items():
        assert name == "tokens_per_second" or result.record.metrics[name].to_json() == metric.to_json()
    for name, series in expected.record.series.items():
        assert name == "chunk_seconds" or result.record.series[name] == series


def measure_agreement(lm, reference, corpus, *, chunk_size=None, reference_chunk_size=None, **options):
    policies = {
        "policy": policy_for(lm, chunk_size=chunk_size),
        "reference_policy": policy_for(reference, chunk_size=reference_chunk_size),
    }
    return _agreement.measure_agreement(lm, reference, corpus, **policies, **options)


def measure_task(lm, task, *, batch_size=8, carry=True, fork=True, single=False, multiple=1, longest=None, **options):
    how = {"carry": carry and lm.stateful, "fork": fork, "single": single, "multiple": multiple, "longest": longest}
    policy = Policy(batch_size=batch_size, **how)
    return _task.measure_task(lm, task, policy=policy, **options)
