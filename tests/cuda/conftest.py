"""Tests of this folder need an NVIDIA GPU: marked `cuda`, skipped without one. On a GPU machine: pytest tests/cuda."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device():
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)
