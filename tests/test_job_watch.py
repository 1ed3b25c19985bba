"""A control plane that hangs itself: noticed, explained and ended, and its job goes on with the same command."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipemax.job_watch import JobWatch
from tests.executor.test_process import alive, descendants
from tests.faults.small_job import ENGINE, line, results, save_model
from tests.test_job_process import flags

STALL_SECONDS = 0.3


class SlowExecutor:
    """Takes a while for everything."""

    def submit(self, plan: Any) -> None:
        time.sleep(2 * STALL_SECONDS)

    def wait(self) -> list[Any]:
        time.sleep(2 * STALL_SECONDS)
        return []


def watched() -> tuple[JobWatch, Any, list[str]]:
    said: list[str] = []
    watch = JobWatch(stall_seconds=STALL_SECONDS, end=said.append)
    engine: Any = SimpleNamespace(executor=SlowExecutor())
    watch.look_after(engine)
    return watch, engine, said


def test_a_main_thread_that_does_nothing_is_told_once() -> None:
    watch, _, said = watched()
    watch.progress()
    time.sleep(2 * STALL_SECONDS)  # rows are not under way yet
    assert said == []
    with watch.watch():
        time.sleep(4 * STALL_SECONDS)
    time.sleep(2 * STALL_SECONDS)
    assert len(said) == 1 and "got nothing done for 0.3 s" in said[0]


def test_time_in_an_executor_or_in_a_pause_does_not_count() -> None:
    watch, engine, said = watched()
    with watch.watch():
        for _ in range(2):
            engine.executor.submit(None)
            engine.executor.wait()
        with watch.pause():
            watch.progress()
            time.sleep(2 * STALL_SECONDS)
        for _ in range(6):
            time.sleep(STALL_SECONDS / 3)
            watch.progress()
    time.sleep(2 * STALL_SECONDS)
    assert said == []


def test_after_an_executor_it_counts_again() -> None:
    watch, engine, said = watched()
    with watch.watch():
        engine.executor.wait()
        assert said == []
        time.sleep(3 * STALL_SECONDS)
    assert len(said) == 1


def test_without_an_engine_to_look_after_nothing_is_watched() -> None:
    said: list[str] = []
    watch = JobWatch(stall_seconds=0.1, end=said.append)
    with watch.watch():
        watch.progress()
        with watch.pause():
            pass
        time.sleep(0.4)
    assert said == []


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, time
        from pipemax.executor.watchdog import Watchdog
        watchdog = Watchdog(stall_seconds=1.0, on_stall=lambda: print("stall", flush=True))
        with watchdog.watch():
            print("watching", flush=True)
            sys.stdin.readline()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        output, _ = process.communicate("\n")
    assert output == "" and process.returncode == 0


# The sixth result is never written, as on a file server that does not answer.
HANGING = """
import sys, time
from pipemax.cli import main
from pipemax.io.output_journal import OutputJournal

write, count = OutputJournal.append, 0

def write_or_hang(journal, text):
    global count
    count += 1
    if count > 5:
        time.sleep(1000)
    write(journal, text)

OutputJournal.append = write_or_hang
sys.exit(main())
"""


@pytest.mark.timeout(120)
def test_a_job_whose_write_hangs_ends_and_goes_on_with_the_same_command(tmp_path: Path) -> None:
    model, output = save_model(tmp_path / "model"), tmp_path / "out.jsonl"
    rows = [line(f"row-{n}", "/v1/completions", {"prompt": f"fox {n}", "max_tokens": 4}) for n in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    arguments = ["run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(output), "--model", str(model)]
    arguments += flags({**ENGINE, "stall_seconds": 2})
    family: set[int] = set()
    with (
        (tmp_path / "stderr").open("w") as stderr,
        subprocess.Popen([sys.executable, "-c", HANGING, *arguments], stderr=stderr) as job,
    ):
        deadline = time.monotonic() + 75
        while job.poll() is None:
            family |= set(descendants(job.pid))
            time.sleep(0.05)
            if time.monotonic() > deadline:
                job.kill()
    text = (tmp_path / "stderr").read_text()
    assert job.returncode == 3, text
    assert text.splitlines()[-1].startswith("pipemax: error: the job hangs: its main thread got nothing done for 2 s")
    assert "MainThread" in text and "in write_or_hang" in text
    assert len(results(output)) == 5
    deadline = time.monotonic() + 10
    while alive(sorted(family)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(sorted(family)) == []
    plain = "import sys; from pipemax.cli import main; sys.exit(main())"
    again = subprocess.run([sys.executable, "-c", plain, *arguments], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert len(results(output)) == 20
