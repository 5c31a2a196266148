"""The laws of a language model that streams, and the probe that finds out which of them a model keeps."""
