from __future__ import annotations

import pytest
import torch
import transformers
from PIL import ImageFile

transformers.logging.set_verbosity_error()


def pytest_configure(config: pytest.Config) -> None:
    # workers of pytest-xdist share the cores
    torch.set_num_threads(1 if hasattr(config, "workerinput") else 2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # which lmms-eval turns on for all of a process
