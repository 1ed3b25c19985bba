"""Every Executor passes one suite (`conformance.py`), and the same job gets the same plans on all of them.

The executors: symbolic memory, the simulator, and stage processes on the CPU with a tiny model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from pipemax.config import KVOffload, LoadFormat, PhasePolicyName
from pipemax.control_plane import build_scheduler
from pipemax.cost.forecast import Forecast
from pipemax.cost.hardware import HostLink
from pipemax.cost.load import even_stages
from pipemax.cost.profiles import server_profile
from pipemax.cost.roofline import RooflineCostModel
from pipemax.engine import Engine
from pipemax.executor.base import Executor
from pipemax.executor.process import ProcessExecutor
from pipemax.executor.simulator import SimExecutor
from pipemax.model_spec import ModelSpec
from pipemax.plan import Capacity, StepPlan
from pipemax.request import FinishReason, SamplingParams
from pipemax.scheduling.request_state import RequestState
from tests.executor.conformance import BLOCK_SIZE, CHECKS, OneResultAWait, Session
from tests.scheduling.checking_executor import CheckingExecutor

NUM_STAGES = 2
END_TOKEN, TOKEN = 1, 2
DEVICE_BLOCKS, WINDOW_BLOCKS = 40, 12
# Prompt and output tokens: 60 blocks of 4 and more live at a time, so that blocks have to travel.
JOB = [(3, 16), (30, 9), (17, 12), (8, 16), (25, 4), (1, 16), (12, 14), (21, 8), (5, 16), (28, 10), (14, 13), (9, 1)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.save_pretrained(folder)
    return folder


def processes(model_dir: Path) -> Executor:
    return ProcessExecutor.start(
        model_dir=model_dir,
        spec=ModelSpec.from_pretrained(model_dir),
        num_stages=NUM_STAGES,
        device="cpu",
        dtype="float32",
        load_format=LoadFormat.DUMMY,
        block_size=BLOCK_SIZE,
        num_device_blocks=DEVICE_BLOCKS,
        num_window_blocks=WINDOW_BLOCKS,
        host_memory_gib=0.01,
        max_model_len=64,
        threads_per_stage=1,
    )


def capacity_of(model: ModelSpec) -> Capacity:
    """As the processes have it."""
    block_bytes = model.kv_geometry(block_size=BLOCK_SIZE, dtype_bytes=4).block_bytes(range(model.num_layers))
    homes = int(0.01 * 1024**3) // block_bytes
    return Capacity(NUM_STAGES, BLOCK_SIZE, DEVICE_BLOCKS, WINDOW_BLOCKS, homes, block_bytes // NUM_STAGES)


def simulator(model_dir: Path) -> Executor:
    model = ModelSpec.from_pretrained(model_dir)
    server = server_profile("rtx-4090", NUM_STAGES)
    return SimExecutor.of_server(
        model=model,
        server=server,
        capacity=capacity_of(model),
        stages=even_stages(model.num_layers, NUM_STAGES),
        cost=RooflineCostModel(model=model, gpu=server.gpu, dtype_bytes=4, kv_dtype_bytes=4),
        output_lengths=dict.fromkeys(range(100), 1000),
        end_token_id=END_TOKEN,
        token_id=TOKEN,
        dtype_bytes=4,
        kv_dtype_bytes=4,
    )


def symbols(model_dir: Path) -> Executor:
    capacity = capacity_of(ModelSpec.from_pretrained(model_dir))
    return CheckingExecutor(capacity, max_plans_per_batch=4, endings={})


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Session]:
    executor = request.param(model_dir)
    yield Session(executor)
    executor.shutdown()
    executor.shutdown()


@pytest.mark.parametrize("session", [symbols, simulator, processes], indirect=True, scope="module")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_executors_conform(check: Callable[[Session], None], session: Session) -> None:
    check(session)


def run_job(executor: Executor, model: ModelSpec, policy: PhasePolicyName) -> tuple[list[StepPlan], dict[int, int]]:
    """The job's plans, and tokens by request. Nothing that is measured can change a plan."""
    one_by_one = OneResultAWait(executor)
    gpu = server_profile("rtx-4090", NUM_STAGES).gpu
    scheduler = build_scheduler(
        capacity=executor.capacity,
        num_batches=NUM_STAGES,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        async_scheduling=True,
        phase_policy=policy,
        kv_offload=KVOffload.ON,
        forecast=Forecast(
            cost=RooflineCostModel(model=model, gpu=gpu, dtype_bytes=4, kv_dtype_bytes=4),
            stages=even_stages(model.num_layers, NUM_STAGES),
            link=HostLink(1e8, 1e8, 1e8),
            block_bytes=executor.capacity.block_bytes,
            learn=False,
        ),
    )
    engine = Engine(scheduler=scheduler, executor=one_by_one)
    for request_id, (num_prompt, num_outputs) in enumerate(JOB):
        engine.add_request(
            RequestState(
                request_id=request_id,
                prompt_token_ids=np.arange(3, 3 + num_prompt, dtype=np.int32),
                sampling=SamplingParams(temperature=0.0, max_tokens=num_outputs, ignore_eos=True),
                seed=0,
                stop_token_ids=frozenset(),
                max_outputs=num_outputs,
            )
        )
    tokens = dict.fromkeys(range(len(JOB)), 0)
    while scheduler.population.requests or scheduler.num_plans_in_flight:
        for news in engine.step():
            tokens[news.update.request_id] += 1
            assert news.update.finish_reason in (None, FinishReason.LENGTH)
    return one_by_one.plans, tokens


def readable(plan: StepPlan) -> tuple[object, ...]:
    """Everything that a plan says, comparable."""
    return (
        (plan.step_id, plan.batch_id, plan.phase, plan.sampled_through_step),
        plan.request_ids.tolist(),
        plan.num_computed_tokens.tolist(),
        plan.num_new_tokens.tolist(),
        plan.samples.tolist(),
        plan.block_table_indptr.tolist(),
        plan.block_table_indices.tolist(),
        (plan.write_home.slots.tolist(), plan.write_home.homes.tolist()),
        (plan.refill.slots.tolist(), plan.refill.homes.tolist()),
        [(new.request_id, new.prompt_token_ids.tolist()) for new in plan.new_requests],
        plan.finished_request_ids,
    )


@pytest.mark.parametrize("policy", PhasePolicyName)
def test_the_same_job_gets_the_same_plans_everywhere(policy: PhasePolicyName, model_dir: Path) -> None:
    model = ModelSpec.from_pretrained(model_dir)
    starts = [symbols, simulator, processes]
    runs = []
    for start in starts:
        executor = start(model_dir)
        try:
            runs.append(run_job(executor, model, policy))
        finally:
            executor.shutdown()
    (plans, tokens), *others = runs
    assert tokens == {request_id: num_outputs for request_id, (_, num_outputs) in enumerate(JOB)}
    assert sum(len(plan.refill) for plan in plans) > 20, "the job is to have blocks that travel"
    for start, (other_plans, other_tokens) in zip(starts[1:], others, strict=True):
        assert other_tokens == tokens, start.__name__
        assert len(other_plans) == len(plans), start.__name__
        for plan, other in zip(plans, other_plans, strict=True):
            assert readable(other) == readable(plan), start.__name__
