"""Runs of a small pipeline: what must hold for any of them, and what each setting is for."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import numpy as np
import pytest

from pipemax.config import ConfigError, KVOffload, PhasePolicyName
from pipemax.cost.workload import MeanLengths, RequestLengths
from pipemax.planning.simulate import Misestimate, plan_pipeline, simulate_pipeline
from pipemax.scheduling.turns import Turns
from tests.planning.models import MODEL, server, settings, workload


def simulate(num_requests=300, *, host_memory_gib=512.0, misestimate=None, **changes):
    return simulate_pipeline(
        model=MODEL,
        server=server(host_memory_gib=host_memory_gib),
        workload=workload(num_requests),
        settings=settings(**changes),
        misestimate=misestimate,
    )


@pytest.mark.parametrize("kv_offload", KVOffload)
@pytest.mark.parametrize("policy", PhasePolicyName)
def test_a_run_adds_up(kv_offload, policy):
    requests = workload(150)
    run = simulate(150, kv_offload=kv_offload, phase_policy=policy)
    assert run.num_requests == 150
    assert run.prompt_tokens == sum(request.prompt_tokens for request in requests)
    assert run.output_tokens == sum(request.output_tokens for request in requests)
    assert run.output_tokens_per_second == pytest.approx(run.output_tokens / run.seconds)
    assert sum(run.phase_steps.values()) == run.num_steps
    busiest = max(run.stage_utilisation)
    assert sum(run.phase_seconds.values()) == pytest.approx(busiest * run.seconds)
    for stage in range(2):
        parts = run.stage_utilisation[stage] + run.window_wait[stage] + run.activation_wait[stage]
        assert 0.5 < parts <= 1 + 1e-9
        assert run.link_up[stage] <= 1 and run.link_down[stage] <= 1
    assert (run.refill_bytes > 0) == (kv_offload is KVOffload.ON)
    assert sum(run.stage_layers) == MODEL.num_layers
    block_bytes = run.capacity.block_bytes * 2  # two equal stages
    assert run.max_home_bytes == run.max_home_blocks * block_bytes


def test_a_run_is_not_faster_than_the_sum_for_its_steady_state():
    requests, chosen = workload(600), settings()
    lengths = MeanLengths.of(requests)
    plan = plan_pipeline(model=MODEL, server=server(), settings=chosen, lengths=lengths, num_requests=600)
    run = simulate_pipeline(model=MODEL, server=server(), workload=requests, settings=chosen)
    assert 0.5 < run.output_tokens_per_second / plan.state.output_tokens_per_second(lengths) < 1.02


def test_offloading_gives_more_rows_and_throughput_where_memory_is_short():
    on, off = (simulate(400, kv_offload=kv_offload) for kv_offload in (KVOffload.ON, KVOffload.OFF))
    assert on.mean_decode_rows > 1.3 * off.mean_decode_rows
    assert on.output_tokens_per_second > 1.2 * off.output_tokens_per_second


def test_the_window_is_what_makes_the_rows():
    window, none = (simulate(400, num_window_blocks=blocks) for blocks in (None, 0))
    assert none.capacity.num_window_blocks == 0 < window.capacity.num_window_blocks
    assert window.mean_decode_rows > 1.1 * none.mean_decode_rows


def test_a_window_whose_copies_cost_more_than_its_rows_give_is_not_used():
    def run(copy_seconds_per_gb: float, **changes):
        base = server()
        link = dataclasses.replace(base.host_link, compute_seconds_per_byte=copy_seconds_per_gb / 1e9)
        machine = dataclasses.replace(base, host_link=link)
        return simulate_pipeline(model=MODEL, server=machine, workload=workload(3000), settings=settings(**changes))

    free, dear = run(0.0), run(0.2)
    none = run(0.2, num_window_blocks=0)
    assert dear.refill_bytes < free.refill_bytes / 3
    assert dear.output_tokens_per_second > 0.95 * none.output_tokens_per_second


@pytest.mark.parametrize("link_factor", [0.02, 0.01])
def test_long_requests_come_back_over_a_slow_link_past_others_that_wait_on_the_device(link_factor):
    """More than a step's budget each, in several steps: whoever waits on the device makes room for them meanwhile."""

    def run(factor: float):
        base = server()
        rates = {
            name: factor * getattr(base.host_link, name)
            for name in ("up_bytes_per_second", "down_bytes_per_second", "duplex_bytes_per_second")
        }
        machine = dataclasses.replace(base, host_link=dataclasses.replace(base.host_link, **rates))
        lengths = tuple(RequestLengths(20 + 60 * (i % 7), 20 + 60 * (i % 13)) for i in range(150))
        chosen = settings(num_window_blocks=0)
        return simulate_pipeline(model=MODEL, server=machine, workload=lengths, settings=chosen)

    usual, slow = run(1.0), run(link_factor)
    assert slow.mean_decode_rows > 0.8 * usual.mean_decode_rows


