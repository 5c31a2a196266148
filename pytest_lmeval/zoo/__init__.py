"""Reference models in plain torch, one file each, by their specs (group `models` of the registry).

Each is `logits, state = model(input_ids, state)`, exact for any chunking (except `bk`, which is not causal), with random
weights from a fixed seed (except `demo`). No file imports the rest of the package, so each can be copied.
"""

ZOO = {
    "zoo:demo": "pytest_lmeval.zoo._demo:load",
    "zoo:transformer": "pytest_lmeval.zoo._transformer:load",
    "zoo:windowed": "pytest_lmeval.zoo._transformer:load_windowed",
    "zoo:lstm": "pytest_lmeval.zoo._lstm:load",
    "zoo:mamba": "pytest_lmeval.zoo._mamba:load",
    "zoo:mamba2": "pytest_lmeval.zoo._mamba2:load",
    "zoo:ttt": "pytest_lmeval.zoo._ttt:load",
    "zoo:moshi": "pytest_lmeval.zoo._moshi:load",
    "zoo:bk": "pytest_lmeval.zoo._bk:load",
    "zoo:causal-bk": "pytest_lmeval.zoo._bk:load_causal",
}
