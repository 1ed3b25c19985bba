"""ProcessExecutor with a tiny llama: hand-made plans, and everything that can end a stage."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipemax.config import ConfigError, LoadFormat, OffloadChoice
from pipemax.executor.base import ExecutorError
from pipemax.executor.process import ProcessExecutor
from pipemax.executor.stage_group import StageGroup
from pipemax.model_spec import ModelSpec
from pipemax.plan import StepPlan, StepResult
from pipemax.worker import loader
from pipemax.worker.stage_process import StageFailure
from tests.executor.plans import Row, make_plan, new_request

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [90, 17, 4], [33, 34, 35, 36], [77, 2, 77, 2, 77, 2, 77]]
NUM_OUTPUT_TOKENS = 14


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough that greedy outputs vary; a shard or two a layer."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="80KB")
    return folder


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    """Greedy answers of Transformers, one prompt at a time."""
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False)
        answers.append(output[0, len(prompt) :].tolist())
    assert len({token for answer in answers for token in answer}) > 10
    return answers


def start(model_dir: Path, **settings: Any) -> ProcessExecutor:
    defaults: dict[str, Any] = {
        "num_stages": 2,
        "device": "cpu",
        "block_size": BLOCK_SIZE,
        "num_device_blocks": 32,
        "host_memory_gib": 0.01,
        "max_model_len": MAX_MODEL_LEN,
        "threads_per_stage": 1,
    }
    return ProcessExecutor.start(
        model_dir=model_dir, spec=ModelSpec.from_pretrained(model_dir), **{**defaults, **settings}
    )


@pytest.fixture
def no_stage_left() -> Iterator[None]:
    yield
    assert stage_processes() == []


def stage_processes() -> list[Any]:
    return [process for process in multiprocessing.active_children() if process.name.startswith("pipemax-stage-")]


def stage_process(index: int) -> Any:
    (found,) = [process for process in stage_processes() if process.name == f"pipemax-stage-{index}"]
    return found


class TravellingBlocks:
    """Plans for two batches of two requests each in which full blocks live at home and visit the device for one step.

    Slots 0..3 hold the tail block of each request, slots 4..13 are the window, which every plan fills anew for the
    other batch, the rest are for prefill. Homes are request * 16 + block.
    """

    def __init__(self) -> None:
        self._window: dict[tuple[int, int], int] = {}
        self._written: set[tuple[int, int]] = set()

    def plans(self, num_output_tokens: int) -> Iterator[StepPlan]:
        yield self._prefill(0, [0, 1])
        yield self._prefill(1, [2, 3])
        for step_id in range(2, 2 * num_output_tokens):
            yield self._decode(step_id, step_id % 2)

    @staticmethod
    def _home(request: int, block: int) -> int:
        return request * 16 + block

    def _prefill(self, step_id: int, requests: list[int]) -> StepPlan:
        scratch = iter(range(14, 32))
        rows, write_home = [], []
        for request in requests:
            prompt = PROMPTS[request]
            num_full = len(prompt) // BLOCK_SIZE
            slots = [next(scratch) for _ in range(num_full)]
            write_home += [(slot, self._home(request, block)) for block, slot in enumerate(slots)]
            self._written |= {(request, block) for block in range(num_full)}
            tail = [request] if len(prompt) % BLOCK_SIZE else []
            rows.append(Row(request, 0, len(prompt), slots + tail))
        return make_plan(
            step_id,
            rows,
            batch_id=step_id,
            write_home=write_home,
            refill=self._refill((step_id + 1) % 2, step_id, set()) if step_id else [],
            new=[new_request(request, PROMPTS[request]) for request in requests],
            sampled_through=-1,
        )

    def _decode(self, step_id: int, batch: int) -> StepPlan:
        rows, write_home, filled = [], [], set()
        for request in (2 * batch, 2 * batch + 1):
            position = len(PROMPTS[request]) + step_id // 2 - 1
            block, offset = divmod(position, BLOCK_SIZE)
            slots = [self._window[request, full] for full in range(block)] + [request]
            rows.append(Row(request, position, 1, slots))
            if offset == BLOCK_SIZE - 1:
                write_home.append((request, self._home(request, block)))
                filled.add((request, block))
        refill = self._refill(1 - batch, step_id, filled)
        self._written |= filled
        return make_plan(
            step_id, rows, batch_id=batch, write_home=write_home, refill=refill, sampled_through=step_id - 2
        )

    def _refill(self, batch: int, step_id: int, filled: set[tuple[int, int]]) -> list[tuple[int, int]]:
        """Brings all full blocks of a batch into the window, each time at other places."""
        blocks = sorted(block for block in self._written - filled if block[0] // 2 == batch)
        places = [4 + (3 * step_id + 7 * index) % 10 for index in range(len(blocks))]
        assert len(set(places)) == len(places)
        self._window = dict(zip(blocks, places, strict=True))
        return [(place, self._home(*block)) for block, place in self._window.items()]


@pytest.mark.parametrize("num_stages", [1, 3])
def test_tokens_equal_those_of_transformers_while_blocks_travel(
    num_stages: int, model_dir: Path, expected: list[list[int]], no_stage_left: None
) -> None:
    """All plans are submitted at once: nothing but the stages keeps steps, tokens and copies in order."""
    executor = start(model_dir, num_stages=num_stages)
    assert (executor.capacity.num_stages, executor.capacity.num_device_blocks) == (num_stages, 32)
    plans = list(TravellingBlocks().plans(NUM_OUTPUT_TOKENS))
    for plan in plans:
        executor.submit(plan)
    results: list[StepResult] = []
    while len(results) < len(plans):
        results += executor.wait()
    executor.shutdown()
    assert [result.step_id for result in results] == [plan.step_id for plan in plans]
    answers: dict[int, list[int]] = {request: [] for request in range(len(PROMPTS))}
    for plan, result in zip(plans, results, strict=True):
        for request, token in zip(result.request_ids.tolist(), result.token_ids.tolist(), strict=True):
            answers[request].append(token)
        assert len(result.timings) == num_stages and result.logprobs is None and result.row_errors == {}
        moved = sum(timing.home_bytes for timing in result.timings), sum(t.refill_bytes for t in result.timings)
        block_bytes = 5 * 2 * BLOCK_SIZE * 2 * 16 * 4
        assert moved == (len(plan.write_home) * block_bytes, len(plan.refill) * block_bytes)
    assert list(answers.values()) == expected
    assert sum(len(plan.refill) for plan in plans) > 100


def test_chunked_prefill_and_a_copy_step_and_logprobs(
    model_dir: Path, expected: list[list[int]], no_stage_left: None
) -> None:
    executor = start(model_dir)
    prompt = PROMPTS[0]
    request = new_request(0, prompt, logprobs=2)
    executor.submit(make_plan(0, [Row(0, 0, 5, [3, 9], samples=False)], new=[request], write_home=[(3, 1)]))
    executor.submit(make_plan(1, [], refill=[(20, 1)]))
    executor.submit(make_plan(2, [Row(0, 5, 4, [20, 9, 7])]))
    executor.submit(make_plan(3, [Row(0, 9, 1, [20, 9, 7])]))
    executor.submit(make_plan(4, [], finished=[0]))
    results: list[StepResult] = []
    while len(results) < 5:
        results += executor.wait()
    executor.shutdown()
    assert [result.token_ids.tolist() for result in results] == [[], [], expected[0][:1], expected[0][1:2], []]
    assert results[2].logprobs is not None and results[2].logprobs[0] is not None
    assert results[2].logprobs[0].token_ids[0] == expected[0][0]
    assert results[1].finished_seconds <= executor.now()


def run_one_step(executor: ProcessExecutor) -> None:
    executor.submit(make_plan(0, [Row(0, 0, 3, [0])], new=[new_request(0, [1, 2, 3])]))
    executor.wait()


def run_until_it_fails(executor: ProcessExecutor) -> None:
    for step_id in range(1, 50):
        executor.submit(make_plan(step_id, [Row(0, 2 + step_id, 1, list(range(1 + (2 + step_id) // 4)))]))
        executor.wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_stage_is_named_and_takes_the_others_with_it(
    victim: int, model_dir: Path, no_stage_left: None
) -> None:
    executor = start(model_dir)
    run_one_step(executor)
    processes = stage_processes()
    os.kill(stage_process(victim).pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ExecutorError, match=rf"^stage {victim} was killed by SIGKILL($|, not by| \(out of)"):
        run_until_it_fails(executor)
    assert time.monotonic() - began < 3.0
    assert not any(process.is_alive() for process in processes)
    # It stays failed, and says the same.
    with pytest.raises(ExecutorError, match=f"^stage {victim} was killed"):
        executor.submit(make_plan(200, []))
    executor.shutdown()


def test_a_stage_that_raises_gives_its_traceback(model_dir: Path, no_stage_left: None) -> None:
    executor = start(model_dir)
    executor.submit(make_plan(0, [], write_home=[(32, 0)]))
    with pytest.raises(ExecutorError, match=r"^stage [01] failed: AssertionError: step 0: a slot") as caught:
        executor.wait()
    assert "Traceback (most recent call last)" in caught.value.details and "transfer.py" in caught.value.details


def test_results_that_were_complete_come_before_the_error(model_dir: Path, no_stage_left: None) -> None:
    executor = start(model_dir)
    executor.submit(make_plan(0, [Row(0, 0, 3, [0])], new=[new_request(0, [1, 2, 3])]))
    time.sleep(0.3)
    executor.submit(make_plan(1, [], write_home=[(99, 0)]))
    time.sleep(0.3)
    assert [result.step_id for result in executor.wait()] == [0]
    with pytest.raises(ExecutorError, match="failed: AssertionError"):
        executor.wait()


def test_the_stage_that_failed_is_told_from_those_whose_links_broke(
    model_dir: Path, no_stage_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last stage gets a plan that cannot be; the others fail right after, over links to one that is gone."""
    executor = start(model_dir, num_stages=3)
    executor.submit(make_plan(0, [Row(0, 0, 3, [0])], new=[new_request(0, list(range(3, 59)))]))
    executor.wait()
    rows = [Row(0, 3, 53, list(range(14)))]
    impossible = pickle.dumps(make_plan(1, rows, write_home=[(99, 0)]))

    def send(plan: bytes) -> None:
        for stage in executor._stages._stages:
            stage.control.send_bytes(impossible if stage.index == 2 else plan)

    with monkeypatch.context() as patched:
        patched.setattr(executor._stages, "send", send)
        executor.submit(make_plan(1, rows))
    for step_id in (2, 3, 4):
        with contextlib.suppress(ExecutorError):
            executor.submit(make_plan(step_id, [Row(0, 54 + step_id, 1, list(range(15)))]))
    with pytest.raises(ExecutorError, match=r"^stage 2 failed: AssertionError: step 1: a slot") as caught:
        executor.wait()
    assert "transfer.py" in caught.value.details


