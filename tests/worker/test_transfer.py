"""Copies beside compute, held against a sequential oracle: on the CPU, and with compute queued as on a GPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from pipemax.plan import CopyDirection, StepPlan
from pipemax.worker.copy_log import CopyLog
from pipemax.worker.device import BlockRuns, CopyError, CopyStream, CpuCopyStream, CpuDevice, CpuEvent, Event
from pipemax.worker.transfer import TransferEngine
from tests.executor.plans import Row, make_plan

LAYERS = range(2, 5)
NUM_SLOTS, NUM_HOMES = 10, 12


class Pools:
    """Small KV pools, every block with a value of its own."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self._device = {i: torch.rand(NUM_SLOTS, 2, 4, 1, 8, generator=generator).to(dtype) for i in LAYERS}
        self._home = {i: torch.rand(NUM_HOMES, 2, 4, 1, 8, generator=generator).to(dtype) for i in LAYERS}

    def device_pool(self, layer: int) -> Tensor:
        return self._device[layer]

    def home_pool(self, layer: int) -> Tensor:
        return self._home[layer]

    def copy_pools(self, layers: range) -> list[tuple[Tensor, Tensor]]:
        return [(self._device[layer], self._home[layer]) for layer in layers]


class SlowStream(CpuCopyStream):
    """Sleeps before each copy."""

    def __init__(self, name: str, delay_seconds: Callable[[], float]) -> None:
        super().__init__(name)
        self._delay_seconds = delay_seconds

    def copy_blocks(self, destination: Tensor, source: Tensor, runs: BlockRuns) -> None:
        delay = self._delay_seconds()
        self._unrecorded.append(lambda: time.sleep(delay))
        super().copy_blocks(destination, source, runs)


class SlowDevice(CpuDevice):
    """Compute in the caller's thread, copies late."""

    def __init__(self, delays: dict[str, Callable[[], float]]) -> None:
        self._delays = delays

    def copy_stream(self, name: str) -> CopyStream:
        return SlowStream(name, self._delays[name])

    def compute(self, work: Callable[[], None]) -> None:
        work()

    def finish(self) -> None:
        pass


class QueuedEvent:
    """To wait for it is one more piece of queued compute; nothing blocks the caller."""

    def __init__(self, event: Event, compute: CpuCopyStream) -> None:
        self.event = event
        self._compute = compute

    def wait(self) -> None:
        self._compute.wait(self.event)


class QueuedStream(SlowStream):
    def __init__(self, name: str, delay_seconds: Callable[[], float], compute: CpuCopyStream) -> None:
        super().__init__(name, delay_seconds)
        self._compute = compute

    def wait(self, event: Event) -> None:
        assert isinstance(event, QueuedEvent)
        super().wait(event.event)

    def record(self) -> Event:
        return QueuedEvent(super().record(), self._compute)


class QueuedDevice(SlowDevice):
    """Compute is a queue of its own that the caller runs ahead of, as on a GPU."""

    def __init__(self, delays: dict[str, Callable[[], float]]) -> None:
        super().__init__(delays)
        self._compute = CpuCopyStream("compute")

    def copy_stream(self, name: str) -> CopyStream:
        return QueuedStream(name, self._delays[name], self._compute)

    def record_compute(self) -> Event:
        return QueuedEvent(self._compute.record(), self._compute)

    def compute(self, work: Callable[[], None]) -> None:
        self._compute._unrecorded.append(work)

    def finish(self) -> None:
        """Waits for all compute; raises what failed in it."""
        self._compute.record().wait()


@contextmanager
def engine_on(device: SlowDevice, pools: Pools) -> Iterator[TransferEngine]:
    engine = TransferEngine(device=device, pools=pools, layers=LAYERS)
    try:
        yield engine
    finally:
        engine.close()


