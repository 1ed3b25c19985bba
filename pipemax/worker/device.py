"""Devices: streams of copies, events between them and compute, time measured on them.

Transfers and stage workers are written once against these few nouns and run on a CPU as on a GPU:

    compute   | work | record_compute -> a |              | b.wait: later work starts after b |
    stream               wait(a) | copy | copy | record -> b

On a CPU, compute is the caller's thread and a stream is one background thread with a queue; NumPy copies there, because
it lets go of the interpreter lock and starts no threads of its own. Here live ordering, copying of blocks and clocks.
Never here: which blocks to copy, or when (`transfer.py`).
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipemax.config import ConfigError
from pipemax.plan import Int32Array

# Below this mean size of a run, one gather and one scatter beat a Python loop over slices (measured: twice as fast at
# 8 KiB, equal at 16 KiB, half as fast at 24 KiB and more, where the second pass over memory costs more than the loop).
GATHER_BELOW_BYTES = 16 * 1024


class CopyError(RuntimeError):
    """A copy failed; whoever waits for it must not go on. The cause is chained."""


@dataclass(frozen=True, slots=True)
class BlockRuns:
    """Block copies, destination to source, as runs that are contiguous on both sides.

    destinations, sources   int32 [n]  block ids, paired, sorted by destination
    starts                  int64 [r+1] run i is the pairs [starts[i], starts[i+1])
    """

    destinations: Int32Array
    sources: Int32Array
    starts: np.ndarray[tuple[int], np.dtype[np.int64]]

    @classmethod
    def merge(cls, destinations: Int32Array, sources: Int32Array) -> BlockRuns:
        """Destinations must differ from each other, so their order is free."""
        order = np.argsort(destinations, kind="stable")
        destinations, sources = destinations[order], sources[order]
        breaks = np.flatnonzero((np.diff(destinations) != 1) | (np.diff(sources) != 1)) + 1
        starts = np.concatenate(([0], breaks, [len(destinations)])) if len(destinations) else np.zeros(1)
        return cls(destinations, sources, starts.astype(np.int64))

    def __len__(self) -> int:
        return len(self.destinations)

    def slices(self) -> list[tuple[slice, slice]]:
        """(destination, source) slice of each run."""
        runs = []
        for first, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            destination, source = int(self.destinations[first]), int(self.sources[first])
            runs.append(
                (slice(destination, destination + end - first), slice(source, source + end - first)),
            )
        return runs


class Event(Protocol):
    """A point that a stream's work, or compute, has to pass."""

    def wait(self) -> None:
        """Compute waits: what is issued from here on starts after the event. Raises CopyError if that work failed."""
        ...


class CopyMark(Protocol):
    """A point that a stream of copies passes."""

    def passed_seconds(self) -> float | None:
        """When it was passed, on this machine's monotonic clock; None: not yet. Does not block."""
        ...


class CopyStream(Protocol):
    """Copies in the order in which they were queued, beside compute. No call here blocks."""

    def wait(self, event: Event) -> None:
        """What is queued from here on starts after the event."""
        ...

    def copy_blocks(self, destination: Tensor, source: Tensor, runs: BlockRuns) -> None:
        """Queues destination[d] = source[s] for every pair. Pools [n, ...], contiguous, same dtype and block shape."""
        ...

    def copy_layers(self, pairs: Sequence[tuple[Tensor, Tensor]], runs: BlockRuns) -> None:
        """`copy_blocks` for several (destination, source) pools of one block shape, with the same blocks."""
        ...

    def mark(self) -> CopyMark:
        """The point after everything queued so far. To be followed by `record`."""
        ...

    def record(self) -> Event:
        """The event that everything queued so far is done."""
        ...

    def close(self) -> None:
        """Waits for what is queued and ends the stream. Never raises."""
        ...


class Stopwatch(Protocol):
    """Adds up intervals of compute time."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def seconds(self) -> float:
        """Sum of the intervals so far; blocks until compute has passed the last one."""
        ...


class Mark(Protocol):
    """A point that compute passes."""

    def seconds(self) -> float:
        """When it was passed, on this machine's monotonic clock; blocks until then."""
        ...


class Device(Protocol):
    """What a stage runs on."""

    @property
    def torch_device(self) -> torch.device: ...

    def copy_stream(self, name: str) -> CopyStream: ...

    def record_compute(self) -> Event:
        """The event that compute is done with everything issued so far."""
        ...

    def stopwatch(self) -> Stopwatch: ...

    def mark(self) -> Mark:
        """The point after everything issued so far."""
        ...

    def allocate_home(self, num_bytes: int) -> Tensor:
        """Host memory that copies of this device are fast from and to: uint8 [num_bytes], uninitialised."""
        ...


class CpuEvent:
    """Done, or failed with an error, once and for all."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None

    def finish(self, error: BaseException | None = None) -> None:
        self._error = error
        self._done.set()

    @property
    def has_passed(self) -> bool:
        """Done, and well."""
        return self._done.is_set() and self._error is None

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise CopyError(f"a block copy failed: {self._error!r}") from self._error


class CpuCopyMark:
    """Passed by the stream's thread, read by others."""

    def __init__(self) -> None:
        self._passed_seconds: float | None = None

    def be_passed(self) -> None:
        self._passed_seconds = time.monotonic()

    def passed_seconds(self) -> float | None:
        return self._passed_seconds


