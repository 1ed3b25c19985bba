"""A pipeline that hangs is noticed, explained and ended; what killed a process is named."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pipemax.config import ConfigError
from pipemax.executor import process as process_module
from pipemax.executor import stage_group
from pipemax.executor.base import ExecutorError
from pipemax.executor.exit_reason import describe_exit, memory_kills
from pipemax.executor.stacks import process_state
from pipemax.executor.stage_group import StageGroup
from pipemax.executor.watchdog import Watchdog
from pipemax.worker.pulse import StageBeat
from tests.executor.plans import Row, make_plan, new_request
from tests.executor.test_process import (  # noqa: F401  (fixtures)
    alive,
    model_dir,
    no_stage_left,
    run_one_step,
    stage_process,
    stage_processes,
    start,
)

STALL_SECONDS = 2.0  # long enough for a loaded machine to give every stage a turn


def test_a_stopped_stage_is_noticed_and_explained(model_dir: Path, no_stage_left: None) -> None:  # noqa: F811
    executor = start(model_dir, stall_seconds=STALL_SECONDS)
    run_one_step(executor)
    processes = stage_processes()
    os.kill(stage_process(1).pid, signal.SIGSTOP)
    began = time.monotonic()
    executor.submit(make_plan(1, [Row(0, 3, 1, [0])]))
    with pytest.raises(ExecutorError, match=r"nothing got on for 2 s \(stage 0 .*; stage 1 .*stopped") as raised:
        executor.wait()
    assert STALL_SECONDS < time.monotonic() - began < 20
    assert not any(process.is_alive() for process in processes)
    # Stage 0 says where each of its threads is; stage 1, which is stopped, says nothing; and so does this process.
    stage_0, stage_1, control_plane = raised.value.details.split("--- ")[1:]
    assert "_run_plans" in stage_0 and "_read_control" in stage_0 and "_beat" in stage_0
    assert "it does not answer" in stage_1
    assert "MainThread" in control_plane and "test_a_stopped_stage_is_noticed" in control_plane
    with pytest.raises(ExecutorError, match="nothing got on"):
        executor.submit(make_plan(2, []))


def test_a_stage_that_no_longer_reads_its_pipe_blocks_nobody(model_dir: Path, no_stage_left: None) -> None:  # noqa: F811
    """Plans pile up in the pipe until it is full, and the control plane is stuck in `submit` itself."""
    executor = start(model_dir, stall_seconds=STALL_SECONDS)
    run_one_step(executor)
    os.kill(stage_process(1).pid, signal.SIGSTOP)
    prompt = np.arange(60_000, dtype=np.int32) % 100
    plans = [make_plan(step, [], new=[new_request(step, prompt.tolist())]) for step in range(1, 5)]

    def submit_all() -> None:
        for plan in plans:
            executor.submit(plan)

    with pytest.raises(ExecutorError, match="nothing got on for 2 s"):
        submit_all()


def test_stages_that_wait_for_a_message_that_never_comes(model_dir: Path, no_stage_left: None) -> None:  # noqa: F811
    """All processes live and beat; but stage 1 alone has a plan, so it waits inside gloo."""
    import pickle

    executor = start(model_dir, stall_seconds=STALL_SECONDS)
    run_one_step(executor)
    plan = make_plan(1, [Row(0, 3, 1, [0])])
    executor._stages._stages[1].control.send_bytes(pickle.dumps(plan))
    executor._submitted.append(process_module._SubmittedStep(1, 0, plan.request_ids, [None, None]))
    with pytest.raises(ExecutorError, match=r"stage 0 waiting for a plan; stage 1 at step 1\)") as raised:
        executor.wait()
    assert "receive_hidden" in raised.value.details


def test_slow_stages_are_left_alone(model_dir: Path, no_stage_left: None) -> None:  # noqa: F811
    """Longer than the limit, but every part of it moves something: nobody is waiting in between."""
    executor = start(model_dir, stall_seconds=STALL_SECONDS)
    run_one_step(executor)
    for step in range(1, 4):
        time.sleep(0.7 * STALL_SECONDS)
        executor.submit(make_plan(step, [Row(0, 2 + step, 1, list(range(1 + (2 + step) // 4)))]))
        executor.wait()
    time.sleep(2 * STALL_SECONDS)
    executor.submit(make_plan(4, []))
    assert executor.wait()[0].step_id == 4
    executor.shutdown()


def test_layers_of_one_long_step_are_progress_and_idle_beats_are_not() -> None:
    group = StageGroup([], stall_seconds=60)

    def moves_on(beat: StageBeat) -> bool:
        before = group._watchdog._quiet_since
        time.sleep(0.001)
        group._note_beat(0, beat)
        return group._watchdog._quiet_since != before

    with group._watchdog.watch():
        assert moves_on(StageBeat(7, "at step 1"))
        assert not moves_on(StageBeat(7, "at step 1"))
        assert moves_on(StageBeat(8, "at step 1"))
        assert not moves_on(StageBeat(8, "at step 1"))
    group._watchdog.stop()


def test_a_stage_that_stops_while_it_loads(
    model_dir: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    no_stage_left: None,  # noqa: F811
) -> None:
    start_stage = stage_group.start_stage

    def start_and_stop(settings):  # type: ignore[no-untyped-def]
        stage = start_stage(settings)
        if settings.stage.stage == 1:
            os.kill(stage.process.pid, signal.SIGSTOP)
        return stage

    monkeypatch.setattr(stage_group, "start_stage", start_and_stop)
    with pytest.raises(ExecutorError, match=r"stage 0 connecting.*; stage 1 starting.* stopped"):
        start(model_dir, stall_seconds=STALL_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stages_do_not_heed_a_signal_that_was_meant_for_all(
    number: signal.Signals,
    model_dir: Path,  # noqa: F811
    no_stage_left: None,  # noqa: F811
) -> None:
    """A batch system's SIGTERM, a terminal's Ctrl-C: rows in flight are to finish."""
    executor = start(model_dir)
    for process in stage_processes():
        os.kill(process.pid, number)
    run_one_step(executor)
    executor.shutdown()


def test_signals_for_stacks_that_nobody_reads_do_no_harm(model_dir: Path, no_stage_left: None) -> None:  # noqa: F811
    executor = start(model_dir)
    for _ in range(100):  # far more than a pipe holds
        os.kill(stage_process(0).pid, signal.SIGUSR1)
        time.sleep(0.002)
    run_one_step(executor)
    executor.shutdown()


def test_memory_that_cannot_be_had_says_what_to_lower(
    model_dir: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    no_stage_left: None,  # noqa: F811
) -> None:
    """As if it had been free a moment ago: no allocator gives a petabyte."""
    monkeypatch.setattr(process_module, "free_host_bytes", lambda: 1 << 60)
    with pytest.raises(ConfigError, match=r"cannot be had: lower num_device_blocks .* or host_memory_gib") as raised:
        start(model_dir, host_memory_gib=float(1 << 20))
    assert "\n" not in str(raised.value)


def test_the_watchdog_counts_only_while_someone_waits() -> None:
    stalls: list[float] = []
    watchdog = Watchdog(stall_seconds=0.1, on_stall=lambda: stalls.append(time.monotonic()))
    time.sleep(0.3)
    with watchdog.watch():
        for _ in range(6):
            time.sleep(0.05)
            watchdog.progress()
    time.sleep(0.2)
    assert not stalls
    with watchdog.watch():
        time.sleep(0.4)
    assert len(stalls) == 1
    watchdog.stop()


def test_how_a_process_ended_in_words(tmp_path: Path) -> None:
    def words(code: int, before: int | None = 3, now: int | None = 3) -> str:
        return describe_exit(code, memory_kills_before=before, memory_kills_now=now)

    assert words(7) == "ended with exit code 7"
    assert words(-signal.SIGSEGV, 3, 4) == "was killed by SIGSEGV"
    assert words(-signal.SIGBUS) == "was killed by SIGBUS"
    assert words(-64) == "was killed by SIGRTMAX" and words(-99) == "was killed by signal 99"
    assert words(-signal.SIGKILL) == "was killed by SIGKILL, not by the system's memory killer"
    assert "memory killer was at work: lower host_memory_gib" in words(-signal.SIGKILL, 3, 4)
    assert words(-signal.SIGKILL, None, 4) == "was killed by SIGKILL (out of memory?)"
    assert memory_kills(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 100\noom_kill 12\n")
    assert memory_kills(tmp_path) == 12


def test_states_of_processes() -> None:
    assert process_state(os.getpid()) == "running"
    assert process_state(2**22 + 1) == "gone"


def test_a_fork_server_that_is_killed_takes_its_stages_with_it_and_the_next_start_has_a_new_one(
    model_dir: Path,  # noqa: F811
    no_stage_left: None,  # noqa: F811
) -> None:
    from multiprocessing import forkserver

    executor = start(model_dir)
    run_one_step(executor)
    pids = [process.pid for process in stage_processes()]
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)

    def run_on() -> None:
        for step in range(1, 200):
            executor.submit(make_plan(step, []))
            executor.wait()
            time.sleep(0.01)

    with pytest.raises(ExecutorError, match=r"stage [01] ended|stage [01] was killed"):
        run_on()
    deadline = time.monotonic() + 5
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(pids) == []
    executor = start(model_dir)
    run_one_step(executor)
    executor.shutdown()