class Race:
    """Runs plans through an engine and, in plain order, through the oracle; compares at every step and at the end.

    A step's compute writes `written` slots with values that depend on step and layer.
    """

    def __init__(self, engine: TransferEngine, device: SlowDevice, pools: Pools, compute_seconds: float = 0.0) -> None:
        self._engine = engine
        self._device = device
        self._pools = pools
        self._compute_seconds = compute_seconds
        self._oracle_device = {layer: pools.device_pool(layer).clone() for layer in LAYERS}
        self._oracle_home = {layer: pools.home_pool(layer).clone() for layer in LAYERS}

    def step(self, plan: StepPlan, written: list[int]) -> None:
        self._engine.begin_step(plan)
        for layer in LAYERS if plan.num_rows else ():
            self._engine.enter(layer)
            seen = self._oracle_device[layer].clone(), self._oracle_home[layer].clone()
            self._oracle_device[layer][written] = plan.step_id + layer / 8
            self._device.compute(self._work(plan.step_id, layer, written, *seen))
            self._engine.leave(layer)
        for layer in LAYERS:
            device, home = self._oracle_device[layer], self._oracle_home[layer]
            home[plan.write_home.homes] = device[plan.write_home.slots]
            device[plan.refill.slots] = home[plan.refill.homes]
        self._engine.finish_step()

    def finish(self) -> None:
        self._engine.drain()
        self._device.finish()
        for layer in LAYERS:
            assert torch.equal(self._pools.device_pool(layer), self._oracle_device[layer])
            assert torch.equal(self._pools.home_pool(layer), self._oracle_home[layer])

    def _work(self, step: int, layer: int, written: list[int], device: Tensor, home: Tensor) -> Callable[[], None]:
        def work() -> None:
            time.sleep(self._compute_seconds)
            # Everything of the steps before has landed, on both sides.
            assert torch.equal(self._pools.device_pool(layer), device), f"device pool at step {step} layer {layer}"
            assert torch.equal(self._pools.home_pool(layer), home), f"home pool at step {step} layer {layer}"
            self._pools.device_pool(layer)[written] = step + layer / 8

        return work


def random_step(draw: random.Random, step_id: int) -> tuple[StepPlan, list[int]]:
    slots, homes = draw.sample(range(NUM_SLOTS), NUM_SLOTS), draw.sample(range(NUM_HOMES), NUM_HOMES)
    num_home, num_refill = draw.randint(0, 5), draw.randint(0, 5)
    plan = make_plan(
        step_id,
        [Row(0, 0, 1, [0])] if draw.random() < 0.7 else [],
        write_home=list(zip(slots[:num_home], homes[:num_home], strict=True)),
        refill=list(zip(slots[5 : 5 + num_refill], homes[5 : 5 + num_refill], strict=True)),
    )
    return plan, draw.sample(range(NUM_SLOTS), 3)


@pytest.mark.parametrize("device_class", [SlowDevice, QueuedDevice])
@pytest.mark.parametrize("seed", range(4))
def test_random_plans_move_blocks_as_if_one_after_the_other(device_class: type[SlowDevice], seed: int) -> None:
    draw = random.Random(seed)
    delays = {name: lambda: draw.choice([0.0, 0.0, 0.001, 0.004]) for name in ("home", "refill")}
    device, pools = device_class(delays), Pools()
    with engine_on(device, pools) as engine:
        race = Race(engine, device, pools, compute_seconds=0.0005)
        for step_id in range(40):
            race.step(*random_step(draw, step_id))
        race.finish()


ROWS = [Row(0, 0, 1, [0])]


def scenario(name: str, engine: TransferEngine, device: SlowDevice, pools: Pools) -> None:
    """Short sequences in which one order matters; copies of the direction in question are late."""
    race = Race(engine, device, pools, compute_seconds=0.01)
    if name == "home before the next compute":
        race.step(make_plan(0, ROWS, write_home=[(3, 5)]), [3])
        race.step(make_plan(1, ROWS), [3])
    elif name == "refill before the next compute":
        race.step(make_plan(0, ROWS, refill=[(4, 6)]), [0])
        race.step(make_plan(1, ROWS), [0])
    elif name == "home before the next refill":
        race.step(make_plan(0, ROWS, write_home=[(3, 5)]), [3])
        race.step(make_plan(1, [], refill=[(7, 5)]), [])
    elif name == "refill before the next home":
        race.step(make_plan(0, ROWS, refill=[(4, 6)]), [0])
        race.step(make_plan(1, [], write_home=[(4, 8)]), [])
    else:
        assert name == "compute before copies"
        race.step(make_plan(0, ROWS, write_home=[(3, 5)], refill=[(4, 6)]), [3, 4])
        race.step(make_plan(1, [], write_home=[(3, 7)], refill=[(0, 5)]), [])
    race.finish()


FENCES = {
    "home before the next compute": "_compute_waits_for_home",
    "refill before the next compute": "_compute_waits_for_refill",
    "home before the next refill": "_refill_waits_for_home",
    "refill before the next home": "_home_waits_for_refill",
    "compute before copies": "_copies_wait_for_compute",
}