def test_an_echo_is_not_taken_for_the_cause() -> None:
    """Links break at the moment a stage fails, and what the others say of that may be heard first."""
    group = StageGroup([], stall_seconds=60)
    group._stages = [SimpleNamespace(index=index) for index in range(3)]  # type: ignore[misc]
    for index in (0, 1):
        group._failures[index] = StageFailure("LinkError: gone", "", config_error=False, is_echo=True)
        group._exit_codes[index] = 1
    assert group._cause() is None
    group._failures[2] = StageFailure("CopyError: no such page", "", config_error=False, is_echo=False)
    assert str(group._cause()) == "stage 2 failed: CopyError: no such page"
    del group._failures[2]
    group._exit_codes[2] = -signal.SIGSEGV
    assert str(group._cause()) == "stage 2 was killed by SIGSEGV"
    group._watchdog.stop()


def test_shutdown_twice_and_without_any_step(model_dir: Path, no_stage_left: None) -> None:
    executor = start(model_dir)
    assert len(stage_processes()) == 2
    executor.shutdown()
    assert stage_processes() == []
    executor.shutdown()


def test_a_dropped_executor_ends_its_stages(model_dir: Path, no_stage_left: None) -> None:
    executor = start(model_dir)
    assert len(stage_processes()) == 2
    del executor


