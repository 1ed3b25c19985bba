"""The process of a stage: loads, sets up, runs plans; ends with its parent.

    control pipe --> reader thread --> queue --> StageWorker.run_step --> report pipe
                        | end of file: the parent is gone or wants no more; the process ends at once
                                                 pulse thread: a beat a second --> report pipe

Here live the messages between a stage process and its executor, and the process's life. Never here: what a step does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from pipemax.attention.base import AttentionBackend
from pipemax.attention.reference import ReferenceAttention
from pipemax.config import ConfigError, LoadFormat
from pipemax.cuda_options import CudaOptions
from pipemax.head_place import HeadPlace
from pipemax.kv.geometry import KVGeometry
from pipemax.model_spec import ModelSpec
from pipemax.plan import StepPlan
from pipemax.settled_heap import settled_heap
from pipemax.worker.decode_graphs import DecodeGraphs
from pipemax.worker.device import Device, open_device, set_threads
from pipemax.worker.kv_store import KVStore
from pipemax.worker.link import LinkError
from pipemax.worker.link_probe import StepMessages, probe_links
from pipemax.worker.model_slice import read_config, resolve_dtype
from pipemax.worker.pulse import Pulse, dump_stacks_on_signal
from pipemax.worker.running_step import RunningStep
from pipemax.worker.stage_model import StageModel, StageSlice
from pipemax.worker.stage_worker import StageWorker
from pipemax.worker.start_up import StartUp, StartUpPart
from pipemax.worker.transfer import layers_per_copy
from pipemax.worker.transport import StageLinks, possible_media

_PACKAGE = Path(__file__).parents[1]
# With no plan at hand: for the message of a step that waits for one.
_LOOK_AGAIN_SECONDS = 0.0005


@dataclass(frozen=True, slots=True)
class StageLoaded:
    """The stage is connected and its weights are in place; memory for KV may now be divided."""

    block_bytes: int
    free_device_bytes: int | None


@dataclass(frozen=True, slots=True)
class StageReady:
    """The stage has its KV memory and waits for plans."""

    start_up: tuple[StartUpPart, ...]


@dataclass(frozen=True, slots=True)
class StageFailure:
    """Why a stage ends.

    `config_error`: the user's settings or files are at fault. `is_echo`: a link broke, so another stage failed before.
    """

    message: str
    traceback: str
    config_error: bool
    is_echo: bool


@dataclass(frozen=True, slots=True)
class KVSize:
    """Blocks of KV memory, the same on every stage."""

    num_device_blocks: int
    num_host_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """What a stage process has to know before it is sent anything. `environment` is the parent's.

    `max_num_seqs` and `max_num_batched_tokens` bound a step; a GPU's warm-up runs one of that size. `beat_seconds` is
    the time between two beats.
    """

    stage: StageSlice
    model_dir: Path
    rendezvous: Path
    device: str
    dtype: str
    load_format: LoadFormat
    trust_remote_code: bool
    seed: int
    max_model_len: int
    block_size: int
    num_threads: int
    environment: Mapping[str, str]
    max_num_seqs: int
    max_num_batched_tokens: int
    beat_seconds: float
    cuda: CudaOptions


class _Reports:
    """The report pipe, for several threads."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        with self._lock:
            self._pipe.send(message)


def run_stage_process(
    settings: StageSettings, control: Connection, report_pipe: Connection, stacks: Connection
) -> None:
    """Entry of a stage process: loads, takes its KV size, then runs plans until the control pipe ends.

    Messages on `control`: a KVSize, then StepPlans, pickled. On `report_pipe`: StageLoaded, StageReady, StageReports,
    StageBeats in between, or a StageFailure before the process ends with exit code 1. On `stacks`: text, on SIGUSR1.
    """
    os.environ.clear()
    os.environ.update(settings.environment)
    dump_stacks_on_signal(stacks)
    _quiet_process()
    reports, pulse = _Reports(report_pipe), Pulse()
    pulse.start_beating(reports.send, interval_seconds=settings.beat_seconds)
    set_threads(settings.num_threads)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_control, args=(control, inbox), name="control", daemon=True).start()
    try:
        _serve(settings, inbox, reports, pulse)
    except BaseException as error:
        _fail(error, reports)


def _fail(error: BaseException, reports: _Reports) -> NoReturn:
    """Says why and ends the process; from any thread."""
    failure = StageFailure(
        message=_why(error),
        traceback="".join(traceback.format_exception(error)),
        config_error=isinstance(error, ConfigError),
        is_echo=isinstance(error, LinkError),
    )
    with contextlib.suppress(OSError):
        reports.send(failure)
    # Without the interpreter's own end: other threads may be inside gloo or a copy.
    os._exit(1)


