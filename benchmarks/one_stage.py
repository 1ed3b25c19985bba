"""One stage in this process, with dummy weights, and decode steps for it: what `stage_step.py` times."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipemax.attention.base import AttentionBackend
from pipemax.config import LoadFormat
from pipemax.cuda_options import CudaOptions
from pipemax.plan import BlockCopies, NewRequest, Phase, StepPlan
from pipemax.request import SamplingParams
from pipemax.worker import gpu_stage
from pipemax.worker.cuda_device import CudaDevice
from pipemax.worker.decode_graphs import DecodeGraphs
from pipemax.worker.kv_store import KVStore
from pipemax.worker.stage_model import StageModel, StageSlice
from pipemax.worker.stage_worker import StageWorker
from pipemax.worker.transfer import layers_per_copy
from pipemax.worker.transport import StageLinks

IntArray = NDArray[np.int_]

BLOCK_SIZE = 16
TOKENS_BEFORE_CHUNK = 200
NOTHING = BlockCopies(np.empty(0, np.int32), np.empty(0, np.int32))


def keys_of_rows(num_rows: int, *, mean: int, ragged: bool) -> IntArray:
    """int [num_rows]; ragged: from a tenth of the mean to nearly twice, in random order."""
    if not ragged or num_rows == 1:
        return np.full(num_rows, mean)
    return np.random.default_rng(0).permutation(np.linspace(0.1 * mean, 1.9 * mean, num_rows).astype(int))


class OneStage:
    """All layers of a model, or the first `num_layers` of them, and KV memory for `num_slots` blocks, a window of
    `num_window_slots` behind these, and a scratch slot."""

    def __init__(self, model: Path, *, num_layers: int | None, num_slots: int, num_window_slots: int) -> None:
        self.device = CudaDevice(0)
        self.num_slots, self.num_window_slots = num_slots, num_window_slots
        self.num_homes = 512 + num_window_slots
        with TemporaryDirectory() as folder:
            config = json.loads((model / "config.json").read_text())
            config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
            (Path(folder) / "config.json").write_text(json.dumps(config))
            self.stage = StageSlice(0, 1, range(config["num_hidden_layers"]))
            self.model = StageModel.load(
                model_dir=Path(folder),
                stage=self.stage,
                load_format=LoadFormat.DUMMY,
                dtype="bfloat16",
                device=self.device.torch_device,
                seed=0,
                trust_remote_code=False,
            )
        self.store = KVStore(
            geometry=self.model.spec.kv_geometry(block_size=BLOCK_SIZE, dtype_bytes=2),
            layers=self.stage.layers,
            num_device_blocks=self.scratch_slot + 1,
            num_host_blocks=self.num_homes,
            dtype=torch.bfloat16,
            device=self.device.torch_device,
            allocate_home=self.device.allocate_home,
            layers_per_copy=layers_per_copy(self.device.torch_device),
        )
        self._next_request = self._next_step = 0

    @property
    def scratch_slot(self) -> int:
        return self.num_slots + self.num_window_slots

    def prepare(
        self, backend: AttentionBackend, options: CudaOptions, *, most_rows: int, most_keys: int
    ) -> DecodeGraphs | None:
        """As a stage process prepares itself, with decode graphs where they can be."""
        gpu_stage.use_fast_paths(self.model, options, max_model_len=most_keys, max_num_seqs=most_rows)
        gpu_stage.run_largest_step(self.model, num_tokens=most_rows, num_rows=most_rows)
        return gpu_stage.capture_decode(
            self.model,
            backend,
            options,
            pools=self.store,
            scratch_slot=self.scratch_slot,
            block_size=BLOCK_SIZE,
            max_num_seqs=most_rows,
        )

    def worker(self, **settings: Any) -> StageWorker:
        """`settings`: backend and decode graphs."""
        return StageWorker(
            stage=self.stage,
            model=self.model,
            device=self.device,
            pools=self.store,
            block_size=BLOCK_SIZE,
            links=StageLinks(stage=0, num_stages=1, rendezvous=Path("unused")),
            **settings,
        )

    def steps(
        self, *, keys: IntArray, num_steps: int, chunk: int = 0, num_homed: int = 0, num_refilled: int = 0
    ) -> list[StepPlan]:
        """Plans of steps of decode rows with `keys` keys each (int [rows], counted before the first step).

        `chunk`: new tokens of one more row, with some before them, the same in each step. After each step as many
        blocks go home and come back to the window.
        """
        new_tokens = np.ones(len(keys) + bool(chunk), np.int32)
        if chunk:
            keys = np.append(keys, TOKENS_BEFORE_CHUNK + chunk)
            new_tokens[-1] = chunk
        advance = (new_tokens == 1).astype(int)
        num_rows = len(keys)
        request_ids = np.arange(self._next_request, self._next_request + num_rows, dtype=np.int64)
        self._next_request += num_rows
        most_blocks = -(-(keys + num_steps) // BLOCK_SIZE)
        random = np.random.default_rng(num_rows)
        slots = np.split(random.permutation(self.num_slots)[: most_blocks.sum()], np.cumsum(most_blocks)[:-1])
        sampling = SamplingParams(temperature=0.0, max_tokens=num_steps + 1)
        plans = []
        for turn in range(num_steps):
            now = keys + turn * advance
            num_blocks = -(-now // BLOCK_SIZE)
            homes = random.permutation(self.num_homes).astype(np.int32)
            homed, refilled = homes[:num_homed], homes[num_homed : num_homed + num_refilled]
            window = self.num_slots + random.permutation(self.num_window_slots).astype(np.int32)
            news = (
                tuple(
                    NewRequest(i, np.zeros(length + 1, np.int32), sampling, 0, ())
                    for i, length in zip(request_ids.tolist(), keys.tolist(), strict=True)
                )
                if turn == 0
                else ()
            )
            indices = np.concatenate([row[:count] for row, count in zip(slots, num_blocks, strict=True)])
            plans.append(
                StepPlan(
                    step_id=self._next_step,
                    batch_id=0,
                    phase=Phase.MIXED if chunk else Phase.DECODE,
                    request_ids=request_ids,
                    num_computed_tokens=(now - new_tokens).astype(np.int32),
                    num_new_tokens=new_tokens,
                    samples=new_tokens == 1,
                    block_table_indptr=np.concatenate([[0], np.cumsum(num_blocks)]).astype(np.int32),
                    block_table_indices=indices.astype(np.int32),
                    write_home=BlockCopies(indices[:num_homed].astype(np.int32), homed) if num_homed else NOTHING,
                    refill=BlockCopies(window[:num_refilled], refilled) if num_refilled else NOTHING,
                    new_requests=news,
                    finished_request_ids=(),
                    sampled_through_step=self._next_step - 1,
                )
            )
            self._next_step += 1
        return plans
