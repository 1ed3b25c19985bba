"""KVStore: shapes, layout and values of its pools."""

import torch

from pipemax.kv.geometry import KVGeometry, LayerGroup
from pipemax.worker.kv_store import KVStore

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
