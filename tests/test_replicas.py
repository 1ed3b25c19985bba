"""Replicas: every request comes out once, whatever becomes of processes; real ones answer as one `LLM` does.

Most of it runs with echo engines (`echo_replica.py`), which start in no time, in the real processes.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipemax.config import ConfigError, EngineConfig
from pipemax.executor.base import ExecutorError
from pipemax.llm import LLM
from pipemax.replica_division import divide
from pipemax.replicas import Replicas
from pipemax.report.recorder import StepRecorder
from pipemax.request import GenerationError, SamplingParams
from pipemax.request_feed import RequestFeed
from pipemax.text_generator import GenerationRequest
from tests.executor.test_process import alive, descendants
from tests.faults.small_job import ENGINE, save_model

PARAMS = SamplingParams()
REAL = {**ENGINE, "pipeline_parallel_size": 1, "num_batches": 1, "num_window_blocks": 0}
SAMPLING = SamplingParams(max_tokens=12, temperature=0.8, ignore_eos=True)


def requests(*prompts: str):
    return [GenerationRequest(request_id=str(n), prompt=p, sampling_params=PARAMS) for n, p in enumerate(prompts)]


def prompts_of(outputs):
    """Request id to what came back. None twice."""
    found = {}
    for output in outputs:
        assert output.request_id not in found
        found[output.request_id] = output.error or output.outputs[0].text
    return found


def numbered(count: int):
    return [f"row {n}" for n in range(count)]


@pytest.fixture
def echo(monkeypatch):
    """Opens replicas of echo engines; all are shut down in the end."""
    monkeypatch.setattr("pipemax.replica.PROGRAM", "tests.echo_replica")
    with contextlib.ExitStack() as stack:

        def open_replicas(num_replicas=2, **settings):
            settings = {"device": "cpu", "max_num_seqs": 8, **settings}
            return stack.enter_context(Replicas("/models/echo", data_parallel_size=num_replicas, **settings))

        yield open_replicas


# -- with echo engines -------------------------------------------------------------------------------------------------


def test_every_request_comes_out_once_and_replicas_share_the_work(echo):
    replicas = echo(3)
    assert [one.outputs[0].text for one in replicas.generate(numbered(500), PARAMS)] == numbered(500)
    answered = [replica.stats.output_tokens for replica in replicas._replicas]
    assert sum(answered) == 500 == replicas.stats().output_tokens and min(answered) > 100
    assert replicas.capacity.num_stages == 3 and replicas.capacity.num_host_blocks == 60
    assert replicas.model_name == "echo" and replicas.max_model_len == 100


def test_requests_are_read_only_as_far_ahead_as_needed(echo):
    replicas = echo()
    num_read = 0

    def source():
        nonlocal num_read
        for request in requests(*numbered(5000)):
            num_read += 1
            yield request

    for num_out, _ in enumerate(replicas.stream(source())):
        assert num_read - num_out < 600


def test_a_replica_that_is_killed_is_replaced_and_its_requests_run_again(echo):
    replicas = echo()
    stream = replicas.stream(iter(requests(*numbered(2000))))
    outputs = [next(stream) for _ in range(50)]
    before = replicas.pids()
    os.kill(before[1], signal.SIGKILL)
    outputs += stream
    assert prompts_of(outputs) == {str(n): f"row {n}" for n in range(2000)}
    assert len(replicas.generate(numbered(50), PARAMS)) == 50
    assert replicas.pids()[0] == before[0] and replicas.pids()[1] not in before
    assert replicas.stats().output_tokens >= 2050


@pytest.mark.parametrize("seed", range(2))
def test_what_kills_a_pipeline_comes_out_with_an_error_and_nothing_else_does(echo, tmp_path, seed):
    rng = random.Random(seed)
    prompts = numbered(300)
    poison = rng.sample(range(300), seed + 1)
    for n in poison:
        prompts[n] = f"poison {n}"
    for n in rng.sample(sorted(set(range(300)) - set(poison)), 2):
        prompts[n] = f"once {tmp_path / str(n)}"
    outputs = prompts_of(echo().stream(iter(requests(*prompts))))
    assert len(outputs) == 300
    failed = {int(name) for name, output in outputs.items() if isinstance(output, GenerationError)}
    assert failed == set(poison)
    assert "fails whenever this request runs: replica" in str(outputs[str(poison[0])])
    assert all(outputs[str(n)] == prompts[n] for n in set(range(300)) - failed)


def test_nothing_but_poison_fails_alone(echo):
    (output,) = echo(1).stream(iter(requests("poison")))
    assert isinstance(output.error, GenerationError)


def test_a_replica_that_cannot_start_again_leaves_the_rest_to_the_others(echo, tmp_path):
    starts = tmp_path / "starts"
    starts.write_text("")
    replicas = echo(2, max_restarts=2, tokenizer=str(starts))
    starts.write_text("\n".join(f"no {n}" for n in range(100)))
    os.kill(replicas.pids()[0], signal.SIGKILL)
    outputs = prompts_of(replicas.stream(iter(requests(*numbered(3000)))))
    assert outputs == {str(n): f"row {n}" for n in range(3000)}


def test_when_no_replica_can_start_again_the_error_is_raised(echo, tmp_path):
    starts = tmp_path / "starts"
    starts.write_text("")
    replicas = echo(2, max_restarts=1, tokenizer=str(starts))
    starts.write_text("\n".join(f"no {n}" for n in range(100)))
    for pid in replicas.pids():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ExecutorError, match=r"cannot start: no \d"):
        list(replicas.stream(iter(requests(*numbered(30)))))


def test_a_first_start_that_fails_leaves_nothing_running(echo, tmp_path):
    (tmp_path / "starts").write_text("no memory")
    with pytest.raises(ExecutorError, match="cannot start: no memory"):
        echo(2, tokenizer=str(tmp_path / "starts"))
    assert not [pid for pid in descendants(os.getpid()) if "echo_replica" in command_of(pid)]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_stream_that_is_closed_leaves_the_replicas_usable(echo):
    replicas = echo()
    for _ in range(3):
        stream = replicas.stream(iter(requests(*numbered(500))))
        assert next(stream).outputs
        stream.close()
        # The same ids, other prompts: nothing of the closed stream comes out.
        again = prompts_of(replicas.stream(iter(requests(*(f"again {n}" for n in range(100))))))
        assert again == {str(n): f"again {n}" for n in range(100)}


def test_dropping_the_queue_lets_only_what_runs_finish(echo):
    replicas = echo()
    stream = replicas.stream(iter(requests(*numbered(3000))))
    before = [next(stream) for _ in range(20)]
    replicas.drop_queued()
    after = prompts_of([*before, *stream])
    assert 20 < len(after) < 300
    assert len(replicas.generate(numbered(100), PARAMS)) == 100


def test_errors_and_ids_that_are_taken_come_out_beside_the_others(echo):
    same = [*requests("a", "error", "c"), GenerationRequest(request_id="0", prompt="x", sampling_params=PARAMS)]
    outputs = list(echo(1).stream(iter(same)))
    errors = sorted(str(output.error) for output in outputs if output.error)
    assert len(outputs) == 4 and errors == ["another request in flight has the id '0': give each its own", "wrong"]


def test_a_feed_that_has_nothing_now_stops_nobody(echo):
    """From another thread, in bursts, with pauses in which everything comes out."""
    replicas = echo()
    feed, outputs = RequestFeed(), {}

    def read():
        for output in replicas.stream(feed):
            feed.settled()
            outputs[output.request_id] = output

    reader = threading.Thread(target=read)
    reader.start()
    for burst in range(4):
        feed.put(
            GenerationRequest(request_id=f"{burst}-{n}", prompt=f"row {n}", sampling_params=PARAMS) for n in range(40)
        )
        deadline = time.monotonic() + 10
        while len(outputs) < 40 * (burst + 1):
            assert time.monotonic() < deadline
            time.sleep(0.005)
    feed.close()
    reader.join(10)
    assert not reader.is_alive() and len(outputs) == 160


# -- with models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_replicas_answer_as_one_pipeline_does_though_one_is_killed(model):
    prompts = [f"fox {n}" for n in range(120)]
    with LLM(model, **REAL) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, SAMPLING)]
    with Replicas(model, data_parallel_size=2, **REAL) as replicas:
        recorder = StepRecorder(capacity=replicas.capacity)
        replicas.observe(recorder)
        assert [output.outputs[0].token_ids for output in replicas.generate(prompts, SAMPLING)] == expected
        check_record(recorder, replicas)
        stream = replicas.stream(
            GenerationRequest(request_id=str(n), prompt=p, sampling_params=SAMPLING) for n, p in enumerate(prompts)
        )
        outputs = [next(stream) for _ in range(10)]
        stages = descendants(replicas.pids()[0])
        assert stages
        os.kill(replicas.pids()[0], signal.SIGKILL)
        outputs += stream
        assert {int(o.request_id): o.outputs[0].token_ids for o in outputs} == dict(enumerate(expected))
        assert len(outputs) == len(prompts)
        gone_within(stages, seconds=10)


def check_record(recorder: StepRecorder, replicas: Replicas) -> None:
    """Both replicas' steps, each at its stage."""
    run = recorder.snapshot()
    assert run.totals.output_tokens == 120 * 12 == replicas.stats().output_tokens
    assert sum(run.totals.steps.values()) == replicas.stats().steps == len({step.step_id for step in run.head})
    assert [use.compute_seconds > 0 for use in run.totals.stages] == [True, True]
    assert all(step.stages[step.step_id % 2].compute_seconds > 0 for step in run.head)
    assert all(step.stages[1 - step.step_id % 2].is_idle for step in run.head)


