"""`describe_exit`: how a process ended, in words: by a code, by a signal, by the system's memory killer."""

from __future__ import annotations

import signal
from pathlib import Path


def memory_kills(root: Path = Path("/")) -> int | None:
    """Processes that the system's memory killer has ended since boot; None where the system does not tell."""
    try:
        fields = dict(line.split() for line in (root / "proc/vmstat").read_text().splitlines())
        return int(fields["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None


def describe_exit(code: int, *, memory_kills_before: int | None, memory_kills_now: int | None) -> str:
    """`code` as `multiprocessing` has it: negative for a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if code != -signal.SIGKILL:
        return f"was killed by {name}"
    if memory_kills_before is None or memory_kills_now is None:
        return f"was killed by {name} (out of memory?)"
    if memory_kills_now > memory_kills_before:
        return (
            f"was killed by {name}, and the system's memory killer was at work: lower host_memory_gib, or "
            "num_device_blocks where devices are host memory"
        )
    return f"was killed by {name}, not by the system's memory killer"