class CpuCopyStream:
    """A thread and its queue. After a failure the rest of the queue is skipped and every later event fails too.

    Work is handed to the thread when an event is recorded behind it: waking a thread costs more than queueing a copy.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[list[Callable[[], None]], CpuEvent] | None] = queue.SimpleQueue()
        self._unrecorded: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def wait(self, event: Event) -> None:
        if not (isinstance(event, CpuEvent) and event.has_passed):
            self._unrecorded.append(event.wait)

    def copy_blocks(self, destination: Tensor, source: Tensor, runs: BlockRuns) -> None:
        to, of = _rows(destination), _rows(source)
        assert to.shape[1] == of.shape[1]
        self._unrecorded.append(lambda: _copy_rows(to, of, runs))

    def copy_layers(self, pairs: Sequence[tuple[Tensor, Tensor]], runs: BlockRuns) -> None:
        for destination, source in pairs:
            self.copy_blocks(destination, source, runs)

    def mark(self) -> CopyMark:
        mark = CpuCopyMark()
        self._unrecorded.append(mark.be_passed)
        return mark

    def record(self) -> Event:
        event = CpuEvent()
        self._jobs.put((self._unrecorded, event))
        self._unrecorded = []
        return event

    def close(self) -> None:
        self.record()
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        error: BaseException | None = None
        while (batch := self._jobs.get()) is not None:
            jobs, event = batch
            try:
                for job in jobs if error is None else ():
                    job()
            except CopyError as failure:  # another stream's: keep its cause
                error = failure.__cause__
            except BaseException as failure:
                error = failure
            event.finish(error)


class CpuStopwatch:
    def __init__(self) -> None:
        self._started_seconds = 0.0
        self._sum_seconds = 0.0

    def start(self) -> None:
        self._started_seconds = time.monotonic()

    def stop(self) -> None:
        self._sum_seconds += time.monotonic() - self._started_seconds

    def seconds(self) -> float:
        return self._sum_seconds


@dataclass(frozen=True, slots=True)
class CpuMark:
    passed_seconds: float

    def seconds(self) -> float:
        return self.passed_seconds


class CpuDevice:
    """Compute in the caller's thread: what was issued is done."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def copy_stream(self, name: str) -> CopyStream:
        return CpuCopyStream(name)

    def record_compute(self) -> Event:
        event = CpuEvent()
        event.finish()
        return event

    def stopwatch(self) -> Stopwatch:
        return CpuStopwatch()

    def mark(self) -> Mark:
        return CpuMark(time.monotonic())

    def allocate_home(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)


def open_device(kind: str, *, index: int) -> Device:
    """The device of a stage; `kind` as `resolve_device` gives it."""
    if kind == "cpu":
        return CpuDevice()
    assert kind == "cuda"
    from pipemax.worker.cuda_device import CudaDevice

    return CudaDevice(index)


def resolve_device(requested: str, *, num_stages: int, stage_devices: tuple[int, ...] | None = None) -> str:
    """ "auto", "cpu" or "cuda" to "cpu" or "cuda".

    `stage_devices` are the GPUs that stages are to use, if given. Raises ConfigError when one of them is not there, or
    there are fewer GPUs than stages.
    """
    gpus = torch.cuda.device_count() if requested != "cpu" and torch.cuda.is_available() else 0
    if requested == "cpu" or (requested == "auto" and gpus == 0):
        return "cpu"
    if stage_devices is not None:
        for index in stage_devices:
            if not 0 <= index < gpus:
                raise ConfigError(f"stage_devices names GPU {index} and this machine shows {gpus}, counted from 0")
        return "cuda"
    if gpus < num_stages:
        raise ConfigError(
            f"pipeline_parallel_size {num_stages} needs {num_stages} GPUs and this machine shows {gpus}: "
            "lower it, or set device to cpu"
        )
    return "cuda"


def set_threads(num_threads: int) -> None:
    """CPU threads of this process's tensor operations. Call before the first one."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)


def _rows(pool: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """The pool's blocks as rows of bytes [n, block_bytes]; NumPy knows no bfloat16."""
    assert pool.is_contiguous() and pool.device.type == "cpu"
    rows: np.ndarray[tuple[int, int], np.dtype[np.uint8]] = pool.view(len(pool), -1).view(torch.uint8).numpy()
    return rows


def _copy_rows(
    destination: np.ndarray[tuple[int, int], np.dtype[np.uint8]],
    source: np.ndarray[tuple[int, int], np.dtype[np.uint8]],
    runs: BlockRuns,
) -> None:
    num_runs = len(runs.starts) - 1
    if num_runs > 1 and len(runs) * destination.shape[1] < num_runs * GATHER_BELOW_BYTES:
        destination[runs.destinations] = source[runs.sources]
        return
    for to, of in runs.slices():
        destination[to] = source[of]
