"""What can be known of uploads without a GPU: the method, and that nothing changes on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax.config import ConfigError
from pipemax.worker.upload import METHOD_VARIABLE, UploadMethod, copy_by_kernel, upload, upload_method


@pytest.fixture(autouse=True)
def fresh_method():
    upload_method.cache_clear()
    yield
    upload_method.cache_clear()


def test_the_method_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert upload_method() is UploadMethod.KERNEL
    upload_method.cache_clear()
    monkeypatch.setenv(METHOD_VARIABLE, "engine")
    assert upload_method() is UploadMethod.ENGINE
    upload_method.cache_clear()
    monkeypatch.setenv(METHOD_VARIABLE, "fast")
    with pytest.raises(ConfigError, match="PIPEMAX_UPLOAD must be kernel or engine, got 'fast'"):
        upload_method()


def test_on_a_cpu_arrays_are_tensors() -> None:
    array = np.arange(6, dtype=np.float64)[::2]
    assert upload(array, torch.device("cpu")).tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_copies_by_kernel_are_exact(dtype: torch.dtype) -> None:
    source = torch.tensor([-0.0, 3.25, -7.0, 1e4]).to(dtype)
    destination = torch.zeros_like(source)
    copy_by_kernel(destination, source)
    assert torch.equal(destination.view(torch.uint8), source.view(torch.uint8))
