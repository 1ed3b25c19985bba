"""Whatever ends a pipeline on GPUs, its user gets the reason within seconds, no process is left, no GPU memory is held.

Memory that cannot be had, a GPU that is not there, and SIGKILL of the second stage in every phase of its life: on one
GPU, where stages talk over host memory, and with a GPU each, where the first is left in a receive that nobody answers.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from pipemax import LLM, SamplingParams
from pipemax.config import ConfigError, LoadFormat
from pipemax.executor import process as process_module
from pipemax.executor.base import ExecutorError
from pipemax.executor.stage_group import StageGroup
from pipemax.plan import Phase, StepPlan
from pipemax.worker.transport import MEDIUM_VARIABLE
from tests.cuda.test_tokens import devices
from tests.executor.test_process import descendants, stage_processes

VICTIM = 1
MOST_SECONDS = 10.0  # from the kill to the reason, and from there to the memory
MOST_START_SECONDS = 60.0  # of a start that fails, the first import of all libraries included
MIB = 1024**2
TOLERANCE_BYTES = 100 * MIB
# What a stage holds at the least: a CUDA context.
HELD_BYTES = 200 * MIB
# Weights of 0.5 GiB, so that loading and steps of thousands of tokens take their time; made by the stages themselves.
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=6,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    CONFIG.save_pretrained(folder)
    return folder


def start(folder: Path, **settings: Any) -> LLM:
    defaults: dict[str, Any] = {
        "device": "cuda",
        "pipeline_parallel_size": 2,
        "stage_devices": (0, 0),
        "dtype": "bfloat16",
        "load_format": LoadFormat.DUMMY,
        "skip_tokenizer_init": True,
        "max_model_len": 8192,
        "max_num_seqs": 16,
        "num_device_blocks": 2048,
        "host_memory_gib": 1.0,
        "cuda_graphs": False,
        "threads_per_stage": 1,
    }
    return LLM(folder, **{**defaults, **settings})


def free_bytes(gpus: tuple[int, ...]) -> list[int]:
    """Free memory of each GPU, whoever holds the rest."""
    return [torch.cuda.mem_get_info(gpu)[0] for gpu in gpus]


def stage_family() -> set[int]:
    """All that the fork server has started and that lives: stages."""
    fork_server: Any = forkserver._forkserver
    server = fork_server._forkserver_pid
    return set() if server is None else set(descendants(server))


class Traces:
    """What there was before: in the end it has to be so again."""

    def __init__(self, gpus: tuple[int, ...]) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        self._gpus = tuple(dict.fromkeys(gpus))
        self._processes_before = stage_family()
        self._free_before = free_bytes(self._gpus)

    def held_bytes(self) -> list[int]:
        """Of each GPU: memory that was free before and is not now."""
        return [before - now for before, now in zip(self._free_before, free_bytes(self._gpus), strict=True)]

    def assert_gone(self) -> None:
        """No stage is left, and the memory comes back."""
        deadline = time.monotonic() + MOST_SECONDS
        while self._processes_left() or stage_processes() or max(self.held_bytes()) > TOLERANCE_BYTES:
            assert time.monotonic() < deadline, (self._processes_left(), stage_processes(), self.held_bytes())
            time.sleep(0.02)

    def _processes_left(self) -> set[int]:
        return stage_family() - self._processes_before


# -- settings that cannot work -----------------------------------------------------------------------------------------


def assert_cannot_start(
    folder: Path, error_class: type[Exception] | tuple[type[Exception], ...], words: str, **settings: Any
) -> None:
    """A start with these settings fails within seconds, with one line that matches, and leaves nothing."""
    traces = Traces((0,))
    began = time.monotonic()
    with pytest.raises(error_class, match=words) as raised:
        start(folder, **settings)
    assert time.monotonic() - began < MOST_START_SECONDS
    assert "\n" not in str(raised.value)
    traces.assert_gone()


def test_more_kv_blocks_than_the_gpu_holds(model: Path, device: torch.device) -> None:
    words = r"cannot be had: lower num_device_blocks .*out of memory"
    assert_cannot_start(model, ConfigError, words, num_device_blocks=1 << 24)


def test_weights_that_the_gpu_does_not_hold(device: torch.device, tmp_path: Path) -> None:
    """Two stages on one GPU, together a third larger than it."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    keys = config.hidden_size // 8
    layer_bytes = 2 * config.hidden_size * (2 * config.hidden_size + 2 * keys + 3 * config.intermediate_size)
    config.num_hidden_layers = math.ceil(1.33 * torch.cuda.mem_get_info(0)[1] / layer_bytes)
    config.save_pretrained(tmp_path)
    assert_cannot_start(tmp_path, (ConfigError, ExecutorError), r"out of memory|do not fit")


def test_more_host_memory_than_is_free(model: Path, device: torch.device) -> None:
    assert_cannot_start(model, ConfigError, r"GiB are free: lower host_memory_gib$", host_memory_gib=float(1 << 20))


def test_a_gpu_that_is_not_there(model: Path, device: torch.device) -> None:
    words = r"stage_devices names GPU 99 and this machine shows \d+"
    assert_cannot_start(model, ConfigError, words, stage_devices=(0, 99))


# -- a stage that is killed --------------------------------------------------------------------------------------------


