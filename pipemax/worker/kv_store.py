"""`KVStore`: the memory that keys and values of one stage live in, on the device and at home in host memory.

Layer-major: a layer's pool is one contiguous run of blocks, so that consecutive slots are one piece for a copy. Pools
of all layers of one layer group come from one allocation on each side. Which block is where is the control plane's
business (`kv/`), copying is `transfer.py`'s; nothing here knows of requests or steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipemax.kv.geometry import KVGeometry

AllocateHome = Callable[[int], Tensor]


def allocate_pageable(num_bytes: int) -> Tensor:
    """Ordinary host memory, uint8 [num_bytes], uninitialised. CUDA workers pin theirs."""
    return torch.empty(num_bytes, dtype=torch.uint8)


class KVStore:
    """Device and home pools of the layers (global indices) of one stage.

    Device pools start as zeros, so that no stale NaN is ever in a page that an attention library reads beyond a row's
    keys; homes are uninitialised, since a home is written before it is read. `allocate_home` is called once for each
    layer group with a number of bytes and gives a uint8 CPU tensor of that size, aligned for `dtype`; not at all when
    `num_host_blocks` is 0.
    """

    def __init__(
        self,
        *,
        geometry: KVGeometry,
        layers: range,
        num_device_blocks: int,
        num_host_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        allocate_home: AllocateHome = allocate_pageable,
    ) -> None:
        assert dtype.itemsize == geometry.dtype_bytes, "geometry was made for another dtype"
        self._device_pools: dict[int, Tensor] = {}
        self._home_pools: dict[int, Tensor] = {}
        for group in geometry.groups:
            members = [layer for layer in group.layers if layer in layers]
            if not members:
                continue
            block_shape = (2, geometry.block_size, group.num_kv_heads, group.head_dim)
            device_shape = (len(members), num_device_blocks, *block_shape)
            home_shape = (len(members), num_host_blocks, *block_shape)
            device_pools = torch.zeros(device_shape, dtype=dtype, device=device)
            home_bytes = torch.Size(home_shape).numel() * dtype.itemsize
            memory = allocate_home(home_bytes) if home_bytes else allocate_pageable(0)
            assert memory.dtype == torch.uint8 and memory.numel() == home_bytes and memory.device.type == "cpu"
            home_pools = memory.view(dtype).view(home_shape)
            self._device_pools.update(zip(members, device_pools, strict=True))
            self._home_pools.update(zip(members, home_pools, strict=True))
        assert set(self._device_pools) == set(layers), "geometry does not cover the stage's layers"

    def device_pool(self, layer: int) -> Tensor:
        """[num_device_blocks, 2, block_size, num_kv_heads, head_dim] on the device; contiguous."""
        return self._device_pools[layer]

    def home_pool(self, layer: int) -> Tensor:
        """[num_host_blocks, 2, block_size, num_kv_heads, head_dim] in host memory; contiguous."""
        return self._home_pools[layer]
