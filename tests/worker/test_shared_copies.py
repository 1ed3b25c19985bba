"""Layers that share their copies keep the same order: the race of `test_transfer.py`, two and three layers a copy."""

from __future__ import annotations

import random

import pytest

from pipemax.worker.transfer import TransferEngine
from tests.worker.test_transfer import LAYERS, Pools, QueuedDevice, Race, random_step


@pytest.mark.parametrize("layers_per_copy", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_random_plans_move_blocks_as_if_one_after_the_other(layers_per_copy, seed):
    draw = random.Random(seed)
    delays = {name: lambda: draw.choice([0.0, 0.0, 0.001, 0.004]) for name in ("home", "refill")}
    device, pools = QueuedDevice(delays), Pools()
    engine = TransferEngine(device=device, pools=pools, layers=LAYERS, layers_per_copy=layers_per_copy)
    try:
        race = Race(engine, device, pools, compute_seconds=0.0005)
        for step_id in range(40):
            race.step(*random_step(draw, step_id))
        race.finish()
    finally:
        engine.close()
