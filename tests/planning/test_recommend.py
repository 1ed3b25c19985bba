"""Which layout is recommended, on results made by hand; what would fit where nothing does."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipemax.config import ConfigError, EngineConfig, KVOffload, PhasePolicyName
from pipemax.cost.hardware import PeerLink
from pipemax.cost.profiles import server_profile
from pipemax.cost.workload import MeanLengths
from pipemax.planning.compare import Job, JobSettings, LayoutRefusal, LayoutResult
from pipemax.planning.layouts import Layout, PipelineLayout, TensorLayout
from pipemax.planning.limits import Resource, limits
from pipemax.planning.recommend import recommend
from tests.cost.models import LLAMA_70B
from tests.planning.models import MODEL, server, settings, workload

FOLDER = Path("models/Small-2B")
JOB = Job.of(workload(100), max_requests=100)
ON = PipelineLayout(1, 2, KVOffload.ON, PhasePolicyName.AUTO)
OFF = PipelineLayout(1, 2, KVOffload.OFF, PhasePolicyName.AUTO)
TENSOR = TensorLayout(1, 2, PeerLink.HOST_MEMORY)


def result(layout: Layout, tokens_per_second: float) -> LayoutResult:
    seconds = JOB.total_output_tokens / tokens_per_second
    return LayoutResult(
        layout=layout,
        job_seconds=seconds,
        output_tokens_per_second=tokens_per_second,
        requests_per_second=100 / seconds,
        mean_rows=10,
        home_bytes=3 << 30,
        run=None,
        is_rough=False,
    )


def choose(*outcomes: LayoutResult | LayoutRefusal):
    return recommend(outcomes, model=MODEL, model_dir=FOLDER, server=server(), job=JOB, settings=JobSettings())


def test_the_fastest_wins_and_is_held_against_the_others():
    chosen = choose(result(OFF, 100), result(ON, 150), result(TENSOR, 75))
    assert chosen.best.layout == ON
    assert [reason.split(" x ")[0] for reason in chosen.reasons] == ["1.50", "2.00"]
    assert chosen.gains and chosen.gains[0].share >= chosen.gains[-1].share


def test_offloading_that_gains_nothing_is_not_recommended():
    assert choose(result(ON, 100.5), result(OFF, 100)).best.layout == OFF
    assert choose(result(ON, 102), result(OFF, 100)).best.layout == ON


def test_tensor_parallelism_is_recommended_where_it_is_faster():
    chosen = choose(result(ON, 100), result(TENSOR, 150))
    assert chosen.best.layout == TENSOR and chosen.command is None and chosen.gains == ()
    assert choose(result(ON, 100), result(TENSOR, 100.5)).best.layout == ON


def test_the_command_has_flags_that_engines_know():
    command = choose(result(ON, 100)).command
    assert command is not None
    flags = [word.removeprefix("--").replace("-", "_") for word in command.split() if word.startswith("--")]
    assert set(flags) <= set(EngineConfig.__dataclass_fields__)
    assert (
        f"--model {FOLDER} " in command and "--host-memory-gib 3" in command and "--pipeline-parallel-size 2" in command
    )


def test_rows_of_a_step_are_in_the_command_where_they_were_asked_for():
    commands = [
        recommend(
            [result(ON, 100)], model=MODEL, model_dir=FOLDER, server=server(), job=JOB, settings=JobSettings(**asked)
        ).command
        for asked in ({}, {"max_num_seqs": 64})
    ]
    assert [command is not None and "--max-num-seqs" in command for command in commands] == [False, True]
    assert commands[1] is not None and "--max-num-seqs 64 " in commands[1]


def test_the_command_names_replicas_and_the_memory_of_them_all():
    two = PipelineLayout(2, 2, KVOffload.ON, PhasePolicyName.AUTO)
    four_gpus = server(4)
    command = recommend(
        [result(two, 150)], model=MODEL, model_dir=FOLDER, server=four_gpus, job=JOB, settings=JobSettings()
    ).command
    assert command is not None
    assert "--pipeline-parallel-size 2 --data-parallel-size 2 " in command and "--host-memory-gib 3" in command
    alone = choose(result(ON, 100)).command
    assert alone is not None and "--data-parallel-size" not in alone


def test_what_would_fit_is_said_where_nothing_does():
    refusal = LayoutRefusal(ON, "Llama-3.1-70B does not fit 4 x rtx-4090; use more GPUs")
    with pytest.raises(ConfigError) as caught:
        recommend(
            [refusal],
            model=LLAMA_70B,
            model_dir=FOLDER,
            server=server_profile("rtx-4090", 4),
            job=JOB,
            settings=JobSettings(),
        )
    message = str(caught.value)
    assert message.startswith("Llama-3.1-70B does not fit 4 x rtx-4090; what would fit: 7 x rtx-4090, ")
    assert "4 x l20" in message and "4 x rtx-3090" not in message


def gains_of(gpu_name: str, *, num_gpus: int = 8, num_requests: int = 5000, prompt_only: bool = False, **changes):
    lengths = MeanLengths(4000, 1, 4001) if prompt_only else MeanLengths(229, 471, 556)
    found = limits(
        model=LLAMA_70B,
        server=server_profile(gpu_name, num_gpus),
        settings=settings(max_num_seqs=1024, **changes),
        lengths=lengths,
        num_requests=num_requests,
    )
    assert len(found) == len(Resource)
    return {gain.resource: gain.share for gain in found}


def test_prefill_is_limited_by_compute():
    gains = gains_of("rtx-4090", prompt_only=True)
    assert max(gains, key=gains.__getitem__) is Resource.COMPUTE and gains[Resource.COMPUTE] > 0.05


def test_small_cards_are_limited_by_memory_and_by_weights():
    gains = gains_of("rtx-4090", kv_offload=KVOffload.OFF)
    assert gains[Resource.KV_MEMORY] > 0.05 and gains[Resource.WEIGHTS] > 0.05
    assert gains[Resource.LINK] == 0


def test_the_link_matters_where_blocks_travel():
    assert gains_of("rtx-4090")[Resource.LINK] > 0.02


def test_few_requests_limit_by_rows():
    gains = gains_of("l20", num_requests=8)
    assert max(gains, key=gains.__getitem__) is Resource.ROWS
    assert gains[Resource.ROWS] > 0.09 and gains[Resource.KV_MEMORY] == 0