def test_a_stopped_stage_is_ended_too(model_dir: Path, no_stage_left: None) -> None:
    executor = start(model_dir)
    os.kill(stage_process(1).pid, signal.SIGSTOP)
    executor.shutdown()


def test_a_file_that_is_missing_when_a_stage_loads_it(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_stage_left: None
) -> None:
    """The check before the start is switched off, as if the file had gone in between; one stage of three needs it."""
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    missing = loader.Checkpoint.open(model_dir).file_of["model.layers.4.mlp.up_proj.weight"].name
    (tmp_path / missing).unlink()
    monkeypatch.setattr(loader, "check_checkpoint", lambda *arguments, **settings: None)
    with pytest.raises(ConfigError, match=missing) as caught:
        start(tmp_path, num_stages=3)
    assert "\n" not in str(caught.value)


def test_links_that_cannot_be_made(model_dir: Path, monkeypatch: pytest.MonkeyPatch, no_stage_left: None) -> None:
    """Every stage fails alike; and the stages see the environment of the moment, not the fork server's."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(ExecutorError, match="could not connect to the other stages"):
        start(model_dir)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_device_blocks": 8}, "needs 16 KV blocks and the device holds 8: raise num_device_blocks, or set max"),
        (
            {"host_memory_gib": 1e-5, "kv_offload": OffloadChoice.ON},
            "host memory holds 2: set host_memory_gib to at least",
        ),
        ({"host_memory_gib": 1e6}, "GiB are free: lower host_memory_gib"),
        ({"num_stages": 6}, "layers"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], what: str, model_dir: Path, no_stage_left: None) -> None:
    with pytest.raises(ConfigError, match=what):
        start(model_dir, **settings)


def test_dummy_weights(model_dir: Path, tmp_path: Path, no_stage_left: None) -> None:
    """Values do not depend on the split, so tokens do not either."""
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    tokens = []
    for num_stages in (1, 2):
        executor = start(tmp_path, num_stages=num_stages, load_format=LoadFormat.DUMMY)
        executor.submit(make_plan(0, [Row(0, 0, 3, [0])], new=[new_request(0, [1, 2, 3])]))
        tokens.append(executor.wait()[0].token_ids.tolist())
        executor.shutdown()
    assert tokens[0] == tokens[1]


# A script without a __main__ guard: stages must not run it again.
SCRIPT = """
import pickle, sys, time
from pathlib import Path
from pipemax.executor.process import ProcessExecutor
from pipemax.model_spec import ModelSpec
from tests.executor.plans import Row, make_plan, new_request

