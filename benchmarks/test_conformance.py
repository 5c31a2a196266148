"""How does each architecture of the installed transformers stream? Tiny random models, every law, a verdict each.

    pytest benchmarks/test_conformance.py -n 2

The table of verdicts is in `summary.md` and `report.html`; types that cannot be built stand there with the reason. A run that
is stopped goes on where it was. What is wrong in a version of transformers is expected to be wrong: a fix upstream fails here,
and is to be entered.
"""

import pytest
import torch
from packaging.version import Version

transformers = pytest.importorskip("transformers")

from tiny_transformers import CannotBuild, build, causal_lm_types  # noqa: E402

from pytest_lmeval.models._sources import as_model  # noqa: E402

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

BUDGET = 4.0  # seconds
EXACT = ("exact-any-chunk", "")
KNOWN = {  # from which version on -> what is not exact there: (verdict, the laws that decide it)
    "5.23": {
        # the recurrent state starts over whenever a chunk of more than one token goes on
        "falcon_mamba": ("exact-step-only", "splits"),
        "jamba": ("exact-step-only", "splits"),
        "mamba": ("exact-step-only", "splits"),
        "zamba": ("exact-step-only", "splits"),
        # the length that was read is asked of a layer that does not know it
        "minimax": ("exact-step-only", "splits"),
        # the time step is clamped in the path for chunks, and not in that for single tokens
        "nemotron_h": ("inexact", "splits steps"),
        "zamba2": ("inexact", "splits steps"),
        # one token of several rows is broadcast against the state of all rows
        "rwkv": ("inexact", "rows"),
        # in one piece the window is not applied, and the cache evicts what is outside of it
        "moshi": ("inexact", "splits steps"),
        # keys are chosen by a score that equal tokens share, so that the layout of a call breaks the ties
        "doge": ("length-dependent", "prefix"),
        # the bias of a position is taken from another one's, and pieces that go on raise
        "prophetnet": ("non-causal", "causality splits steps"),
        # the prompt is read both ways, and with a cache all of it is wanted again
        "cpmant": ("non-causal", "causality splits steps"),
        # tokens are sorted into buckets of which later ones are a part
        "reformer": ("non-causal", "causality"),
        # how far a token looks is counted from the ids that are no padding
        "xlm": ("non-causal", "causality"),
        # no cache, none under a name that is known, or one that raises: read in windows
        "blt": ("stateless", ""),
        "openai-gpt": ("stateless", ""),
        "recurrent_gemma": ("stateless", ""),
        "xlnet": ("stateless", ""),
        # as they are often driven: positions begin at zero in each chunk, the mask is made for the wrong length, and the
        # convolution's tail is dropped from a state that lies in the modules
        "bamba WithoutPositions": ("inexact", "splits steps"),
        "minimax WithoutPositions": ("non-causal", "causality splits"),
        "recurrent_gemma HoldingItsState": ("inexact", "splits steps"),
    }
}


def expected(name):
    """What the newest entry says that is no newer than what is installed."""
    installed = Version(transformers.__version__)
    entries = [KNOWN[version] for version in sorted(KNOWN, key=Version) if Version(version) <= installed]
    return entries[-1].get(name, EXACT) if entries else EXACT


def judge(lmeval, model, name):
    result = lmeval.equivalence(as_model(model, spec=name), budget=BUDGET)
    verdict, laws = expected(name)
    assert result.verdict == verdict, result
    assert set(laws.split()) <= result.certificate.broken, result


@pytest.mark.parametrize("name", causal_lm_types())
def test_architecture(lmeval, name):
    try:
        model = build(name)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    judge(lmeval, model, name)


class WithoutPositions:
    """A transformers model as it is called where nobody passes `position_ids`."""

    def __init__(self, module):
        self.module = module

    def step(self, input_ids, state=None):
        output = self.module(input_ids=input_ids, past_key_values=state, use_cache=True)
        return output.logits, output.past_key_values


class HoldingItsState:
    """A model that keeps its state in its own modules: the state that goes from step to step is only how much was read."""

    def __init__(self, module):
        self.module = module

    def step(self, input_ids, state=None):
        seen = 0 if state is None else state
        positions = torch.arange(seen, seen + input_ids.shape[1])[None]
        return self.module(input_ids=input_ids, position_ids=positions, use_cache=True).logits, seen + input_ids.shape[1]


@pytest.mark.parametrize(
    ("name", "driven"), [("bamba", WithoutPositions), ("minimax", WithoutPositions), ("recurrent_gemma", HoldingItsState)]
)
def test_architecture_as_it_is_often_driven(lmeval, name, driven):
    """The adapter passes positions, and drives what hides its state without one; these are what it guards against."""
    judge(lmeval, driven(build(name)), f"{name} {driven.__name__}")
