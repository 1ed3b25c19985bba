"""Layouts and what becomes of them: samples stand for the whole, replicas share, what does not fit is said."""

from __future__ import annotations

import pytest

from pipemax.config import KVOffload, PhasePolicyName
from pipemax.cost.hardware import PeerLink
from pipemax.cost.profiles import gpu_profile, server_profile
from pipemax.cost.workload import RequestLengths
from pipemax.planning.compare import Job, JobSettings, LayoutRefusal, LayoutResult, compare_layouts, evaluate_layout
from pipemax.planning.layouts import PipelineLayout, TensorLayout, candidate_layouts, replica_server
from tests.planning.models import HEADS, MODEL, server, workload

PIPELINE = PipelineLayout(1, 2, KVOffload.ON, PhasePolicyName.DISAGGREGATED)
SETTINGS = JobSettings(max_num_seqs=256, heads=HEADS)


def evaluate(layout, job, gpus=2):
    return evaluate_layout(layout, model=MODEL, server=server(gpus), job=job, settings=SETTINGS)


def test_candidates_use_every_gpu_once():
    layouts = candidate_layouts(gpu_profile("l20"), 8)
    assert all(layout.num_gpus == 8 for layout in layouts)
    assert len(set(layouts)) == len(layouts) == len({str(layout) for layout in layouts})
    pipelines = [layout for layout in layouts if isinstance(layout, PipelineLayout)]
    assert {layout.num_stages for layout in pipelines} == {8, 4, 2, 1}
    assert {(layout.kv_offload, layout.phase_policy) for layout in pipelines if layout.num_stages == 8} == {
        (offload, policy) for offload in KVOffload for policy in PhasePolicyName
    }
    tensors = {(layout.num_shards, layout.peer_link) for layout in layouts if isinstance(layout, TensorLayout)}
    assert tensors == {(size, link) for size in (8, 4, 2) for link in (PeerLink.HOST_MEMORY, PeerLink.PCIE)}


def test_cards_without_peer_to_peer_have_no_such_layout():
    links = {
        layout.peer_link for layout in candidate_layouts(gpu_profile("rtx-4090"), 4) if isinstance(layout, TensorLayout)
    }
    assert links == {PeerLink.HOST_MEMORY}


def test_one_gpu_has_pipelines_only():
    assert all(isinstance(layout, PipelineLayout) for layout in candidate_layouts(gpu_profile("h200"), 1))


def test_replicas_share_the_host():
    part = replica_server(server_profile("l20", 8, host_memory_gib=400), 4)
    assert (part.num_gpus, part.host_memory_gib) == (2, 100)


def test_a_sample_is_drawn_with_the_longest_request():
    requests = (*workload(500), RequestLengths(900, 50), *workload(500))
    job = Job.of(requests, max_requests=50)
    assert len(job.sample) == 50 and RequestLengths(900, 50) in job.sample
    assert job.is_sampled and job.total_requests == 1001
    assert job.total_output_tokens == sum(request.output_tokens for request in requests)
    assert Job.of(requests, max_requests=50) == job
    assert not Job.of(requests, max_requests=1001).is_sampled


@pytest.mark.parametrize("layout", [PIPELINE, TensorLayout(1, 2, PeerLink.HOST_MEMORY)], ids=str)
def test_a_sample_predicts_the_whole(layout):
    requests = workload(1000)
    whole = evaluate(layout, Job.of(requests, max_requests=1000))
    sampled = evaluate(layout, Job.of(requests, max_requests=400))
    assert isinstance(whole, LayoutResult) and isinstance(sampled, LayoutResult)
    assert not sampled.is_rough
    assert sampled.job_seconds == pytest.approx(whole.job_seconds, rel=0.1)
    assert whole.output_tokens_per_second == pytest.approx(
        sum(request.output_tokens for request in requests) / whole.job_seconds
    )


def test_a_sample_that_does_not_fill_the_batches_is_called_rough():
    requests = workload(1000)
    whole = evaluate(PIPELINE, Job.of(requests, max_requests=1000))
    rough = evaluate(PIPELINE, Job.of(requests, max_requests=60))
    assert isinstance(whole, LayoutResult) and isinstance(rough, LayoutResult)
    assert rough.is_rough and not whole.is_rough
    assert rough.job_seconds == pytest.approx(whole.job_seconds, rel=0.3)


def test_replicas_work_side_by_side():
    job = Job.of(workload(400), max_requests=400)
    one = evaluate(PIPELINE, Job.of(workload(400)[::2], max_requests=400), gpus=2)
    two = evaluate(PipelineLayout(2, 2, KVOffload.ON, PhasePolicyName.DISAGGREGATED), job, gpus=4)
    assert isinstance(one, LayoutResult) and isinstance(two, LayoutResult)
    # Four GPUs share the host's memory bandwidth, which suffices for them.
    assert two.job_seconds == pytest.approx(one.job_seconds, rel=0.02)
    assert two.home_bytes == pytest.approx(2 * one.home_bytes, rel=0.02)


def test_outcomes_come_in_order_with_refusals():
    layouts = [
        PIPELINE,
        PipelineLayout(2, 1, KVOffload.OFF, PhasePolicyName.MIXED),
        TensorLayout(1, 2, PeerLink.HOST_MEMORY),
    ]
    outcomes = compare_layouts(
        layouts=layouts,
        model=MODEL,
        server=server(2),
        job=Job.of(workload(40), max_requests=40),
        settings=SETTINGS,
    )
    assert [outcome.layout for outcome in outcomes] == layouts
    fits, refusal, estimate = outcomes
    assert isinstance(fits, LayoutResult) and fits.run is not None
    assert isinstance(refusal, LayoutRefusal) and "does not fit 1 x rtx-4090" in refusal.reason
    assert isinstance(estimate, LayoutResult) and estimate.run is None
