"""Registered memory, block copies by either method, and the order of copies and compute, against a plain oracle."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from pipemax.config import ConfigError
from pipemax.worker.block_copy import MAX_PIECES_PER_CALL, BatchCopier, CopyMethod, LoopCopier
from pipemax.worker.copy_log import CopyLog
from pipemax.worker.cuda_device import CudaDevice
from pipemax.worker.device import BlockRuns
from pipemax.worker.host_memory import HostMemory
from pipemax.worker.transfer import TransferEngine
from tests.executor.plans import Row, make_plan

MIB = 1024**2


def test_host_memory_is_registered_until_closed(device):
    memory = HostMemory(33 * MIB + 4096)
    assert memory.tensor.is_pinned() and not memory.tensor.any()
    on_device = torch.randint(0, 255, memory.tensor.shape, dtype=torch.uint8, device=device)
    memory.tensor.copy_(on_device, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(memory.tensor, on_device.cpu())
    tensor = memory.tensor
    memory.close()
    memory.close()
    assert not tensor.is_pinned()


def test_too_much_host_memory_is_refused_before_it_is_touched(device):
    with pytest.raises(ConfigError, match="lower host_memory_gib"):
        HostMemory(1 << 50)


@pytest.mark.parametrize("copier_class", [BatchCopier, LoopCopier])
@pytest.mark.parametrize("num_blocks", [1, 300, 3 * MAX_PIECES_PER_CALL])
def test_copiers_move_blocks_both_ways(device, copier_class, num_blocks):
    rng = np.random.default_rng(num_blocks)
    pool_blocks = 4 * num_blocks
    memory = HostMemory(pool_blocks * 512)
    home = memory.tensor.view(torch.int64).view(pool_blocks, 2, 32)
    home.copy_(torch.arange(home.numel()).view_as(home))
    pool = torch.zeros(pool_blocks, 2, 32, dtype=torch.int64, device=device)
    slots = rng.permutation(pool_blocks)[:num_blocks].astype(np.int32)
    homes = rng.permutation(pool_blocks)[:num_blocks].astype(np.int32)
    copier, stream = copier_class(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    copier.copy(stream, [(pool, home)], BlockRuns.merge(slots, homes))
    stream.synchronize()
    expected = torch.zeros(pool.shape, dtype=torch.int64)
    expected[torch.from_numpy(slots).long()] = home[torch.from_numpy(homes).long()]
    assert torch.equal(pool.cpu(), expected)
    others = np.setdiff1d(np.arange(pool_blocks), homes)[:num_blocks].astype(np.int32)
    copier.copy(stream, [(home, pool)], BlockRuns.merge(others, slots))
    stream.synchronize()
    assert torch.equal(home[torch.from_numpy(others).long()], expected[torch.from_numpy(slots).long()])
    memory.close()


LAYERS = range(3)
NUM_SLOTS, NUM_HOMES = 24, 40
BLOCK = (2, 16, 8, 128)  # 128 KiB of int32


class Pools:
    def __init__(self, device: CudaDevice) -> None:
        self.slots = {i: torch.zeros(NUM_SLOTS, *BLOCK, dtype=torch.int32, device="cuda") for i in LAYERS}
        block_bytes = int(np.prod(BLOCK)) * 4
        self.homes = {
            i: device.allocate_home(NUM_HOMES * block_bytes).view(torch.int32).view(NUM_HOMES, *BLOCK) for i in LAYERS
        }

    def device_pool(self, layer):
        return self.slots[layer]

    def home_pool(self, layer):
        return self.homes[layer]

    def copy_pools(self, layers):
        return [(self.slots[layer], self.homes[layer]) for layer in layers]


@pytest.mark.parametrize("method", [CopyMethod.BATCH, CopyMethod.LOOP])
@pytest.mark.parametrize("seed", [0, 1])
def test_thousands_of_random_steps_leave_what_one_after_the_other_would(device, method, seed):
    """Compute of random length writes and reads slots between copies; a block is one number, so sums tell all."""
    draw = random.Random(seed)
    cuda = CudaDevice(0, copy_method=method)
    pools = Pools(cuda)
    engine = TransferEngine(device=cuda, pools=pools, layers=LAYERS, layers_per_copy=1 + seed)
    slots = {layer: np.zeros(NUM_SLOTS, np.int64) for layer in LAYERS}
    homes = {layer: np.zeros(NUM_HOMES, np.int64) for layer in LAYERS}
    seen, expected = [], []
    num_steps = 2000
    for step in range(num_steps):
        order, places = draw.sample(range(NUM_SLOTS), NUM_SLOTS), draw.sample(range(NUM_HOMES), NUM_HOMES)
        num_home, num_refill = draw.randint(0, 8), draw.randint(0, 8)
        plan = make_plan(
            step,
            [Row(0, 0, 1, [0])] if draw.random() < 0.8 else [],
            write_home=list(zip(order[:num_home], places[:num_home], strict=True)),
            refill=list(zip(order[8 : 8 + num_refill], places[8 : 8 + num_refill], strict=True)),
        )
        written = draw.sample(range(NUM_SLOTS), 3)
        engine.begin_step(plan)
        for layer in LAYERS if plan.num_rows else ():
            engine.enter(layer)
            pool = pools.slots[layer]
            seen.append(pool[:, 0, 0, 0, ::127].to(torch.int64))  # first and last number of every block
            expected.append(slots[layer].copy())
            torch.cuda._sleep(draw.choice([0, 0, 20_000, 200_000]))
            value = step * len(LAYERS) + layer + 1
            for slot in written:
                pool[slot].fill_(value)
            slots[layer][written] = value
            engine.leave(layer)
        for layer in LAYERS:
            homes[layer][plan.write_home.homes] = slots[layer][plan.write_home.slots]
            slots[layer][plan.refill.slots] = homes[layer][plan.refill.homes]
        engine.finish_step()
    engine.drain()
    torch.cuda.synchronize()
    assert np.array_equal(torch.stack(seen).cpu().numpy(), np.stack(expected)[:, :, None].repeat(2, axis=2))
    for layer in LAYERS:
        wanted = torch.from_numpy(slots[layer]).to(torch.int32)[:, None].expand(-1, int(np.prod(BLOCK)))
        assert torch.equal(pools.slots[layer].cpu().flatten(1), wanted)
        wanted = torch.from_numpy(homes[layer]).to(torch.int32)[:, None].expand(-1, int(np.prod(BLOCK)))
        assert torch.equal(pools.homes[layer].flatten(1), wanted)
    engine.close()
    cuda.close()


def test_copies_are_told_of_with_the_time_that_they_took(device):
    """A refill of half a gigabyte, behind compute that keeps it waiting: what is told is the copy, not the waiting."""
    cuda = CudaDevice(0)
    num_blocks, block = 1024, (2, 16, 8, 512)  # 512 KiB of int32 a block

    class Large:
        def __init__(self):
            self.slots = torch.zeros(num_blocks, *block, dtype=torch.int32, device="cuda")
            num_bytes = self.slots.nbytes
            self.homes = cuda.allocate_home(num_bytes).view(torch.int32).view(num_blocks, *block)

        def device_pool(self, layer):
            return self.slots

        def home_pool(self, layer):
            return self.homes

        def copy_pools(self, layers):
            return [(self.slots, self.homes)]

    pools = Large()
    engine = TransferEngine(device=cuda, pools=pools, layers=range(1))
    log = CopyLog()

    def step(step_id, cycles):
        engine.begin_step(make_plan(step_id, [Row(0, 0, 1, [0])], refill=[(i, i) for i in range(num_blocks)]))
        engine.enter(0)
        torch.cuda._sleep(cycles)
        computed = cuda.mark()
        engine.leave(0)
        log.add(engine.finish_step().copies)
        return computed

    step(0, 0)
    engine.drain()
    torch.cuda.synchronize()
    (warm,) = log.take_ended()
    computed = step(1, 400_000_000)
    assert log.take_ended() == ()  # a fifth of a second of compute lies before it
    computed_seconds = computed.seconds()
    engine.drain()
    torch.cuda.synchronize()
    ended_seconds = time.monotonic()
    (copy,) = log.take_ended()
    assert (copy.step_id, copy.num_blocks, copy.num_bytes) == (1, num_blocks, pools.slots.nbytes)
    assert computed_seconds - 0.001 <= copy.start_seconds < copy.end_seconds <= ended_seconds + 0.001
    seconds = copy.end_seconds - copy.start_seconds
    assert seconds == pytest.approx(warm.end_seconds - warm.start_seconds, rel=0.5)
    rate = copy.num_bytes / seconds / 1e9
    print(f"{rate:.1f} GB/s")
    assert 1 < rate < 200
    engine.close()
    cuda.close()
