"""Measure a model: one file a verb, with its result and record, and the fixture `lmeval`, whose methods are the verbs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_lmeval import registry
from pytest_lmeval.errors import LmevalError, RegistryError, UnknownVerb
from pytest_lmeval.measures._context import VerbContext, check_call, running_in

if TYPE_CHECKING:
    import pytest_lmeval as public


class Lmeval:
    """The fixture `lmeval`: every verb as a method. A call returns a result and records it for the reports."""

    def __init__(self, context: VerbContext) -> None:
        self._context = context

    def __repr__(self) -> str:
        return f"<lmeval of {self._context.log.test}>"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The verb of that name, in this test's context. Errors of this package show at the line of the test."""
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            function = registry.find("verbs", name)
        except RegistryError as error:
            raise UnknownVerb(f"lmeval has no such verb: {error}") from None

        @functools.wraps(function)
        def shown_at_the_call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            with running_in(self._context):
                try:
                    check_call(function, args, kwargs)  # of another package, too
                    return function(*args, **kwargs)
                except LmevalError as error:
                    raise error.with_traceback(None) from None

        return shown_at_the_call

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *registry.names("verbs")]

    if TYPE_CHECKING:  # what editors complete
        agreement = staticmethod(public.agreement)
        efficiency = staticmethod(public.efficiency)
        equivalence = staticmethod(public.equivalence)
        finetune = staticmethod(public.finetune)
        hidden_states = staticmethod(public.hidden_states)
        iter_hidden_states = staticmethod(public.iter_hidden_states)
        latency = staticmethod(public.latency)
        latency_grid = staticmethod(public.latency_grid)
        load_test = staticmethod(public.load_test)
        memory = staticmethod(public.memory)
        perplexity = staticmethod(public.perplexity)
        record = staticmethod(public.record)
        snapshot = staticmethod(public.snapshot)
        streaming = staticmethod(public.streaming)
        suite = staticmethod(public.suite)
        task = staticmethod(public.task)
        throughput = staticmethod(public.throughput)
        train = staticmethod(public.train)