def test_no_process_outlives_its_parent(model):
    """Killed while its replicas work: no process of theirs is left."""
    program = f"""
import sys
from pipemax import Replicas, SamplingParams
replicas = Replicas({str(model)!r}, data_parallel_size=2, **{REAL!r})
print("ready", flush=True)
while True:
    replicas.generate(["fox"] * 50, SamplingParams(max_tokens=40, ignore_eos=True))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        family = descendants(process.pid)
        assert len(family) >= 4  # two replicas, two stages, and their fork servers
    finally:
        process.kill()
        process.wait()
    gone_within(family, seconds=10)


def gone_within(pids, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := alive(pids):
        assert time.monotonic() < deadline, f"still there: {[command_of(pid) for pid in left]}"
        time.sleep(0.02)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_divided_among_replicas(echo):
    replicas = echo(2, device="cpu", pipeline_parallel_size=3, stage_devices=(0, 1, 2, 3, 4, 5), host_memory_gib=4)
    first, second = (replica._settings for replica in replicas._replicas)
    assert first["stage_devices"] == (0, 1, 2) and second["stage_devices"] == (3, 4, 5)
    assert first["host_memory_gib"] == 2 and first["data_parallel_size"] == 1


@pytest.mark.parametrize(("num_gpus", "share"), [(0, 0.25), (6, 0.4)])
def test_replicas_share_what_one_pipeline_would_take_of_host_memory(monkeypatch, num_gpus, share):
    monkeypatch.setattr("torch.cuda.is_available", lambda: num_gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    monkeypatch.setattr("pipemax.replica_division.free_host_bytes", lambda: 100 * 1024**3)
    first, second = divide(EngineConfig(model="m", data_parallel_size=2, pipeline_parallel_size=3))
    assert first["host_memory_gib"] == second["host_memory_gib"] == 100 * share / 2


def test_an_llm_is_one_pipeline(model):
    with pytest.raises(ConfigError, match=r"use pipemax\.Replicas"):
        LLM(model, data_parallel_size=2)


def test_more_gpus_than_there_are_is_said_before_anything_starts(model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with pytest.raises(ConfigError, match="data_parallel_size 2 with pipeline_parallel_size 2 needs 4 GPUs"):
        Replicas(model, data_parallel_size=2, pipeline_parallel_size=2)
