"""Estimates of serving engines against runs of vLLM 0.26 on one and two H100 (`data/vllm_baselines.json`).

One constant is fitted, `FRAMEWORK_SECONDS_PER_ROW`, on the first run. Attention is FlashAttention 3 there, not the
kernel of the profile: 0.7 of memory bandwidth (derived).

`python -m tests.cost.test_serving` prints predictions beside measurements, and what that fraction changes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipemax.config import ConfigError
from pipemax.cost.continuous_batching import BatchingLimits
from pipemax.cost.hardware import PeerLink
from pipemax.cost.plain_pipeline import estimate_plain_pipeline
from pipemax.cost.profiles import measured_h100_pair, server_profile
from pipemax.cost.serving import ServingEstimate, estimate_serving
from pipemax.cost.tensor_parallel import estimate_tensor_parallel
from pipemax.cost.workload import RequestLengths, read_lengths
from tests.cost.models import LLAMA_8B, LLAMA_70B

DATA = Path(__file__).parent / "data"
RUNS = {
    run["name"].removeprefix("vllm_0.26_"): run
    for run in json.loads((DATA / "vllm_baselines.json").read_text())["runs"]
}
KV_READ_FRACTION = 0.7
# vLLM's defaults for offline use on this card, where a run did not set them.
DEFAULTS = {"max_num_seqs": 1024, "max_num_batched_tokens": 16384}


def estimate(name: str, kv_read_fraction: float = KV_READ_FRACTION) -> tuple[ServingEstimate, dict]:
    run = RUNS[name]
    settings = DEFAULTS | run["settings"]
    limits = BatchingLimits(
        num_blocks=run["kv_cache_tokens"] // 16,
        block_size=16,
        max_num_seqs=settings["max_num_seqs"],
        max_num_batched_tokens=settings["max_num_batched_tokens"],
    )
    common = {
        "model": LLAMA_70B if "70b" in name else LLAMA_8B,
        "server": measured_h100_pair() if "70b" in name else server_profile("h100-sxm", 1),
        "workload": read_lengths(DATA / run["workload"]),
        "limits": limits,
        "kv_read_fraction": kv_read_fraction,
    }
    if settings["pipeline_parallel_size"] > 1:
        return estimate_plain_pipeline(**common), run
    peer_link = PeerLink.HOST_MEMORY if settings["disable_custom_all_reduce"] else None
    return estimate_tensor_parallel(**common, peer_link=peer_link), run


def test_the_run_that_the_constant_is_fitted_to():
    result, run = estimate("llama3.1-8b_tp1")
    assert result.seconds == pytest.approx(run["wall_seconds"], rel=0.02)


@pytest.mark.parametrize(
    "name",
    [
        "llama3.1-70b_tp2_nvlink",
        "llama3.1-70b_tp2_p2p_off",
        "llama3.1-70b_tp2_p2p_off_seqs112",
        "llama3.1-70b_pp2_p2p_off",
    ],
)
def test_runs_are_predicted_within_15_percent(name):
    result, run = estimate(name)
    assert result.output_tokens == run["output_tokens"]
    assert result.seconds == pytest.approx(run["wall_seconds"], rel=0.15)
    assert result.num_preemptions == pytest.approx(run["preemptions"], rel=0.2)


def test_peer_to_peer_matters_as_much_as_it_did():
    with_peers, without = (estimate(f"llama3.1-70b_tp2_{way}") for way in ("nvlink", "p2p_off"))
    measured = without[1]["wall_seconds"] / with_peers[1]["wall_seconds"]
    assert without[0].seconds / with_peers[0].seconds == pytest.approx(measured, rel=0.15)


def test_two_stages_take_turns():
    # Two requests of one step each, on two stages of 2 s and 1 s with 0.5 s between.
    result = estimate_serving(
        workload=[RequestLengths(4, 1), RequestLengths(4, 1)],
        limits=BatchingLimits(num_blocks=8, block_size=4, max_num_seqs=2, max_num_batched_tokens=4),
        stage_seconds=lambda load: (2.0, 1.0),
        handover_seconds=lambda load: 0.5,
        framework_seconds_per_row=0.0,
    )
    assert result == ServingEstimate(5.5, 2, 2, 2, 0, 8)


def test_a_request_longer_than_the_cache_is_refused():
    with pytest.raises(ConfigError, match="a request of 40 tokens does not fit the KV cache of 32 tokens"):
        estimate_serving(
            workload=[RequestLengths(30, 10)],
            limits=BatchingLimits(num_blocks=8, block_size=4, max_num_seqs=2, max_num_batched_tokens=4),
            stage_seconds=lambda load: (1.0,),
            handover_seconds=lambda load: 0.0,
        )


def test_tensor_parallelism_gains_less_without_peers():
    workload = [RequestLengths(100, 50)] * 64
    limits = BatchingLimits(num_blocks=4000, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048)

    def seconds(gpu: str, peer_link: PeerLink | None = None) -> float:
        return estimate_tensor_parallel(
            model=LLAMA_70B, server=server_profile(gpu, 8), workload=workload, limits=limits, peer_link=peer_link
        ).seconds

    assert seconds("l20", PeerLink.HOST_MEMORY) > 1.2 * seconds("l20")


def test_a_pipeline_of_one_stage_is_one_gpu():
    server = server_profile("h100-sxm", 1)
    workload = [RequestLengths(100, 20)] * 8
    limits = BatchingLimits(num_blocks=4000, block_size=16, max_num_seqs=8, max_num_batched_tokens=2048)
    shared = {"model": LLAMA_8B, "server": server, "workload": workload, "limits": limits}
    assert estimate_plain_pipeline(**shared) == estimate_tensor_parallel(**shared)


def _print_table() -> None:
    print("| run | measured s | predicted s | error | at 0.6 | at 0.85 | preemptions measured / predicted |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in RUNS:
        (result, run), low, high = estimate(name), estimate(name, 0.6)[0], estimate(name, 0.85)[0]
        wall = run["wall_seconds"]
        errors = " | ".join(f"{100 * (one.seconds / wall - 1):+.1f} %" for one in (result, low, high))
        preemptions = f"{run['preemptions'] or '-'} / {result.num_preemptions}"
        print(f"| {name} | {wall:.1f} | {result.seconds:.1f} | {errors} | {preemptions} |")


if __name__ == "__main__":
    _print_table()
