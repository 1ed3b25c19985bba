"""The all-reduce line against what was measured, and its shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipemax.cost.all_reduce import AllReduce
from pipemax.cost.hardware import PeerLink
from pipemax.cost.profiles import measured_h100_pair, server_profile

MEASURED = json.loads((Path(__file__).parent / "data" / "h100_pair_all_reduce.json").read_text())[
    "allreduce_microseconds"
]
MIB = 1 << 20


@pytest.mark.parametrize("size", [4 * MIB, 64 * MIB, 128 * MIB])
def test_over_host_memory_it_is_what_was_measured(size):
    line = AllReduce.of_server(measured_h100_pair(), num_gpus=2, peer_link=PeerLink.HOST_MEMORY)
    assert line.seconds(size) == pytest.approx(MEASURED["nccl_shm"][str(size)] * 1e-6, rel=0.06)


def test_small_messages_are_below_the_pace_of_launches():
    line = AllReduce.of_server(measured_h100_pair(), num_gpus=2, peer_link=PeerLink.HOST_MEMORY)
    for size in (16 * 1024, 256 * 1024, MIB):
        assert line.seconds(size) < MEASURED["nccl_shm"][str(size)] * 1e-6


@pytest.mark.parametrize("size", [64 * MIB, 128 * MIB])
def test_over_nvlink_large_messages_are_what_was_measured(size):
    line = AllReduce.of_server(measured_h100_pair(), num_gpus=2)
    assert line.seconds(size) == pytest.approx(MEASURED["nccl_p2p"][str(size)] * 1e-6, rel=0.2)


def test_host_memory_bounds_many_gpus():
    def rate(num_gpus: int) -> float:
        return AllReduce.of_server(server_profile("rtx-5090", num_gpus), num_gpus=num_gpus).bus_bytes_per_second

    # 26 GB/s a pair; eight cards have been seen at 28 GB/s.
    assert rate(2) == rate(8) == pytest.approx(26e9)
    assert rate(16) == pytest.approx(448e9 / 32)


def test_one_gpu_reduces_nothing_and_more_gpus_move_more():
    server = server_profile("rtx-4090", 8)
    times = [AllReduce.of_server(server, num_gpus=n).seconds(MIB) for n in (1, 2, 4, 8)]
    assert times[0] == 0.0 and times == sorted(times)
