"""Uploads by kernels: the right bytes, whatever is under way, and never behind a copy that keeps the engine busy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax.attention import flashinfer
from pipemax.attention.base import LayerAttention
from pipemax.attention.reference import ReferenceAttention
from pipemax.worker.host_memory import HostMemory
from pipemax.worker.upload import copy_by_kernel, mapped, upload, upload_into, upload_method
from tests.cuda.test_flashinfer import backend, layout, relative_error

MIB = 1024**2


@pytest.fixture
def by_engine(monkeypatch):
    """The other method, which is there to be compared."""
    monkeypatch.setenv("PIPEMAX_UPLOAD", "engine")
    upload_method.cache_clear()
    yield
    upload_method.cache_clear()


def test_the_engine_brings_the_same(device, by_engine):
    array = np.arange(1000, dtype=np.int32)
    destination = torch.zeros(1000, dtype=torch.int32, device=device)
    upload_into(destination, array)
    pinned = torch.arange(1000, dtype=torch.int32).pin_memory()
    copied = torch.zeros_like(destination)
    copy_by_kernel(copied, mapped(pinned, device))
    for tensor in (upload(array, device), destination, copied):
        assert torch.equal(tensor.cpu(), torch.from_numpy(array))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64, np.bool_, np.uint8])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5), (1000, 33)])
def test_arrays_arrive_as_they_are(device, dtype, shape):
    array = (np.random.default_rng(0).random(shape) * 200 - 50 * (dtype is not np.uint8)).astype(dtype)
    uploaded = upload(array, device)
    assert uploaded.device == device and uploaded.shape == array.shape
    assert torch.equal(uploaded.cpu(), torch.from_numpy(np.asarray(array)))


def test_memory_is_not_written_again_before_it_was_read(device):
    """Uploads of far more than the ring holds, while the GPU is busy with something else."""
    weight = torch.randn(4096, 4096, device=device)
    arrays = [np.random.default_rng(seed).integers(0, 1 << 30, 400_000, dtype=np.int32) for seed in range(40)]
    destination = torch.zeros(400_000, dtype=torch.int32, device=device)
    sums = []
    for _ in range(2):
        for array in arrays:
            for _ in range(4):
                weight = torch.tanh(weight @ weight)
            upload_into(destination, array)
            sums.append((upload(array, device).sum(), destination.sum()))
    expected = [int(array.astype(np.int64).sum()) for array in arrays] * 2
    assert [(int(one), int(other)) for one, other in sums] == [(value, value) for value in expected]


def test_large_arrays_go_their_own_way(device):
    array = np.random.default_rng(0).integers(0, 1 << 30, 3 * MIB, dtype=np.int64)
    assert torch.equal(upload(array, device).cpu(), torch.from_numpy(array))


def test_kernels_read_host_memory(device):
    pinned = torch.arange(1000, dtype=torch.int32).pin_memory()
    words = mapped(pinned, device)
    pinned += 5
    on_device = torch.empty(1000, dtype=torch.int32, device=device)
    copy_by_kernel(on_device, words)
    assert torch.equal(on_device.cpu(), pinned)
    for dtype in (torch.bfloat16, torch.int64):
        source = torch.randn(97, 64, device=device).to(dtype)
        source[0, 0] = -0.0
        copied = torch.empty_like(source)
        copy_by_kernel(copied, source)
        assert torch.equal(copied.view(torch.uint8), source.view(torch.uint8))


class BusyEngine:
    """Copies up the link for some tens of milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._memory = HostMemory(512 * MIB)
        self._target = torch.empty(512 * MIB, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)

    def start(self) -> torch.cuda.Event:
        """The event has passed when it is over."""
        with torch.cuda.stream(self._stream):
            for _ in range(8):
                self._target.copy_(self._memory.tensor, non_blocking=True)
            return self._stream.record_event()


@pytest.fixture
def engine(device):
    engine = BusyEngine(device)
    yield engine
    torch.cuda.synchronize()
    engine._memory.close()


def test_uploads_do_not_wait_for_the_engine(device, engine):
    array = np.arange(5000, dtype=np.int64)
    upload(array, device)  # memory and kernels are there now
    torch.cuda.synchronize()
    over = engine.start()
    uploaded = upload(array, device)
    torch.cuda.current_stream().synchronize()
    assert not over.query(), "the upload stood behind the copy"
    assert torch.equal(uploaded.cpu(), torch.from_numpy(array))


@pytest.mark.skipif(not flashinfer.is_available(), reason="FlashInfer is not installed")
def test_plans_of_attention_do_not_wait_for_the_engine(device, engine):
    torch.manual_seed(0)
    ours, layer = backend(device, 32, 8, 128), LayerAttention(scaling=128**-0.5)
    rows, num_slots = layout([(length, 1) for length in range(1, 900, 17)] + [(30, 40)], 16, seed=0)
    num_tokens = int(rows.qo_indptr[-1])
    query = torch.randn(num_tokens, 32, 128, device=device).to(torch.bfloat16)
    pool = torch.randn(num_slots, 2, 16, 8, 128, device=device).to(torch.bfloat16)
    reference = ReferenceAttention(device)
    reference.plan(rows)
    expected = reference.run(query.float(), pool.float(), layer)
    for _ in range(3):
        ours.plan(rows)
        ours.run(query, pool, layer)
    torch.cuda.synchronize()
    over = engine.start()
    ours.plan(rows)
    output = ours.run(query, pool, layer)
    torch.cuda.current_stream().synchronize()
    assert not over.query(), "the plan stood behind the copy"
    assert relative_error(output, expected) < 6e-3