@pytest.mark.parametrize("name", FENCES)
@pytest.mark.parametrize("removed", [False, True])
def test_each_fence_is_needed(name: str, removed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scenario passes with the fence, and is caught without it."""
    late = {
        "home": lambda: 0.03 if name.startswith("home") else 0.0,
        "refill": lambda: 0.03 if name.startswith("refill") else 0.0,
    }
    device, pools = QueuedDevice(late), Pools()
    with engine_on(device, pools) as engine:
        if not removed:
            scenario(name, engine, device, pools)
            return
        monkeypatch.setattr(engine, FENCES[name], lambda *layer: None)
        with pytest.raises((AssertionError, CopyError)):
            scenario(name, engine, device, pools)


def test_copies_go_on_while_later_layers_compute_and_the_next_step_waits_for_them() -> None:
    device, pools = SlowDevice({"home": lambda: 0.0, "refill": lambda: 0.02}), Pools()
    with engine_on(device, pools) as engine:
        engine.begin_step(make_plan(0, ROWS, write_home=[(3, 5), (4, 6)], refill=[(7, 1)]))
        for layer in LAYERS:
            engine.enter(layer)
            engine.leave(layer)
        first = engine.finish_step()
        engine.begin_step(make_plan(1, ROWS))
        for layer in LAYERS:
            engine.enter(layer)
            engine.leave(layer)
        second = engine.finish_step()
    block_bytes = len(LAYERS) * 2 * 4 * 1 * 8 * 2
    assert (first.home_bytes, first.refill_bytes) == (2 * block_bytes, block_bytes)
    assert (second.home_bytes, second.refill_bytes) == (0, 0)
    # Three layers at 20 ms each come one after the other; the first step waited for none of them.
    assert first.window_wait_seconds == 0.0
    assert second.window_wait_seconds > 0.03


def test_copies_are_told_of_once_and_with_the_time_that_they_took() -> None:
    """Three layers at 20 ms each on one stream, while the other is done at once."""
    device, pools = SlowDevice({"home": lambda: 0.0, "refill": lambda: 0.02}), Pools()
    log = CopyLog()
    with engine_on(device, pools) as engine:
        began = time.monotonic()
        engine.begin_step(make_plan(7, ROWS, write_home=[(3, 5), (4, 6)], refill=[(7, 1)]))
        for layer in LAYERS:
            engine.enter(layer)
            engine.leave(layer)
        issued = engine.finish_step().copies
        log.add(issued)
        assert issued[0].direction is CopyDirection.REFILL and issued[0].timing() is None
        early = log.take_ended()
        engine.drain()
        ended = time.monotonic()
        late = log.take_ended()
        assert log.take_ended() == ()
        # A step without copies has none to tell of.
        engine.begin_step(make_plan(8, []))
        assert engine.finish_step().copies == ()
    block_bytes = len(LAYERS) * 2 * 4 * 1 * 8 * 2
    times = {copy.direction: copy for copy in (*early, *late)}
    assert len(times) == len(early) + len(late) == 2 and CopyDirection.REFILL in {copy.direction for copy in late}
    refill, home = times[CopyDirection.REFILL], times[CopyDirection.HOME]
    assert (refill.step_id, refill.num_blocks, refill.num_bytes) == (7, 1, block_bytes)
    assert (home.step_id, home.num_blocks, home.num_bytes) == (7, 2, 2 * block_bytes)
    assert began <= refill.start_seconds and refill.end_seconds <= ended
    assert refill.end_seconds - refill.start_seconds >= 0.06
    assert began <= home.start_seconds <= home.end_seconds <= ended


@pytest.mark.parametrize("layers_per_copy", [1, 2, 3])
def test_times_of_copies_cover_all_layers_however_they_share(layers_per_copy: int) -> None:
    device, pools = SlowDevice({"home": lambda: 0.01, "refill": lambda: 0.0}), Pools()
    engine = TransferEngine(device=device, pools=pools, layers=LAYERS, layers_per_copy=layers_per_copy)
    engine.begin_step(make_plan(0, [], write_home=[(3, 5)]))
    (issued,) = engine.finish_step().copies
    engine.drain()
    timing = issued.timing()
    assert timing is not None and timing.end_seconds - timing.start_seconds >= 0.01 * len(LAYERS)
    engine.close()


class FailingStream(CpuCopyStream):
    def copy_blocks(self, destination: Tensor, source: Tensor, runs: BlockRuns) -> None:
        def fail() -> None:
            raise OSError("no such page")

        self._unrecorded.append(fail)


@pytest.mark.parametrize("direction", ["home", "refill"])
def test_a_failed_copy_fails_the_next_step_at_its_layer(direction: str) -> None:
    class Device(CpuDevice):
        def copy_stream(self, name: str) -> CopyStream:
            return FailingStream(name) if name == direction else CpuCopyStream(name)

    engine = TransferEngine(device=Device(), pools=Pools(), layers=LAYERS)
    engine.begin_step(make_plan(0, ROWS, write_home=[(3, 5)], refill=[(4, 6)]))
    for layer in LAYERS:
        engine.enter(layer)
        engine.leave(layer)
    engine.finish_step()
    engine.begin_step(make_plan(1, ROWS))
    with pytest.raises(CopyError, match="no such page"):
        engine.enter(LAYERS.start)
    with pytest.raises(CopyError, match="no such page"):
        engine.drain()
    engine.close()


def test_a_stream_that_waits_for_a_failed_one_fails_with_the_same_cause() -> None:
    broken, other = FailingStream("home"), CpuCopyStream("refill")
    pool = torch.zeros(2, 4)
    broken.copy_blocks(pool, pool, BlockRuns.merge(np.array([0], np.int32), np.array([1], np.int32)))
    other.wait(broken.record())
    with pytest.raises(CopyError, match="no such page") as caught:
        other.record().wait()
    assert isinstance(caught.value.__cause__, OSError)
    broken.close()
    other.close()


@pytest.mark.parametrize(
    ("home", "refill", "what"),
    [
        ([(3, 5)], [(3, 6)], "refills a slot that it writes home"),
        ([(3, 5)], [(4, 5)], "refills from a home that it writes"),
        ([(NUM_SLOTS, 5)], [], "a slot of write_home is not in"),
        ([], [(0, -1)], "a home of refill is not in"),
        ([(1, 5), (2, 5)], [], "writes a home twice"),
        ([], [(1, 5), (1, 6)], "refills a slot twice"),
    ],
)
def test_a_plan_that_breaks_the_rules_is_refused(
    home: list[tuple[int, int]], refill: list[tuple[int, int]], what: str
) -> None:
    engine = TransferEngine(device=CpuDevice(), pools=Pools(), layers=LAYERS)
    with pytest.raises(AssertionError, match=what):
        engine.begin_step(make_plan(0, ROWS, write_home=home, refill=refill))
    engine.close()


def test_a_step_that_does_not_leave_every_layer_is_noticed() -> None:
    engine = TransferEngine(device=CpuDevice(), pools=Pools(), layers=LAYERS)
    engine.begin_step(make_plan(0, ROWS))
    engine.enter(2)
    engine.leave(2)
    with pytest.raises(AssertionError, match="a layer was not left"):
        engine.finish_step()
    engine.close()


@pytest.mark.parametrize("block_elements", [3, 16384])  # gathered, and copied run by run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_blocks_equals_indexing(block_elements: int, dtype: torch.dtype) -> None:
    draw = np.random.default_rng(0)
    for num_pairs in (1, 2, 9, 20):
        destinations = draw.permutation(20)[:num_pairs].astype(np.int32)
        sources = draw.integers(0, 30, num_pairs).astype(np.int32)
        sources[: num_pairs // 2] = np.arange(num_pairs // 2)
        destination, source = torch.rand(20, block_elements).to(dtype), torch.rand(30, block_elements).to(dtype)
        expected = destination.clone()
        expected[destinations] = source[sources]
        stream = CpuCopyStream("copies")
        stream.copy_blocks(destination, source, BlockRuns.merge(destinations, sources))
        stream.record().wait()
        stream.close()
        assert torch.equal(destination, expected)


def test_runs_are_as_long_as_both_sides_allow() -> None:
    destinations = np.array([7, 3, 4, 5, 6, 0], dtype=np.int32)
    sources = np.array([14, 10, 11, 20, 21, 9], dtype=np.int32)
    assert BlockRuns.merge(destinations, sources).slices() == [
        (slice(0, 1), slice(9, 10)),
        (slice(3, 5), slice(10, 12)),
        (slice(5, 7), slice(20, 22)),
        (slice(7, 8), slice(14, 15)),
    ]
    nothing = np.empty(0, dtype=np.int32)
    assert BlockRuns.merge(nothing, nothing).slices() == []


def test_an_event_passes_everyone_who_waits() -> None:
    event = CpuEvent()
    event.finish()
    event.wait()
    event.wait()
