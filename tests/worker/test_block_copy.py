"""What can be known of block copies without a GPU: addresses, sizes, and how the method is chosen."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch

from pipemax.config import ConfigError
from pipemax.worker import block_copy
from pipemax.worker.block_copy import BatchCopier, CopyMethod, CopyPieces, LoopCopier, open_copier
from pipemax.worker.device import BlockRuns
from pipemax.worker.host_memory import touch_pages


def test_pieces_name_the_bytes_of_every_run_in_every_layer() -> None:
    """Copying piece by piece, as the driver does, moves the blocks; layers may have blocks of different sizes."""
    rng = np.random.default_rng(0)
    pools = [
        (
            torch.zeros(12, 2, width, dtype=torch.int16),
            torch.arange(20 * 2 * width, dtype=torch.int16).view(20, 2, width) + 1000 * layer,
        )
        for layer, width in enumerate([4, 4, 8])
    ]
    destinations, sources = np.array([3, 4, 5, 9], np.int32), np.array([7, 8, 2, 19], np.int32)
    order = rng.permutation(4)
    pieces = CopyPieces.of(pools, BlockRuns.merge(destinations[order], sources[order]))
    assert pieces.sizes.tolist() == [32, 16, 16] * 2 + [64, 32, 32]
    for destination, source, size in zip(
        pieces.destinations.tolist(), pieces.sources.tolist(), pieces.sizes.tolist(), strict=True
    ):
        ctypes.memmove(destination, source, size)
    for destination, source in pools:
        expected = torch.zeros_like(destination)
        expected[torch.from_numpy(destinations).long()] = source[torch.from_numpy(sources).long()]
        assert torch.equal(destination, expected)


def test_the_method_comes_from_the_caller_then_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> object:
        raise OSError("not in this driver")

    monkeypatch.setattr(block_copy, "_driver_entry", no_driver)
    assert isinstance(open_copier(), LoopCopier)
    assert isinstance(open_copier(CopyMethod.LOOP), LoopCopier)
    with pytest.raises(ConfigError, match="PIPEMAX_BLOCK_COPY=batch needs an NVIDIA driver of 570"):
        open_copier(CopyMethod.BATCH)
    monkeypatch.setenv(block_copy.METHOD_VARIABLE, "fast")
    with pytest.raises(ConfigError, match="must be auto, batch or loop, got 'fast'"):
        open_copier()
    monkeypatch.setenv(block_copy.METHOD_VARIABLE, "loop")
    monkeypatch.setattr(block_copy, "_driver_entry", lambda: None)
    assert isinstance(open_copier(), LoopCopier)
    assert isinstance(open_copier(CopyMethod.BATCH), BatchCopier)


def test_calls_hold_at_most_the_pieces_that_the_driver_is_trusted_with(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def call(to: int, of: int, sizes: int, count: int, *others: object) -> int:
        counts.append(count)
        return 0

    monkeypatch.setattr(block_copy, "_driver_entry", lambda: call)
    pool = torch.zeros(4000, 1, dtype=torch.int32)
    scattered = np.arange(0, 3000, 2, dtype=np.int32)

    class Stream:
        cuda_stream = 1

    BatchCopier().copy(Stream(), [(pool, pool), (pool, pool)], BlockRuns.merge(scattered, scattered))  # type: ignore[arg-type]
    assert counts == [1024, 1024, 952]


def test_a_call_that_fails_names_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copy, "_driver_entry", lambda: lambda *arguments: 700)

    class Stream:
        cuda_stream = 1

    pool = torch.zeros(4, 1)
    one = np.array([1], np.int32)
    with pytest.raises(RuntimeError, match=r"CUDA error 700.*PIPEMAX_BLOCK_COPY=loop"):
        BatchCopier().copy(Stream(), [(pool, pool)], BlockRuns.merge(one, one))  # type: ignore[arg-type]


def test_every_page_is_touched() -> None:
    size = 5 * mmap.PAGESIZE + 100
    mapping = mmap.mmap(-1, size)
    mapping[:] = b"\x07" * size
    touch_pages(mapping)
    touched = np.frombuffer(mapping, np.uint8)
    assert not touched[:: mmap.PAGESIZE].any() and (np.delete(touched, np.s_[:: mmap.PAGESIZE]) == 7).all()
