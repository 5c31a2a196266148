"""How fast a model is: measurements of a step."""
