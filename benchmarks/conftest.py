"""Fixtures of several benchmarks."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """One thread: a second one waits in a busy loop, which counts as processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
