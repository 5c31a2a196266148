"""Reference models in plain torch, one page each, by the names of their specs (group `models` of the registry).

Each is `logits, state = model(input_ids, state)`, exact for any chunking (but `bk`, which looks ahead), with random weights
from a seed until it is trained (but `demo`). Nothing here knows the rest of the package: a page can be copied.
"""

ZOO = {
    "zoo:demo": "pytest_lmeval.zoo.demo:load",
    "zoo:transformer": "pytest_lmeval.zoo.transformer:load",
    "zoo:windowed": "pytest_lmeval.zoo.transformer:load_windowed",
    "zoo:lstm": "pytest_lmeval.zoo.lstm:load",
    "zoo:mamba": "pytest_lmeval.zoo.mamba:load",
    "zoo:mamba2": "pytest_lmeval.zoo.mamba2:load",
    "zoo:ttt": "pytest_lmeval.zoo.ttt:load",
    "zoo:moshi": "pytest_lmeval.zoo.moshi:load",
    "zoo:bk": "pytest_lmeval.zoo.bk:load",
    "zoo:causal-bk": "pytest_lmeval.zoo.bk:load_causal",
}