print("script starts", flush=True)
folder = Path(sys.argv[1])
executor = ProcessExecutor.start(
    model_dir=folder, spec=ModelSpec.from_pretrained(folder), num_stages=2, device="cpu", block_size=4,
    num_device_blocks=32, host_memory_gib=0.01, max_model_len=64, threads_per_stage=1,
)
plan = make_plan(0, [Row(0, 0, 3, [0])], new=[new_request(0, [1, 2, 3])])
if sys.argv[2] == "blocked":
    # Stage 1 alone gets a plan, so it waits inside gloo for activations that never come.
    executor._stages._stages[1].control.send_bytes(pickle.dumps(plan))
    time.sleep(0.3)
else:
    executor.submit(plan)
    executor.wait()
print("ready", flush=True)
if sys.argv[2] != "ends":
    time.sleep(60)
"""


def run_script(model_dir: Path, tmp_path: Path, mode: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, str(script), str(model_dir), mode],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] != "Z":
            children.setdefault(int(words[1]), []).append(int(stat.parent.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        found += (more := children.get(queue.pop(), []))
        queue += more
    return found


def alive(pids: Sequence[int]) -> list[int]:
    states = []
    for pid in pids:
        try:
            states.append((pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]))
        except OSError:
            continue
    return [pid for pid, state in states if state != "Z"]


def test_nothing_outlives_a_parent_that_is_killed(model_dir: Path, tmp_path: Path) -> None:
    """Stage 0 waits for plans, stage 1 inside gloo for activations; the fork server goes too."""
    with run_script(model_dir, tmp_path, "blocked") as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline().strip() for _ in range(2)] == ["script starts", "ready"]
        family = descendants(parent.pid)
        assert len(family) >= 3  # two stages and the fork server, at least
        parent.kill()
    deadline = time.monotonic() + 3.0
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(family) == []


def test_a_script_without_a_guard_that_never_shuts_down(model_dir: Path, tmp_path: Path) -> None:
    with run_script(model_dir, tmp_path, "ends") as parent:
        assert parent.stdout is not None
        assert parent.stdout.read().splitlines() == ["script starts", "ready"]
        assert parent.wait(timeout=20) == 0
