"""Reference models in plain torch, one page each. `zoo:NAME` calls `load` of the file of that name."""
