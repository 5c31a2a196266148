"""For the whole repository: only what every test and benchmark shares."""

pytest_plugins = ["pytester"]
