"""All that knows of EleutherAI's lm_eval: its tasks asked here (`lm_eval:NAME`), and a model that its command line asks.

    _names     its tasks, groups and tags by name
    _task      one of its tasks as a `Task`: its prompts, filters, scores and aggregations
    _model     the model `pytest-lmeval` of its command line
    _command   `lmeval lm-eval`, for versions that do not find that model by themselves

Its modules are imported when one of these is used, and none of its code is copied.
"""
