"""Reference models in plain torch, one page each. `zoo:NAME` calls the function that `adapters.ZOO` names.

Each is `logits, state = model(input_ids, state)`, exact for any chunking (but `bk`, which looks ahead), with random weights
from a seed until it is trained (but `demo`). Nothing here knows the rest of the package: a page can be copied.
"""
