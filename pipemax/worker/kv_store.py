"""`KVStore`: the memory that keys and values of one stage live in, on the device and at home in host memory.

A layer's pool is a view of the memory that it shares with the layers whose blocks travel with its own:

    layers 0 to 3   | block 0: l0 l1 l2 l3 | block 1: l0 l1 l2 l3 | ...       one piece of a copy serves four layers
    layers 4 to 7   | block 0: l4 l5 l6 l7 | ...

so that consecutive slots are one piece of a copy, and a single one is no small piece. All of one layer group comes from
one allocation on each side. Which block is where is the control plane's business (`kv/`), copying is `transfer.py`'s;
nothing here knows of requests or steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipemax.kv.geometry import KVGeometry
from pipemax.worker.transfer import layers_sharing_copies

AllocateHome = Callable[[int], Tensor]


def allocate_pageable(num_bytes: int) -> Tensor:
    """Ordinary host memory, uint8 [num_bytes], uninitialised. CUDA workers pin theirs."""
    return torch.empty(num_bytes, dtype=torch.uint8)


class KVStore:
    """Device and home pools of the layers (global indices) of one stage.

    Device pools start as zeros, so that no stale NaN is ever in a page that an attention library reads beyond a row's
    keys; homes are uninitialised, since a home is written before it is read. `allocate_home` is called once for each
    layer group with a number of bytes and gives a uint8 CPU tensor of that size, aligned for `dtype`; not at all when
    `num_host_blocks` is 0. `layers_per_copy` as in `transfer.py`.
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
        layers_per_copy: int = 1,
    ) -> None:
        assert dtype.itemsize == geometry.dtype_bytes, "geometry was made for another dtype"
        self._device_pools: dict[int, Tensor] = {}
        self._home_pools: dict[int, Tensor] = {}
        self._copy_pools: dict[range, list[tuple[Tensor, Tensor]]] = {}
        for group in geometry.groups:
            members = [layer for layer in group.layers if layer in layers]
            if not members:
                continue
            block_shape = (2, geometry.block_size, group.num_kv_heads, group.head_dim)
            layer_elements = torch.Size(block_shape).numel()
            device_memory = torch.zeros(len(members) * num_device_blocks * layer_elements, dtype=dtype, device=device)
            home_bytes = len(members) * num_host_blocks * layer_elements * dtype.itemsize
            memory = allocate_home(home_bytes) if home_bytes else allocate_pageable(0)
            assert memory.dtype == torch.uint8 and memory.numel() == home_bytes and memory.device.type == "cpu"
            home_memory = memory.view(dtype)
            for sharing in layers_sharing_copies(layers, layers_per_copy):
                together = [layer for layer in sharing if layer in group.layers]
                if not together:
                    continue
                num_elements = len(together) * layer_elements
                device_part, device_memory = device_memory.tensor_split([num_device_blocks * num_elements])
                home_part, home_memory = home_memory.tensor_split([num_host_blocks * num_elements])
                device_pool = device_part.view(num_device_blocks, len(together), *block_shape)
                home_pool = home_part.view(num_host_blocks, len(together), *block_shape)
                self._copy_pools.setdefault(sharing, []).append((device_pool, home_pool))
                for index, layer in enumerate(together):
                    self._device_pools[layer] = device_pool[:, index]
                    self._home_pools[layer] = home_pool[:, index]
        assert set(self._device_pools) == set(layers), "geometry does not cover the stage's layers"

    def device_pool(self, layer: int) -> Tensor:
        """[num_device_blocks, 2, block_size, num_kv_heads, head_dim] on the device; each block is contiguous."""
        return self._device_pools[layer]

    def home_pool(self, layer: int) -> Tensor:
        """[num_host_blocks, 2, block_size, num_kv_heads, head_dim] in host memory; each block is contiguous."""
        return self._home_pools[layer]

    def copy_pools(self, layers: range) -> list[tuple[Tensor, Tensor]]:
        """See `KVPools`: [num_blocks, layers together, 2, block_size, num_kv_heads, head_dim], contiguous, one pair a
        layer group."""
        return self._copy_pools[layers]
