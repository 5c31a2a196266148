"""Short ways to read in tests: with nothing proven, and the choices of a policy as keywords."""

import numpy as np

from pytest_lmeval.engine import Chunk, Engine, Policy, Windows, policy_for
from pytest_lmeval.measures import _agreement, _perplexity, _task


def stream(lm, tokens, *, chunk_size=None, **place):
    """The state carried, whatever the model's context."""
    return Engine(lm, Policy(chunk_size=chunk_size)).stream(tokens, **place)


def stream_in_windows(lm, tokens, *, window, overlap, anchored=False, chunk_size=None, **place):
    return Engine(lm, Policy(windows=Windows(window, overlap, anchored), chunk_size=chunk_size)).stream(tokens, **place)


def chunk_of(start, nll, rank=0, *, seconds=0.0, state_bytes=0):
    """A chunk of these losses [n], of a byte each."""
    n = len(nll)
    return Chunk(start, start + n, nll, np.broadcast_to(rank, n), np.ones(n), seconds, state_bytes, None)


def reader(lm, batch_size=8, share=True, multiple=1):
    """An engine for requests. Without `share`, each is read whole."""
    return Engine(lm, Policy(batch_size=batch_size, fork=share, multiple=multiple))


def measure_perplexity(lm, corpus, *, certificate=None, chunk_size=None, window=None, overlap=None, **options):
    policy = policy_for(lm, certificate, chunk_size=chunk_size, window=window, overlap=overlap)
    return _perplexity.measure_perplexity(lm, corpus, policy=policy, **options)


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
