"""Output tokens per second of PipeMax against Transformers' continuous batching, on one GPU, with random weights.

    python benchmarks/generate_batch.py --model benchmarks/model_configs/Llama-3.1-8B \\
        --dataset-path benchmarks/workloads/sharegpt_256.csv --num-prompts 128 --output-json out.json

The same lengths for both, every request to its own output length, greedy, no end token. Requests are handed over all at
once, after loading and a warm-up. Both engines run one after the other, Transformers in a process of its own, so that
each has the GPU to itself. Weights and prompt tokens are drawn anew for each, which changes no amount of work.
Transformers is told each output length beforehand, PipeMax is not.

`generate_batch` has one output length for all requests, so its manager is driven here as it drives it, with one each.
Attention is "paged|sdpa" unless told otherwise, which is what Transformers has without the flash-attn package; with
that, "paged|flash_attention_2" is there too. Everything else is the library's default, or as given as JSON:

    --transformers-settings '{"max_batch_tokens": 2048}'      fields of ContinuousBatchingConfig
    --pipemax-settings '{"max_num_seqs": 512}'                fields of EngineConfig

On a CPU, Transformers needs psutil and num_blocks; otherwise it takes nearly all memory for its cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from pipemax.bench import LengthPair, read_lengths, run_throughput
from pipemax.report.job_record import RecordWishes

WARM_UP = [LengthPair(16, 8)] * 8
PACKAGES = ["torch", "transformers", "flashinfer-python", "flash-attn", "pipemax"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersWork:
    """What the process of Transformers is to do. `settings`: of its ContinuousBatchingConfig."""

    model: Path
    lengths: Sequence[LengthPair]
    device: str
    dtype: str
    attention: str
    settings: dict[str, Any]


def run_transformers(work: TransformersWork) -> dict[str, Any]:
    """Seconds of all requests, and how the library has set itself up. Raises RuntimeError when a request fails."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    load_started_seconds = time.monotonic()
    config = AutoConfig.from_pretrained(work.model)
    make_model: Any = AutoModelForCausalLM.from_config
    make_generation_config: Any = GenerationConfig
    with torch.device(work.device):
        model = make_model(config, dtype=getattr(torch, work.dtype), attn_implementation=work.attention).eval()
    prompts = random_prompts(work.lengths, config.vocab_size)
    with model.continuous_batching_context_manager(
        generation_config=make_generation_config(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**work.settings),
        workload_hints=WorkloadHints(
            max_prompt_length=max(row.prompt_tokens for row in work.lengths),
            max_generated_length=max(row.output_tokens for row in work.lengths),
            num_requests=len(work.lengths),
        ),
        block=True,
        timeout=5,
    ) as manager:
        generate_all(manager, random_prompts(WARM_UP, config.vocab_size), WARM_UP)
        load_seconds = time.monotonic() - load_started_seconds
        started_seconds = time.monotonic()
        generate_all(manager, prompts, work.lengths)
        wall_seconds = time.monotonic() - started_seconds
        resolved = vars(manager.continuous_batching_config)
    return {
        "wall_seconds": wall_seconds,
        "load_seconds": load_seconds,
        "attention": work.attention,
        "settings": {name: value for name, value in resolved.items() if isinstance(value, int | float | str | tuple)},
    }


def generate_all(manager: Any, prompts: Sequence[list[int]], lengths: Sequence[LengthPair]) -> None:
    """Hands all requests to the running manager and waits for the last."""
    num_tokens_of: dict[str, int] = {}
    for prompt, row in zip(prompts, lengths, strict=True):
        request_id = manager.add_request(prompt, max_new_tokens=row.output_tokens, eos_token_id=-1)
        num_tokens_of[request_id] = row.output_tokens
    while num_tokens_of:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError(f"Transformers gave up with {len(num_tokens_of)} requests to go; see above")
            continue
        if not result.is_finished():
            continue
        expected = num_tokens_of.pop(result.request_id)
        if result.error is not None or len(result.generated_tokens) != expected:
            raise RuntimeError(
                f"Transformers gave {len(result.generated_tokens)} of {expected} tokens of {result.request_id}: "
                f"{result.error}"
            )


def random_prompts(lengths: Sequence[LengthPair], vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, row.prompt_tokens).tolist() for row in lengths]


def package_versions() -> dict[str, str | None]:
    """None: not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with a config.json; weights are random")
    parser.add_argument("--dataset-path", type=Path, required=True, help="CSV with prompt_tokens and output_tokens")
    parser.add_argument("--num-prompts", type=int, help="of the CSV's first rows; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--attention", default="paged|sdpa", help="attn_implementation of Transformers")
    parser.add_argument("--transformers-settings", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--pipemax-settings", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--output-json", type=Path)
    arguments = parser.parse_args()
    lengths = read_lengths(arguments.dataset_path, num_prompts=arguments.num_prompts)
    output_tokens = sum(row.output_tokens for row in lengths)

    work = TransformersWork(
        model=arguments.model,
        lengths=lengths,
        device=arguments.device,
        dtype=arguments.dtype,
        attention=arguments.attention,
        settings=arguments.transformers_settings,
    )
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other_process:
        transformers = other_process.submit(run_transformers, work).result()
    transformers["output_tokens_per_second"] = output_tokens / transformers["wall_seconds"]
    print(f"Transformers: {transformers['wall_seconds']:.2f} s", flush=True)
    pipemax = run_throughput(
        dataset_path=arguments.dataset_path,
        num_prompts=arguments.num_prompts,
        length_hints=False,
        output_json=None,
        wishes=RecordWishes(),
        engine_settings={
            "model": str(arguments.model),
            "device": arguments.device,
            "dtype": arguments.dtype,
            "load_format": "dummy",
            **arguments.pipemax_settings,
        },
        stdout=sys.stdout,
    )
    report = {
        "requests": len(lengths),
        "prompt_tokens": sum(row.prompt_tokens for row in lengths),
        "output_tokens": output_tokens,
        "seconds": {"transformers": transformers["wall_seconds"], "pipemax": pipemax["wall_seconds"]},
        "output_tokens_per_second": {
            "transformers": transformers["output_tokens_per_second"],
            "pipemax": pipemax["output_tokens_per_second"],
        },
        "ratio": pipemax["output_tokens_per_second"] / transformers["output_tokens_per_second"],
        "environment": pipemax["environment"],
        "versions": package_versions(),
        "command": shlex.join(["python", *sys.argv]),
        "transformers": transformers,
        "pipemax": pipemax,
    }
    for name, rate in report["output_tokens_per_second"].items():
        print(f"{name:14s} {rate:10.1f} output tokens/s")
    print(f"PipeMax is {report['ratio']:.2f} times as fast")
    if arguments.output_json is not None:
        arguments.output_json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
