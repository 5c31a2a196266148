"""`lmeval lm-eval`: run lm_eval's own command line, which knows the model `pytest-lmeval` then.

    lmeval lm-eval run --model pytest-lmeval --model_args pretrained=demo --tasks arc_easy --limit 10

lm_eval 0.4.13 looks for no models of other packages; a later one finds it by its entry point, and needs this command no more.
"""

from __future__ import annotations

import argparse
import sys
from unittest import mock

from pytest_lmeval.errors import UsageError, described

PASSES_ON = True  # all arguments are lm_eval's
NAME = "pytest-lmeval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", help="those of `lm-eval`")


def main(options: argparse.Namespace) -> int:
    """Run it with these arguments. Raises UsageError where lm_eval is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UsageError(f"lm_eval cannot be imported ({described(error)}): pip install 'pytest-lmeval[lm-eval]'.") from error
    register()
    with mock.patch.object(sys, "argv", ["lm-eval", *options.arguments]):
        cli_evaluate()
    return 0


def register() -> None:
    """Tell lm_eval of the model, unless it has found it itself."""
    from lm_eval.api.registry import MODEL_REGISTRY, register_model

    if NAME not in MODEL_REGISTRY:
        from pytest_lmeval.lm_eval._model import LmevalModel

        register_model(NAME)(LmevalModel)
