"""What a run leaves behind: metrics and their values, typed records and examples, the journal, the history. No torch.

Public are `load(path)` and `dump(document)` of a `metrics.json`, its type `RunDocument`, and `json_schema()`, made from it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
