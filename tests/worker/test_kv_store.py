"""KVStore: shapes, layout and values of its pools."""

import numpy as np
import pytest
import torch

from pipemax.attention.base import LayerAttention, RowLayout
from pipemax.attention.reference import ReferenceAttention
from pipemax.kv.geometry import KVGeometry, LayerGroup
from pipemax.worker.device import CpuDevice
from pipemax.worker.kv_store import KVStore
from pipemax.worker.transfer import TransferEngine, layers_sharing_copies
from tests.executor.plans import make_plan

GEOMETRY = KVGeometry((LayerGroup((0, 2, 4), 2, 8, None), LayerGroup((1, 3), 1, 16, 12)), block_size=4, dtype_bytes=2)


def store(**options):
    settings = {"num_device_blocks": 5, "num_host_blocks": 3, "dtype": torch.bfloat16, "device": torch.device("cpu")}
    return KVStore(geometry=GEOMETRY, layers=range(1, 5), **settings | options)


def test_pools_have_their_groups_shape_and_are_contiguous_zeros_on_the_device():
    kv = store()
    for layer, heads, size in ((1, 1, 16), (2, 2, 8), (3, 1, 16), (4, 2, 8)):
        assert kv.device_pool(layer).shape == (5, 2, 4, heads, size)
        assert kv.home_pool(layer).shape == (3, 2, 4, heads, size)
        assert kv.device_pool(layer).is_contiguous() and kv.home_pool(layer).is_contiguous()
        assert kv.home_pool(layer)[0].nbytes == GEOMETRY.layer_block_bytes(layer)
        assert not kv.device_pool(layer).any()


def test_one_allocation_a_group_and_no_two_pools_overlap():
    sizes = []

    def allocate(num_bytes):
        sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    kv = store(allocate_home=allocate)
    assert sizes == [2 * 3 * GEOMETRY.layer_block_bytes(2), 2 * 3 * GEOMETRY.layer_block_bytes(1)]
    for layer in range(1, 5):
        kv.device_pool(layer).fill_(layer)
        kv.home_pool(layer).fill_(-layer)
    for layer in range(1, 5):
        assert (kv.device_pool(layer) == layer).all() and (kv.home_pool(layer) == -layer).all()
    assert kv.home_pool(2).untyped_storage().data_ptr() == kv.home_pool(4).untyped_storage().data_ptr()


def test_without_homes_nothing_is_allocated_for_them():
    def allocate(_):
        raise AssertionError("no home memory was asked for")

    assert store(num_host_blocks=0, allocate_home=allocate).home_pool(1).shape == (0, 2, 4, 1, 16)


@pytest.mark.parametrize("layers_per_copy", [1, 2, 3, 4])
def test_blocks_of_layers_that_travel_together_are_one_piece(layers_per_copy):
    kv = store(layers_per_copy=layers_per_copy)
    for layer in range(1, 5):
        kv.device_pool(layer).fill_(layer)
        kv.home_pool(layer).fill_(-layer)
    for layer in range(1, 5):
        assert (kv.device_pool(layer) == layer).all() and (kv.home_pool(layer) == -layer).all()
        assert kv.device_pool(layer)[0].is_contiguous() and kv.home_pool(layer)[0].is_contiguous()
    seen = []
    for sharing in layers_sharing_copies(range(1, 5), layers_per_copy):
        for device_pool, home_pool in kv.copy_pools(sharing):
            assert device_pool.is_contiguous() and home_pool.is_contiguous()
            assert (len(device_pool), len(home_pool)) == (5, 3) and device_pool.shape[1:] == home_pool.shape[1:]
            seen += [int(device_pool[0, index].view(-1)[0]) for index in range(device_pool.shape[1])]
    assert sorted(seen) == [1, 2, 3, 4]


@pytest.mark.parametrize("layers_per_copy", [1, 2, 4])
def test_copies_move_the_same_bytes_however_layers_lie(layers_per_copy):
    kv, device = store(layers_per_copy=layers_per_copy), CpuDevice()
    generator = torch.Generator().manual_seed(1)
    before = {}
    for layer in range(1, 5):
        for pool in (kv.device_pool(layer), kv.home_pool(layer)):
            pool.copy_(torch.rand(pool.shape, generator=generator))
        before[layer] = kv.device_pool(layer).clone(), kv.home_pool(layer).clone()
    engine = TransferEngine(device=device, pools=kv, layers=range(1, 5), layers_per_copy=layers_per_copy)
    try:
        engine.begin_step(make_plan(0, [], write_home=[(4, 0), (2, 1)], refill=[(0, 2)]))
        engine.finish_step()
        engine.drain()
    finally:
        engine.close()
    for layer, (slots, homes) in before.items():
        homes[0], homes[1], slots[0] = slots[4], slots[2], homes[2].clone()
        assert torch.equal(kv.device_pool(layer), slots) and torch.equal(kv.home_pool(layer), homes)


def test_attention_reads_and_writes_pools_whose_layers_lie_side_by_side():
    rows = RowLayout(
        qo_indptr=np.array([0, 1, 4], np.int32),
        kv_lens=np.array([6, 7], np.int32),
        kv_indptr=np.array([0, 2, 4], np.int32),
        kv_indices=np.array([4, 1, 0, 3], np.int32),
        block_size=4,
    )
    backend = ReferenceAttention(torch.device("cpu"))
    outputs = []
    for layers_per_copy in (1, 4):
        kv = store(layers_per_copy=layers_per_copy, dtype=torch.bfloat16)
        torch.manual_seed(2)
        for layer in range(1, 5):
            kv.device_pool(layer).copy_(torch.rand(kv.device_pool(layer).shape))
        backend.plan(rows)
        for layer, heads, size in ((1, 1, 16), (2, 2, 8)):
            new = torch.rand(3, 4, heads, size).bfloat16()
            backend.append(new[0], new[1], kv.device_pool(layer))
            outputs.append(backend.run(new[2], kv.device_pool(layer), LayerAttention(scaling=0.3, sliding_window=None)))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
