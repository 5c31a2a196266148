"""Types of stored results: metrics, values, records, examples, documents, journal and history. Imports no torch.

Public: `load(path)` and `dump(document)` of a `metrics.json`, its type `RunDocument`, and its `json_schema()`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
