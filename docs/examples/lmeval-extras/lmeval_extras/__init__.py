"""One of each thing that a package can add to pytest-lmeval, found by the entry points in pyproject.toml."""