def _why(error: BaseException) -> str:
    """In one line as far as it can be; an error that says nothing is at least told with its place."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"{_first_sentence(error)}: lower gpu_memory_utilization, max_num_batched_tokens or max_num_seqs"
    if isinstance(error, ConfigError):
        return str(error)
    kind = type(error).__name__
    if str(error).strip():
        return f"{kind}: {error}"
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    if not own:
        return kind
    return f"{kind} at {Path(own[-1].filename).relative_to(_PACKAGE.parent)}:{own[-1].lineno}"


def _serve(settings: StageSettings, inbox: queue.SimpleQueue[bytes], reports: _Reports, pulse: Pulse) -> None:
    stage, start_up = settings.stage, StartUp(pulse)
    start_up.begin("opening its device")
    device = open_device(settings.device, index=settings.cuda.device_of_stage(stage.stage))
    start_up.use_device(device.torch_device)
    links = _connect(settings, device.torch_device, start_up)
    start_up.begin("loading weights")
    layers = f"layers {stage.layers.start} to {stage.layers.stop - 1}"
    with _shortage_told(
        f"{layers} and a step of {settings.max_num_batched_tokens} tokens",
        "raise pipeline_parallel_size, or lower max_num_batched_tokens",
    ):
        model = StageModel.load(
            model_dir=settings.model_dir,
            stage=stage,
            load_format=settings.load_format,
            dtype=settings.dtype,
            device=device.torch_device,
            seed=settings.seed,
            trust_remote_code=settings.trust_remote_code,
            max_model_len=settings.max_model_len,
        )
        if stage.is_first and stage.shares_head and device.torch_device.type == "cuda":
            start_up.begin("moving the embedding to host memory")
            model.move_embedding(device.allocate_home)
        backend, free_device_bytes = _prepare(settings, model, links, start_up)
    geometry = model.spec.kv_geometry(block_size=settings.block_size, dtype_bytes=model.dtype.itemsize)
    reports.send(StageLoaded(geometry.block_bytes(stage.layers), free_device_bytes))
    start_up.begin("waiting for the other stages to load")
    size = pickle.loads(inbox.get())
    assert isinstance(size, KVSize)
    start_up.begin("allocating KV memory")
    store = _allocate(size, geometry, stage.layers, model.dtype, device)
    start_up.begin("capturing decode steps")
    with _shortage_told("captured decode steps", "lower gpu_memory_utilization or num_device_blocks"):
        decode_graphs = _capture_decode(settings, model, backend, store, scratch_slot=size.num_device_blocks)
    worker = StageWorker(
        stage=stage,
        model=model,
        device=device,
        pools=store,
        block_size=settings.block_size,
        backend=backend,
        links=links,
        pulse=pulse,
        decode_graphs=decode_graphs,
    )
    reports.send(StageReady(start_up.end()))
    gc.collect()  # what loading has left may hold memory of the device
    with settled_heap():
        if device.torch_device.type == "cpu":
            _run_plans(worker, inbox, lambda step: reports.send(step.report()), pulse)
        else:
            _run_plans(worker, inbox, _start_reporter(reports), pulse)


def _connect(settings: StageSettings, device: torch.device, start_up: StartUp) -> StageLinks:
    """Links over the medium that serves this machine best."""
    stage = settings.stage
    start_up.begin("connecting to the other stages")
    common: dict[str, Any] = {
        "stage": stage.stage,
        "num_stages": stage.num_stages,
        "rendezvous": settings.rendezvous,
        "returns_halves": stage.head is HeadPlace.ENDS,
    }
    if stage.num_stages == 1:
        return StageLinks(**common)
    gpus = [settings.cuda.device_of_stage(number) for number in range(stage.num_stages)]
    links = {medium: StageLinks(**common, device=device, medium=medium) for medium in possible_media(device, gpus=gpus)}
    if len(links) == 1 and device.type == "cpu":
        return next(iter(links.values()))
    start_up.begin("measuring the links")
    config = read_config(
        settings.model_dir, load_format=settings.load_format, trust_remote_code=settings.trust_remote_code
    )
    probe = probe_links(
        links,
        stage=stage.stage,
        num_stages=stage.num_stages,
        messages=StepMessages.of_steps(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            hidden_size=ModelSpec.from_config(config).hidden_size,
            dtype=resolve_dtype(config, settings.dtype, device=device),
        ),
        device=device,
    )
    if stage.is_first:  # all have the same
        start_up.measured(probe)
    return links[probe.taken]


@contextlib.contextmanager
def _shortage_told(what: str, remedy: str) -> Iterator[None]:
    """When the GPU's memory runs out inside, that is a ConfigError which says what did not fit and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{what} do not fit on the GPU ({_first_sentence(error)}): {remedy}") from error


