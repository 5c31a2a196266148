"""Find the verdict of each architecture of the installed transformers, with tiny random models, and count false alarms.

    pytest benchmarks/test_conformance.py -n 2

The table of verdicts is in `summary.md` and `report.html`, with the types that cannot be built and why. A stopped run resumes.
Known faults of a version of transformers are expected: a fix upstream fails here and must be entered. All other verdicts are
exact: any fault found there would be a false alarm.
"""

import pytest
import torch
from clean_models import CLEAN
from packaging.version import Version

transformers = pytest.importorskip("transformers")

from tiny_transformers import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, CannotBuild, build  # noqa: E402

from pytest_lmeval import policy_for  # noqa: E402
from pytest_lmeval.errors import Refused  # noqa: E402
from pytest_lmeval.laws import probe  # noqa: E402
from pytest_lmeval.measures._perplexity import measure_perplexity  # noqa: E402
from pytest_lmeval.models._sources import as_model, load  # noqa: E402
from pytest_lmeval.zoo import ZOO  # noqa: E402

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

BUDGET = 60_000  # tokens beyond the floors
EXACT = ("exact-any-chunk", "")
KNOWN = {  # first version -> what is not exact from there on: (verdict, the laws that decide it)
    "5.23": {
        # a chunk of more than one token restarts the recurrent state
        "falcon_mamba": ("exact-step-only", "splits"),
        "jamba": ("exact-step-only", "splits"),
        "mamba": ("exact-step-only", "splits"),
        "zamba": ("exact-step-only", "splits"),
        # asks a layer without a length how much was read
        "minimax": ("exact-step-only", "splits"),
        # clamps the time step in the path for chunks, not in that for single tokens
        "nemotron_h": ("inexact", "splits steps"),
        "zamba2": ("inexact", "splits steps"),
        # broadcasts one token of several rows against the state of all rows
        "rwkv": ("inexact", "rows"),
        # does not apply the window in one piece, but its cache evicts what is outside
        "moshi": ("inexact", "splits steps"),
        # chooses keys by a score that equal tokens share, so the layout of a call breaks ties
        "doge": ("length-dependent", "prefix"),
        # takes the bias of a position from another one; continued chunks raise
        "prophetnet": ("non-causal", "causality splits steps"),
        # reads the prompt in both directions, and all of it again with a cache
        "cpmant": ("non-causal", "causality splits steps"),
        # sorts tokens into buckets together with later ones
        "reformer": ("non-causal", "causality"),
        # counts how far a token looks from the ids that are no padding
        "xlm": ("non-causal", "causality"),
        # no cache, none under a known name, or one that raises: read in windows
        "blt": ("stateless", ""),
        "openai-gpt": ("stateless", ""),
        "recurrent_gemma": ("stateless", ""),
        "xlnet": ("stateless", ""),
        # called without positions: they begin at zero in each chunk, the mask has the wrong length, and a state in the modules
        # loses the tail of the convolution
        "bamba WithoutPositions": ("inexact", "splits steps"),
        "minimax WithoutPositions": ("inexact", "splits steps"),
        "recurrent_gemma HoldingItsState": ("inexact", "splits steps"),
    }
}


def judge(lmeval, model, name):
    """Compare with the newest entry that is no newer than the installed version."""
    result = lmeval.equivalence(as_model(model, spec=name), budget=BUDGET)
    known = [version for version in KNOWN if Version(version) <= Version(transformers.__version__)]
    verdict, laws = KNOWN[max(known, key=Version)].get(name, EXACT) if known else EXACT
    assert result.verdict == verdict, result
    assert set(laws.split()) <= result.certificate.broken, result


@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_architecture(lmeval, name):
    try:
        model = build(name)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    judge(lmeval, model, name)


class WithoutPositions:
    """A transformers model, called without `position_ids`."""

    def __init__(self, module):
        self.module = module

    def step(self, input_ids, state=None):
        output = self.module(input_ids=input_ids, past_key_values=state, use_cache=True)
        return output.logits, output.past_key_values


class HoldingItsState:
    """A model with its state in its modules: the state between steps is only the number of tokens read."""

    def __init__(self, module):
        self.module = module

    def step(self, input_ids, state=None):
        seen = 0 if state is None else state
        positions = torch.arange(seen, seen + input_ids.shape[1])[None]
        return self.module(input_ids=input_ids, position_ids=positions, use_cache=True).logits, seen + input_ids.shape[1]


@pytest.mark.parametrize(
    ("name", "wrapper"), [("bamba", WithoutPositions), ("minimax", WithoutPositions), ("recurrent_gemma", HoldingItsState)]
)
def test_architecture_called_without_our_adapter(lmeval, name, wrapper):
    """The adapter passes positions, and reads a model with a hidden state without one; these are the faults it avoids."""
    judge(lmeval, wrapper(build(name)), f"{name} {wrapper.__name__}")


SEED = 1  # other weights than above
TYPES = """bloom falcon falcon_h1 gemma2 gemma3_text gpt2 gpt_neox granitemoehybrid lfm2 llama mamba2 mistral mixtral olmo2
    opt phi3 qwen3 qwen3_moe"""
CORRECT = {
    **CLEAN,
    **{spec: lambda spec=spec: load(spec) for spec in ZOO if spec != "zoo:bk"},
    **{f"{name}, seed {SEED}": lambda name=name: build(name, SEED) for name in TYPES.split()},
}
TOKENS, CHUNK = 6_000, 256  # of a random text


def test_correct_models_raise_no_alarm(capsys):
    """Neither the probe nor the audit finds anything in models of many architectures that are correct."""
    alarms = []
    for name, model in CORRECT.items():
        lm = as_model(model())
        certificate, ids = probe(lm, budget=BUDGET).certificate, lm.random_ids(1, TOKENS)[0]
        alarms += [f"{name}: {certificate.summary}\n{certificate.why_not()}"] if certificate.broken else []
        try:
            policy = policy_for(lm, certificate, chunk_size=CHUNK)
            certificate = measure_perplexity(lm, ids.T if lm.codebooks else ids, policy=policy).record.certificate
        except Refused as refused:
            alarms.append(f"{name}: {refused}")
        with capsys.disabled():
            print(f"\n{name:24} {certificate.summary}; worst ratio {certificate.worst_ratio:.2f}", end="")
    with capsys.disabled():
        print(f"\n{len(alarms)} false alarms on {len(CORRECT)} correct models")
    assert not alarms
