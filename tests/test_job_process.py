"""`pipemax run-batch` as a process: a full disk, Ctrl-C from a terminal, and the end in order; what it leaves behind
and whom it lets in meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.executor.test_process import alive, descendants
from tests.faults.small_job import ENGINE, line, results, save_model

NUM_ROWS = 120
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def flags(engine: dict[str, Any]) -> list[str]:
    return [word for name, value in engine.items() for word in ("--" + name.replace("_", "-"), str(value))]


def start(folder: Path, model: Path, *more: str, largest_file_bytes: int | None = None) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell does it."""

    def limit() -> None:
        if largest_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))

    (folder / "tmp").mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-c",
        "import sys; from pipemax.cli import main; sys.exit(main())",
        "run-batch",
        "-i",
        str(folder / "in.jsonl"),
        "-o",
    ]
    return subprocess.Popen(
        [*command, str(folder / "out.jsonl"), "--model", str(model), *flags(ENGINE), *more],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
        start_new_session=True,
        preexec_fn=limit,
    )


def listening(pids: list[int]) -> list[str]:
    """Local addresses, as the kernel writes them, on which these processes listen."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(descriptor))
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp"):
        for entry in Path(table).read_text().splitlines()[1:]:
            words = entry.split()
            if f"socket:[{words[9]}]" in inodes and (words[3] == "0A" or table.endswith("udp")):
                found.append(words[1])
    return found


def shared_memory(pids: list[int]) -> list[str]:
    """Named shared memory that these processes have mapped, and that would stay if they were killed now."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found += [text for text in maps if "/dev/shm/" in text and not text.endswith("(deleted)")]
    return found


@pytest.mark.timeout(240)
def test_a_job_that_meets_a_full_disk_and_a_ctrl_c(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    rows = [
        line(f"row-{n}", "/v1/completions", {"prompt": f"fox {n}", "max_tokens": 40, "ignore_eos": True})
        for n in range(NUM_ROWS)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    output = tmp_path / "out.jsonl"

    # A disk that is full after some rows, even in the middle of one.
    with start(tmp_path, model, largest_file_bytes=8000) as job:
        said = job.communicate()[1]
    assert job.returncode == 3 and said.splitlines()[-1] == f"pipemax: error: {output}: File too large", said
    first = results(output)
    assert 5 < len(first) < 40 and output.read_bytes().endswith(b"\n")
    assert list((tmp_path / "tmp").iterdir()) == []

    # There is room again. Ctrl-C, which the terminal sends to every process of the job.
    with start(tmp_path, model) as job:
        family: list[int] = []
        while len(results(output)) < len(first) + 10 and job.poll() is None:
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGSTOP)  # looking at it takes longer than its rows do on a fast machine
        family = [job.pid, *descendants(job.pid)]
        assert len(family) >= 4  # the control plane, a fork server, two stages
        addresses, segments = listening(family), shared_memory(family)
        os.killpg(job.pid, signal.SIGINT)
        os.killpg(job.pid, signal.SIGCONT)
        said = job.communicate()[1]
    assert job.returncode == 130 and said.splitlines()[-1] == "pipemax: error: interrupted", said
    assert "rows in flight may finish" in said and "the same command goes on" in said
    assert addresses and {address.split(":")[0] for address in addresses} <= set(LOOPBACK)
    assert segments == []
    deadline = time.monotonic() + 10
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(family) == [] and list((tmp_path / "tmp").iterdir()) == []
    second = results(output)
    assert len(first) + 10 <= len(second) < NUM_ROWS and first.items() <= second.items()

    # The rest, in order.
    with start(tmp_path, model, "--preserve-order") as job:
        said = job.communicate()[1]
    assert job.returncode == 0, said
    assert second.items() <= results(output).items()
    assert [json.loads(text)["custom_id"] for text in output.read_text().splitlines()] == [
        f"row-{n}" for n in range(NUM_ROWS)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "model", "out.job.json", "out.jsonl", "tmp"]


@pytest.mark.timeout(120)
def test_a_killed_job_leaves_no_temporary_folder(tmp_path: Path) -> None:
    """kill -9 while its stages connect, when there are the most of them; and once rows are done."""
    model = save_model(tmp_path / "model")
    rows = [
        line(f"row-{n}", "/v1/completions", {"prompt": f"fox {n}", "max_tokens": 60, "ignore_eos": True})
        for n in range(400)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    temporary = tmp_path / "tmp"
    moments = {
        "connecting": lambda: list(temporary.glob("*/pipemax-*/rendezvous")),
        "answering": lambda: results(tmp_path / "out.jsonl"),
    }
    for moment, has_come in moments.items():
        with start(tmp_path, model) as job:
            while not has_come() and job.poll() is None:
                time.sleep(0.002)
            assert list(temporary.iterdir()) != [], moment
            family = [job.pid, *descendants(job.pid)]
            job.kill()
        deadline = time.monotonic() + 20
        while (alive(family) or list(temporary.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert alive(family) == [] and list(temporary.iterdir()) == [], moment
