"""What several of these pages share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """A second thread waits for work in a busy loop, and its waiting would count as processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