def _first_sentence(error: BaseException) -> str:
    """Of torch's message, which goes on for a paragraph."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")


def _allocate(size: KVSize, geometry: KVGeometry, layers: range, dtype: torch.dtype, device: Device) -> KVStore:
    """Raises ConfigError when memory that was free a moment ago is not to be had."""
    try:
        return KVStore(
            geometry=geometry,
            layers=layers,
            # On a GPU one more, for idle rows of captured steps.
            num_device_blocks=size.num_device_blocks + (device.torch_device.type == "cuda"),
            num_host_blocks=size.num_host_blocks,
            dtype=dtype,
            device=device.torch_device,
            allocate_home=device.allocate_home,
            layers_per_copy=layers_per_copy(device.torch_device),
        )
    except (MemoryError, OSError, RuntimeError) as error:  # torch.OutOfMemoryError and the CPU allocator's are the last
        blocks = f"{size.num_device_blocks:,} blocks on the device and {size.num_host_blocks:,} in host memory"
        raise ConfigError(
            f"KV memory for {blocks} cannot be had: lower num_device_blocks (or gpu_memory_utilization) or "
            f"host_memory_gib ({_first_sentence(error)})"
        ) from error


def _prepare(
    settings: StageSettings, model: StageModel, links: StageLinks, start_up: StartUp
) -> tuple[AttentionBackend, int | None]:
    """The stage's attention, and the bytes that its device has left for KV (None: it is host memory)."""
    if model.device.type == "cpu":
        return ReferenceAttention(model.device), None
    from pipemax.worker import gpu_stage

    start_up.begin("fast paths")
    backend = gpu_stage.open_attention(model, settings.cuda.attention_backend)
    most_rows = settings.max_num_seqs
    gpu_stage.use_fast_paths(model, settings.cuda, max_model_len=settings.max_model_len, max_num_seqs=most_rows)
    start_up.begin("a step of the largest size")
    gpu_stage.run_largest_step(
        model,
        num_tokens=max(most_rows, settings.max_num_batched_tokens),
        num_rows=most_rows,
        num_kept=links.kept_hidden,
    )
    free_bytes = gpu_stage.kv_bytes(
        model.device,
        num_layers=len(settings.stage.layers),
        gpu_memory_utilization=settings.cuda.gpu_memory_utilization,
    )
    return backend, free_bytes


def _capture_decode(
    settings: StageSettings, model: StageModel, backend: AttentionBackend, store: KVStore, *, scratch_slot: int
) -> DecodeGraphs | None:
    if model.device.type == "cpu":
        return None
    from pipemax.worker import gpu_stage

    return gpu_stage.capture_decode(
        model,
        backend,
        settings.cuda,
        pools=store,
        scratch_slot=scratch_slot,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
    )


def _start_reporter(reports: _Reports) -> Callable[[RunningStep], None]:
    """A thread that waits for the device, so that the thread which issues steps never does."""
    running: queue.SimpleQueue[RunningStep] = queue.SimpleQueue()

    def work() -> None:
        try:
            while True:
                reports.send(running.get().report())
        except BaseException as error:
            _fail(error, reports)

    threading.Thread(target=work, name="reporter", daemon=True).start()
    return running.put


def _run_plans(
    worker: StageWorker,
    inbox: queue.SimpleQueue[bytes],
    report_on: Callable[[RunningStep], None],
    pulse: Pulse,
) -> None:
    """Plans in order, each one's input awaited as soon as the plan is known. Ends only by an exception."""
    coming: deque[StepPlan] = deque()

    def take(message: bytes) -> None:
        coming.append(_as_plan(message))
        worker.expect_input(coming[-1])

    def take_all() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                take(inbox.get_nowait())

    while True:
        take_all()
        if coming:
            plan = coming.popleft()
            pulse.begin_step(plan.step_id)
            steps = worker.run_step(plan)
        elif (waiting := worker.waiting_step_id) is None:
            pulse.wait()
            take(inbox.get())
            continue
        elif worker.waiting_step_has_come():
            pulse.begin_step(waiting)
            steps = worker.finish_waiting_step()
        else:
            with contextlib.suppress(queue.Empty):
                take(inbox.get(timeout=_LOOK_AGAIN_SECONDS))
            continue
        for step in steps:
            report_on(step)


def _as_plan(message: bytes) -> StepPlan:
    plan = pickle.loads(message)
    assert isinstance(plan, StepPlan)
    return plan


def _read_control(control: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(control.recv_bytes())
    # The other end is closed: the executor shuts down, or its process was killed. What the main thread waits for will
    # never come, so nothing is asked of it.
    os._exit(0)


def _quiet_process() -> None:
    """Standard output belongs to the parent's user, Ctrl-C to the parent; a crash in native code leaves a traceback.

    SIGTERM is ignored too, since the fork server ignores it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    sys.stdout = sys.stderr
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
