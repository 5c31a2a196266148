"""Language models: what is asked of one, where it comes from, who it is, what its tensors hold."""
