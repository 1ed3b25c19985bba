"""What a decode step of one stage costs, by number of rows and with each fast path on and off; prints JSON.

    python benchmarks/stage_step.py --model benchmarks/model_configs/Llama-3.1-8B > benchmarks/results/stage_step.json

One stage in this process, dummy weights, every row with the same number of keys. `step` is the time from the end of one
step to the end of the next, with steps issued ahead; `issue` what the thread needs to issue one for an idle GPU, which
must stay below it. While a variant is prepared the weights are there twice: of a 70B, `--layers 20`.
Each variant comes with and without blocks going home (a sixteenth of the rows a step, as in decode).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pipemax.attention.captured_plan import PLANS_VARIABLE, CapturedPlans, captured_plans
from pipemax.config import LoadFormat
from pipemax.cuda_options import AttentionChoice, CudaOptions
from pipemax.plan import BlockCopies, NewRequest, Phase, StepPlan
from pipemax.request import SamplingParams
from pipemax.worker import gpu_stage
from pipemax.worker.cuda_device import CudaDevice
from pipemax.worker.gemm_library import LIBRARY_VARIABLE, GemmLibrary, gemm_library
from pipemax.worker.kv_store import KVStore
from pipemax.worker.stage_model import StageModel, StageSlice
from pipemax.worker.stage_worker import StageWorker
from pipemax.worker.transfer import layers_per_copy
from pipemax.worker.transport import StageLinks

BLOCK_SIZE = 16
STEPS = 26
WARM_UP_STEPS = 6
ISSUE_STEPS = 8
NOTHING = BlockCopies(np.empty(0, np.int32), np.empty(0, np.int32))


class Decode:
    """Plans of one batch of `num_rows` rows with about `keys` keys each; request ids from `first_id` on."""

    def __init__(self, *, num_rows: int, keys: int, num_slots: int, num_homes: int, first_id: int, homes: bool) -> None:
        self._num_rows, self._keys = num_rows, keys
        self._ids = np.arange(first_id, first_id + num_rows, dtype=np.int64)
        blocks = -(-(keys + STEPS) // BLOCK_SIZE)
        self._slots = np.random.default_rng(0).permutation(num_slots)[: num_rows * blocks].reshape(num_rows, blocks)
        self._num_homes = num_homes
        self._homes = homes

    def plan(self, step_id: int, turn: int) -> StepPlan:
        computed = np.full(self._num_rows, self._keys - 1 + turn, np.int32)
        blocks = -(-(self._keys + turn) // BLOCK_SIZE)
        write_home = NOTHING
        if self._homes:
            count = max(1, self._num_rows // BLOCK_SIZE)
            homes = np.random.default_rng(step_id).permutation(self._num_homes)[:count].astype(np.int32)
            write_home = BlockCopies(self._slots[:count, turn % blocks].astype(np.int32), homes)
        prompt = np.zeros(self._keys, np.int32)
        sampling = SamplingParams(temperature=0.0, max_tokens=STEPS + 1)
        return StepPlan(
            step_id=step_id,
            batch_id=0,
            phase=Phase.DECODE,
            request_ids=self._ids,
            num_computed_tokens=computed,
            num_new_tokens=np.ones(self._num_rows, np.int32),
            samples=np.ones(self._num_rows, np.bool_),
            block_table_indptr=np.arange(0, self._num_rows * blocks + 1, blocks, dtype=np.int32),
            block_table_indices=self._slots[:, :blocks].astype(np.int32).reshape(-1),
            write_home=write_home,
            refill=NOTHING,
            new_requests=tuple(NewRequest(i, prompt, sampling, 0, ()) for i in self._ids.tolist()) if not turn else (),
            finished_request_ids=(),
            sampled_through_step=step_id - 1,
        )


def choose_paths(environment: dict[str, str]) -> None:
    """As a stage process with that environment would."""
    for variable, choice in ((LIBRARY_VARIABLE, gemm_library), (PLANS_VARIABLE, captured_plans)):
        os.environ.pop(variable, None)
        choice.cache_clear()
    os.environ.update(environment)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="of the model's; default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 128, 256, 512])
    parser.add_argument("--keys", type=int, default=450)
    parser.add_argument("--variants", nargs="+", help="of the names in this file; default: all")
    arguments = parser.parse_args()
    device = CudaDevice(0)
    most_rows = max(arguments.rows)
    with TemporaryDirectory() as folder:
        config = json.loads((arguments.model / "config.json").read_text())
        config["num_hidden_layers"] = arguments.layers or config["num_hidden_layers"]
        (Path(folder) / "config.json").write_text(json.dumps(config))
        stage = StageSlice(0, 1, range(config["num_hidden_layers"]))
        model = StageModel.load(
            model_dir=Path(folder),
            stage=stage,
            load_format=LoadFormat.DUMMY,
            dtype="bfloat16",
            device=device.torch_device,
            seed=0,
            trust_remote_code=False,
        )
    num_slots = most_rows * -(-(arguments.keys + STEPS) // BLOCK_SIZE) + 64
    store = KVStore(
        geometry=model.spec.kv_geometry(block_size=BLOCK_SIZE, dtype_bytes=2),
        layers=stage.layers,
        num_device_blocks=num_slots + 1,
        num_host_blocks=512,
        dtype=torch.bfloat16,
        device=device.torch_device,
        allocate_home=device.allocate_home,
        layers_per_copy=layers_per_copy(device.torch_device),
    )
    variants: dict[str, tuple[CudaOptions, dict[str, str]]] = {
        "transformers forward": (CudaOptions(fused_layers=False), {}),
        "own layers": (CudaOptions(cuda_graphs=False), {}),
        "own layers in graphs": (CudaOptions(), {}),
        "decode graphs": (CudaOptions(), {}),
        "decode graphs, default GEMM library": (CudaOptions(), {LIBRARY_VARIABLE: GemmLibrary.DEFAULT}),
        "decode graphs, planned each step": (CudaOptions(), {PLANS_VARIABLE: CapturedPlans.EACH_STEP}),
    }
    backend = gpu_stage.open_attention(model, AttentionChoice.FLASHINFER)
    results = []
    next_id = next_step = 0
    for name, (options, environment) in variants.items():
        if arguments.variants is not None and name not in arguments.variants:
            continue
        choose_paths(environment)
        started = time.monotonic()
        gpu_stage.use_fast_paths(model, options, max_model_len=arguments.keys + STEPS, max_num_seqs=most_rows)
        gpu_stage.run_largest_step(model, num_tokens=most_rows, num_rows=most_rows)
        decode_graphs = None
        if name.startswith("decode graphs"):
            decode_graphs = gpu_stage.capture_decode(
                model,
                backend,
                options,
                pools=store,
                scratch_slot=num_slots,
                block_size=BLOCK_SIZE,
                max_num_seqs=most_rows,
            )
        prepare_seconds = time.monotonic() - started
        for homes in (False, True):
            worker = StageWorker(
                stage=stage,
                model=model,
                device=device,
                pools=store,
                block_size=BLOCK_SIZE,
                backend=backend,
                links=StageLinks(stage=0, num_stages=1, rendezvous=Path("unused")),
                decode_graphs=decode_graphs,
            )
            for num_rows in arguments.rows:
                decode = Decode(
                    num_rows=num_rows,
                    keys=arguments.keys,
                    num_slots=num_slots,
                    num_homes=512,
                    first_id=next_id,
                    homes=homes,
                )
                next_id += num_rows
                issue_seconds, steps = [], []
                for turn in range(STEPS):
                    plan = decode.plan(next_step, turn)
                    next_step += 1
                    if turn >= STEPS - ISSUE_STEPS:
                        torch.cuda.synchronize()
                    began = time.monotonic()
                    steps += worker.run_step(plan)
                    issue_seconds.append(time.monotonic() - began)
                finished = np.array([step.report().finished_seconds for step in steps])
                step_seconds = np.diff(finished)[WARM_UP_STEPS:-ISSUE_STEPS]
                results.append(
                    {
                        "variant": name,
                        "homes": homes,
                        "rows": num_rows,
                        "keys_per_row": arguments.keys,
                        "issue_milliseconds": round(1e3 * statistics.median(issue_seconds[-ISSUE_STEPS:]), 3),
                        "step_milliseconds": round(1e3 * statistics.median(step_seconds), 3),
                        "prepare_seconds": round(prepare_seconds, 1),
                    }
                )
    print(json.dumps({"device": torch.cuda.get_device_name(0), "model": str(arguments.model), "results": results}))


if __name__ == "__main__":
    main()
