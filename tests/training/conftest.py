"""Training in tests runs on one core: small steps gain nothing from more, and tests run beside each other."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
