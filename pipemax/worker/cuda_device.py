"""`CudaDevice`: one GPU, with copy streams beside the stream that computes.

Nothing here waits for the GPU, but the readers of marks and stopwatches, which belong on a thread of their own
(`stage_process.py`), and `close`.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pipemax.worker.block_copy import BlockCopier, CopyMethod, open_copier
from pipemax.worker.device import BlockRuns, CopyMark, CopyStream, Event, Mark, Stopwatch
from pipemax.worker.host_memory import HostMemory

# Event times are float32 milliseconds since another event: after ten seconds they are right to a microsecond. The GPU's
# clock and the host's drift apart by some parts in a million, a second over a night.
_REBASE_SECONDS = 10.0


class CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.wait()


class CudaCopyStream:
    """A CUDA stream for block copies. Home memory has to be registered."""

    def __init__(self, device: torch.device, copier: BlockCopier, clock: _CudaClock) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copier = copier
        self._clock = clock

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)

    def copy_blocks(self, destination: Tensor, source: Tensor, runs: BlockRuns) -> None:
        self._copier.copy(self._stream, [(destination, source)], runs)

    def copy_layers(self, pairs: Sequence[tuple[Tensor, Tensor]], runs: BlockRuns) -> None:
        self._copier.copy(self._stream, pairs, runs)

    def mark(self) -> CopyMark:
        return CudaCopyMark(self._clock, self._stream)

    def record(self) -> Event:
        return CudaEvent(self._stream.record_event())

    def close(self) -> None:
        self._stream.synchronize()


class CudaStopwatch:
    def __init__(self) -> None:
        self._intervals: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        self._intervals.append((first, last))

    def stop(self) -> None:
        self._intervals[-1][1].record()

    def seconds(self) -> float:
        total_milliseconds = 0.0
        for first, last in self._intervals:
            last.synchronize()
            total_milliseconds += first.elapsed_time(last)
        return total_milliseconds / 1e3


class _CudaClock:
    """Places events of one GPU on the monotonic clock, by their distance from an event whose time is known.

    An event is seen by a thread that waits for it a moment after it passed, and never before: what the shortest such
    delay of the last seconds has changed by is drift.
    """

    def __init__(self) -> None:
        self._base = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._base.record()
        self._base.synchronize()
        self._base_seconds = time.monotonic()
        self._least_delay_seconds = math.inf
        self._lock = threading.Lock()

    def seconds(self, event: torch.cuda.Event) -> float:
        event.synchronize()
        seen_seconds = time.monotonic()
        with self._lock:
            seconds: float = self._base_seconds + self._base.elapsed_time(event) / 1e3
            self._least_delay_seconds = min(self._least_delay_seconds, seen_seconds - seconds)
            if seconds - self._base_seconds > _REBASE_SECONDS:
                self._base, self._base_seconds = event, seconds + self._least_delay_seconds
                self._least_delay_seconds = math.inf
        return seconds


class CudaMark:
    def __init__(self, clock: _CudaClock) -> None:
        self._clock = clock
        # Blocking: a thread that waits for it sleeps.
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def seconds(self) -> float:
        return self._clock.seconds(self._event)


class CudaCopyMark:
    def __init__(self, clock: _CudaClock, stream: torch.cuda.Stream) -> None:
        self._clock = clock
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def passed_seconds(self) -> float | None:
        passed: bool = self._event.query()  # type: ignore[no-untyped-call]
        return self._clock.seconds(self._event) if passed else None


class CudaDevice:
    """Compute is the current stream of one GPU."""

    def __init__(self, index: int, *, copy_method: CopyMethod | None = None) -> None:
        """`copy_method` None: what the environment says (`block_copy.py`). Raises ConfigError."""
        self._torch_device = torch.device("cuda", index)
        self._copy_method = copy_method
        # Streams share hardware queues, eight by default: one stream's wait then holds up another.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        # Steps of many sizes leave no holes that nothing fits in: what one step needed is enough for all.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(self._torch_device)
        self._clock = _CudaClock()
        self._homes: list[HostMemory] = []

    @property
    def torch_device(self) -> torch.device:
        return self._torch_device

    def copy_stream(self, name: str) -> CopyStream:
        return CudaCopyStream(self._torch_device, open_copier(self._copy_method), self._clock)

    def record_compute(self) -> Event:
        return CudaEvent(torch.cuda.current_stream().record_event())

    def stopwatch(self) -> Stopwatch:
        return CudaStopwatch()

    def mark(self) -> Mark:
        return CudaMark(self._clock)

    def allocate_home(self, num_bytes: int) -> Tensor:
        self._homes.append(HostMemory(num_bytes))
        return self._homes[-1].tensor

    def close(self) -> None:
        """Waits for the GPU and unregisters homes."""
        torch.cuda.synchronize(self._torch_device)
        while self._homes:
            self._homes.pop().close()