class NoTurns(Turns):
    def are_taken(self, *, num_waiting, num_ready, free_homes, growth_blocks):
        return False


def in_turns_and_to_the_end(num_requests, **changes):
    """The same job both ways; answers of 20 to 740 tokens."""
    job = {
        "model": MODEL,
        "server": server(),
        "workload": tuple(RequestLengths(20 + 30 * (i % 7), 20 + 60 * (i % 13)) for i in range(num_requests)),
        "settings": settings(**changes),
    }
    in_turns = simulate_pipeline(**job)
    with patch("pipemax.control_plane.Turns", NoTurns):
        return in_turns, simulate_pipeline(**job)


@pytest.mark.parametrize("policy", [PhasePolicyName.DISAGGREGATED, PhasePolicyName.MIXED])
def test_taking_turns_shortens_a_job_and_keeps_its_batches_fuller(policy):
    in_turns, to_the_end = in_turns_and_to_the_end(150, phase_policy=policy)
    assert in_turns.seconds < 0.95 * to_the_end.seconds
    assert in_turns.mean_decode_rows > 1.05 * to_the_end.mean_decode_rows
    assert in_turns.num_restarted == to_the_end.num_restarted == 0
    assert max(in_turns.window_wait) < 0.01


def test_without_offloading_nothing_changes():
    in_turns, to_the_end = in_turns_and_to_the_end(80, kv_offload=KVOffload.OFF)
    assert in_turns == to_the_end


def test_equal_runs_are_equal():
    assert simulate(100) == simulate(100)


def test_a_slower_machine_takes_longer_by_that_much():
    plain = simulate(100)
    slow = simulate(100, misestimate=Misestimate(decode_factor=2.0, prefill_factor=2.0, link_factor=0.5))
    assert slow.seconds == pytest.approx(2 * plain.seconds, rel=0.05)


def test_learning_from_steps_avoids_waits_for_a_link_that_is_slower_than_believed():
    wrong = Misestimate(link_factor=0.2)
    learning, stubborn = (simulate(300, misestimate=wrong, correct_estimates=learn) for learn in (True, False))
    assert max(learning.window_wait) < 0.5 * max(stubborn.window_wait)
    assert learning.output_tokens_per_second > stubborn.output_tokens_per_second


class PromptSpan:
    """Observes how many steps lie between the first and the last chunk of one request's prompt."""

    def __init__(self, request_id: int) -> None:
        self._request_id = request_id
        self._num_steps = 0
        self._chunks: list[int] = []

    def on_submit(self, plan, *, now_seconds, gauges) -> None:
        self._num_steps += 1
        if np.any(plan.num_new_tokens[plan.request_ids == self._request_id] > 1):
            self._chunks.append(self._num_steps)

    def on_result(self, result, updates) -> None:
        pass

    @property
    def num_steps(self) -> int:
        return self._chunks[-1] - self._chunks[0]


def test_a_prompt_that_had_to_make_room_half_way_comes_back_before_those_that_join():
    """A long prompt among chats of which many are ready to join; it was half-way for 700 steps once."""
    lengths = [RequestLengths(1500 if i == 150 else 60 + i % 80, 300 + (i * 37) % 300) for i in range(200)]
    span = PromptSpan(150)
    run = simulate_pipeline(
        model=MODEL,
        server=server(),
        workload=lengths,
        settings=settings(phase_policy=PhasePolicyName.MIXED),
        watch=lambda capacity: span,
    )
    assert 10 < span.num_steps < 500  # the chats that run are older, and keep what they have
    assert run.num_requests == 200


def test_little_host_memory_means_fewer_requests_alive():
    run = simulate(300, host_memory_gib=2.0)
    assert run.max_home_blocks <= run.capacity.num_host_blocks < 1200
    assert run.mean_decode_rows < simulate(300).mean_decode_rows


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="does not fit 1 x rtx-4090"):
        simulate_pipeline(model=MODEL, server=server(1), workload=workload(5), settings=settings())


def test_a_request_that_does_not_fit_is_refused():
    requests = (*workload(5), RequestLengths(20_000, 5))
    with pytest.raises(ConfigError, match="a request of 20005 tokens"):
        simulate_pipeline(model=MODEL, server=server(), workload=requests, settings=settings())


def test_more_gpus_than_layers_are_refused():
    model = dataclasses.replace(MODEL, num_layers=3, sliding_windows=(None,) * 3)
    with pytest.raises(ConfigError, match="3 layers"):
        simulate_pipeline(model=model, server=server(4), workload=workload(5), settings=settings())