class Kill:
    """SIGKILL of a stage, once; what was so at that moment."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self.seconds: float | None = None
        self.held_bytes: list[int] = []

    def __call__(self, pid: int) -> None:
        assert self.seconds is None
        self.held_bytes = self._traces.held_bytes()
        os.kill(pid, signal.SIGKILL)
        self.seconds = time.monotonic()


def kill_while_loading(kill: Kill, doing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that are started from now on are to beat often; at the first beat with these words the victim is killed.

    It cannot have got much further: the beat is read by the thread that stages wait for before they take KV memory.
    """
    note_beat = StageGroup._note_beat

    def note_beat_and_kill(group: Any, index: int, beat: Any) -> None:
        note_beat(group, index, beat)
        if index == VICTIM and beat.doing == doing and kill.seconds is None:
            kill(group._stages[VICTIM].process.pid)

    monkeypatch.setattr(process_module, "_BEAT_SECONDS", 0.005)
    monkeypatch.setattr(StageGroup, "_note_beat", note_beat_and_kill)


class KillAtPlans:
    """EngineObserver that kills when plans of a kind, and no others, are on their way through the stages.

    It acts when a result comes: then the last stage has just begun with the plan that follows.
    """

    def __init__(self, kill: Kill, pid: int, is_meant: Callable[[StepPlan], bool], *, num_before: int) -> None:
        """`num_before` results of that kind come first."""
        self._kill = kill
        self._pid = pid
        self._is_meant = is_meant
        self._num_before = num_before
        self._plans: dict[int, StepPlan] = {}
        self.in_flight: list[StepPlan] = []

    def on_submit(self, plan: StepPlan, **_: Any) -> None:
        self._plans[plan.step_id] = plan

    def on_result(self, result: Any, updates: Any) -> None:
        done = self._plans.pop(result.step_id)
        self._num_before -= self._is_meant(done)
        plans = list(self._plans.values())
        if self._num_before < 0 and plans and all(map(self._is_meant, plans)) and self._kill.seconds is None:
            self.in_flight = plans
            self._kill(self._pid)


KINDS: dict[str, Callable[[StepPlan], bool]] = {
    "prefill": lambda plan: plan.phase is Phase.PREFILL,
    "decode": lambda plan: plan.phase is Phase.DECODE,
    "transfer": lambda plan: plan.phase is Phase.DECODE and len(plan.refill) > 0,
}
PROMPT_TOKENS = {"prefill": 4000, "decode": 64, "transfer": 300}
# Two batches of up to 16 requests with 19 blocks and more each: three times what this device holds.
TIGHT = {"max_model_len": 1024, "num_device_blocks": 192, "num_window_blocks": 96}


def requests(count: int, prompt_tokens: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, CONFIG.vocab_size, prompt_tokens).tolist() for _ in range(count)]


def assert_explained_and_gone(kill: Kill, error: ExecutorError, traces: Traces) -> None:
    told_seconds = time.monotonic()
    assert kill.seconds is not None and told_seconds - kill.seconds < MOST_SECONDS
    assert str(error).startswith(f"stage {VICTIM} was killed by SIGKILL")
    assert "\n" not in str(error)
    traces.assert_gone()


@pytest.mark.parametrize(
    ("where", "doing"),
    [
        ("one gpu", "loading weights"),
        ("a gpu each", "connecting to the other stages"),
        ("a gpu each", "measuring the links"),
        ("a gpu each", "loading weights"),
    ],
)
def test_a_stage_killed_while_it_starts(
    where: str, doing: str, model: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_devices = devices(2, where)
    traces = Traces(stage_devices)
    kill = Kill(traces)
    kill_while_loading(kill, doing, monkeypatch)
    with pytest.raises(ExecutorError) as raised:
        start(model, stage_devices=stage_devices)
    assert_explained_and_gone(kill, raised.value, traces)
    assert max(kill.held_bytes) > HELD_BYTES


@pytest.mark.parametrize(("where", "medium"), [("one gpu", "host"), ("a gpu each", "host"), ("a gpu each", "nccl")])
@pytest.mark.parametrize("when", KINDS)
def test_a_stage_killed_at_work(
    where: str, medium: str, when: str, model: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill of 4,000 tokens a request; decode with all fast paths; blocks on their way while the device is small."""
    stage_devices = devices(2, where)
    monkeypatch.setenv(MEDIUM_VARIABLE, medium)
    traces = Traces(stage_devices)
    kill = Kill(traces)
    memory = TIGHT if when == "transfer" else {}
    llm = start(
        model, stage_devices=stage_devices, phase_policy="disaggregated", cuda_graphs=when == "decode", **memory
    )
    executor: Any = llm.engine.executor
    pid = executor._stages._stages[VICTIM].process.pid
    killer = KillAtPlans(kill, pid, KINDS[when], num_before=2 if when == "prefill" else 20)
    llm.observe(killer)
    prompts = requests(32, PROMPT_TOKENS[when])
    with pytest.raises(ExecutorError) as raised:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))
    assert_explained_and_gone(kill, raised.value, traces)
    assert killer.in_flight and min(kill.held_bytes) > HELD_BYTES
    # It stays failed, says the same, and can be closed.
    with pytest.raises(ExecutorError, match=f"^stage {VICTIM} was killed"):
        llm.generate(prompts[:1])
    llm.shutdown()
