from __future__ import annotations

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
