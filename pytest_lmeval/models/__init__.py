"""Language models: the step protocol, the sources that load one, its fingerprint, and the precision of its weights."""
