"""Hardware figures: complete, and consistent with what they were measured from."""

from __future__ import annotations

import pytest

from pipemax.config import ConfigError
from pipemax.cost.hardware import HostLink, PeerLink, shared_host_link
from pipemax.cost.profiles import gpu_names, gpu_profile, measured_h100_pair, server_profile

EXPECTED = {
    "a10",
    "a100-pcie-40gb",
    "a100-pcie-80gb",
    "h100-pcie",
    "h100-sxm",
    "h200",
    "l20",
    "l40s",
    "rtx-3090",
    "rtx-4090",
    "rtx-5090",
}


def test_every_card_is_there():
    assert set(gpu_names()) == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_figures_are_in_their_units(name):
    gpu = gpu_profile(name)
    assert 20 < gpu.memory_gib < 150
    assert 0.5e12 < gpu.memory_bytes_per_second < 5e12
    assert 50e12 < gpu.tensor_flops_per_second < 1000e12
    for fraction in (gpu.memory_fraction, gpu.tensor_fraction, gpu.kv_read_fraction, gpu.attention_fraction):
        assert 0.2 < fraction <= 1
    assert gpu.source
    link = gpu.host_link
    assert link.duplex_bytes_per_second < min(link.up_bytes_per_second, link.down_bytes_per_second)
    # 1.97 and 3.94 GB/s a lane.
    assert link.up_bytes_per_second < gpu.pcie_lanes * {4: 1.97e9, 5: 3.94e9}[gpu.pcie_generation]
    assert (gpu.peer_bytes_per_second > 0) == (gpu.peer_link is not PeerLink.HOST_MEMORY)


def test_geforce_cards_have_the_rate_of_float32_accumulation_and_no_peers():
    for name, headline in (("rtx-3090", 142e12), ("rtx-4090", 330.3e12), ("rtx-5090", 419e12)):
        gpu = gpu_profile(name)
        assert gpu.tensor_flops_per_second == pytest.approx(headline / 2, rel=1e-2)
        assert gpu.peer_link is PeerLink.HOST_MEMORY


def test_an_unknown_card_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown GPU 'rtx-9090'; known: a10, .*rtx-5090"):
        gpu_profile("rtx-9090")
    with pytest.raises(ConfigError, match="num_gpus must be at least 1, got 0"):
        server_profile("rtx-4090", 0)
    with pytest.raises(ConfigError, match="host_memory_gib must be above 0"):
        server_profile("rtx-4090", 1, host_memory_gib=0)


def test_names_do_not_depend_on_case():
    assert gpu_profile("RTX-4090") is gpu_profile("rtx-4090")


def test_gpus_share_host_memory():
    link = HostLink(50e9, 50e9, 40e9)
    # 300 GB/s: six at full speed one way, 75 GB/s each both ways together for four.
    assert shared_host_link(link, num_gpus=2, host_memory_bytes_per_second=300e9) == link
    assert shared_host_link(
        HostLink(50e9, 50e9, 40e9, 1e-12), num_gpus=8, host_memory_bytes_per_second=300e9
    ) == HostLink(37.5e9, 37.5e9, 18.75e9, 1e-12)
    assert shared_host_link(link, num_gpus=4, host_memory_bytes_per_second=300e9) == HostLink(50e9, 50e9, 37.5e9)
    assert shared_host_link(link, num_gpus=8, host_memory_bytes_per_second=300e9) == HostLink(37.5e9, 37.5e9, 18.75e9)


def test_copies_both_ways_at_once():
    link = HostLink(4.0, 2.0, 1.0)
    assert link.up_seconds(8.0, 0.0) == 2.0
    # 3 each way at 1 a second, then 5 up at 4.
    assert link.up_seconds(8.0, 3.0) == 3.0 + 5 / 4
    assert link.down_seconds(8.0, 3.0) == 3.0
    assert link.down_seconds(1.0, 3.0) == 1.0 + 2 / 2


def test_the_measured_pair_has_the_measured_rates():
    pair = measured_h100_pair()
    # 1,520 GB/s of FlashInfer, 2.8 TB/s and 720 TFLOP/s of GEMMs.
    assert pair.gpu.memory_bytes_per_second * pair.gpu.kv_read_fraction == pytest.approx(1.52e12, rel=0.02)
    assert pair.gpu.memory_bytes_per_second * pair.gpu.memory_fraction == pytest.approx(2.8e12, rel=0.01)
    assert pair.gpu.tensor_flops_per_second * pair.gpu.tensor_fraction == pytest.approx(720e12, rel=0.01)


@pytest.mark.parametrize("name", gpu_names())
def test_what_is_copied_costs_compute_in_proportion_to_what_memory_can_do(name):
    server = server_profile(name, 2)
    assert server.host_link.compute_seconds_per_byte * server.gpu.memory_bytes_per_second == pytest.approx(5.0)
