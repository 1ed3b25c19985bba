"""Ray Data on this machine: a job that loses an actor midway, and throughput against `pipemax run-batch`.

    python benchmarks/ray_data.py kill --json benchmarks/results/ray_data_kill.json
    python benchmarks/ray_data.py throughput --model models/SmolLM2-135M-Instruct --rows 200 --json ...

kill        20,000 rows of Parquet through a tiny model on two actors. One of them is killed (SIGKILL) when a quarter of
            the output files are there. Every row must be in the output exactly once, with the text that one `LLM`
            gives. Exits with 1 if not.
throughput  the same rows through `run-batch` and through one actor, in turns. Seconds from the model being loaded to
            the last row being in a file; the best of the repeats counts for each.

With --device cuda on GPUs. Rows draw at temperature 0.8 without seeds: ids make the draws the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCRIPT = "import sys; from pipemax.cli import main; sys.exit(main())"
SEED = 0
WORDS = ["sea", "bicycle", "tax", "chess", "bread", "night", "river", "stone", "paper", "light", "salt", "glass"]


def save_tiny_model(folder: Path) -> None:
    """Two small layers and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def rows(num_rows: int, max_tokens: int) -> list[dict[str, Any]]:
    """Prompts and lengths that differ."""
    return [
        {
            "id": f"row-{n}",
            "prompt": " ".join(WORDS[(n * step) % len(WORDS)] for step in range(1, 3 + n % 3)) + f" {n}",
            "max_tokens": max_tokens // 2 + n % (max_tokens // 2 + 1),
        }
        for n in range(num_rows)
    ]


def write_parquet(path: Path, table: list[dict[str, Any]], *, num_files: int) -> None:
    path.mkdir()
    size = -(-len(table) // num_files)
    for index in range(num_files):
        pq.write_table(pa.Table.from_pylist(table[index * size : (index + 1) * size]), path / f"{index:04}.parquet")


def write_jsonl(path: Path, table: list[dict[str, Any]]) -> None:
    with path.open("w") as file:
        for row in table:
            body = {"prompt": row["prompt"], "max_tokens": row["max_tokens"], "temperature": 0.8, "ignore_eos": True}
            line = {"custom_id": row["id"], "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def prepared(row: dict[str, Any]) -> dict[str, Any]:
    return {"sampling_params": {"max_tokens": row["max_tokens"], "temperature": 0.8, "ignore_eos": True}}


def finished(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "text": row["generated_text"], "num_tokens": row["num_generated_tokens"]}


def ray_job(source: Path, target: Path, ready: Path, args: argparse.Namespace, *, num_actors: int) -> None:
    """From Parquet to Parquet. Each actor that is ready writes the time into a file of the folder `ready`."""
    import ray.data

    from pipemax.ray import PipelineActor, PipeMaxEngineProcessorConfig, build_processor, processor

    class TimedActor(PipelineActor):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            (ready / str(os.getpid())).write_text(repr(time.time()))

    processor.PipelineActor = TimedActor
    config = PipeMaxEngineProcessorConfig(
        model_source=str(args.model),
        engine_kwargs={**engine(args), "seed": SEED},
        concurrency=num_actors,
        batch_size=args.batch_size,
        id_column="id",
    )
    step = build_processor(config, preprocess=prepared, postprocess=finished)
    dataset = ray.data.read_parquet(str(source), override_num_blocks=args.files)
    step(dataset).write_parquet(str(target))


def start_ray(args: argparse.Namespace) -> None:
    import ray
    from ray.data import DataContext

    # More than there are: what waits for a pipeline's cores are tasks that hardly need any.
    ray.init(num_cpus=8, include_dashboard=False, logging_level="ERROR")
    DataContext.get_current().enable_progress_bars = False


def engine(args: argparse.Namespace) -> dict[str, Any]:
    common = {"device": args.device, "max_num_seqs": args.max_num_seqs, "max_model_len": args.max_model_len}
    if args.device == "cpu":
        common |= {"dtype": "float32", "threads_per_stage": args.threads, "host_memory_gib": 0.5}
    return common


def read_output(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


# -- kill --------------------------------------------------------------------------------------------------------------


def kill(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    table = rows(args.rows, args.max_tokens)
    write_parquet(folder / "in", table, num_files=args.files)
    target, ready = folder / "out", folder / "ready"
    ready.mkdir()
    start_ray(args)
    victim: list[int] = []

    def kill_one() -> None:
        while len(list(target.glob("*.parquet"))) < args.files // 4:
            time.sleep(0.05)
        victim.append(int(sorted(ready.iterdir())[0].name))
        os.kill(victim[0], signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    start_seconds = time.monotonic()
    ray_job(folder / "in", target, ready, args, num_actors=2)
    seconds = time.monotonic() - start_seconds
    got = read_output(target)
    texts = expected_texts(table, args)
    ids = [row["id"] for row in got]
    wrong = [row["id"] for row in got if row["__inference_error__"] or row["text"] != texts[row["id"]]]
    return {
        "rows": len(table),
        "rows_out": len(got),
        "different_ids_out": len(set(ids) & {row["id"] for row in table}),
        "rows_with_another_text_than_one_llm": len(wrong),
        "actors": 2,
        "actors_started": len(list(ready.iterdir())),
        "killed_pid_gone": bool(victim) and not Path(f"/proc/{victim[0]}").exists(),
        "seconds": seconds,
    }


def expected_texts(table: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, str]:
    from pipemax.llm import LLM, GenerationRequest
    from pipemax.request import SamplingParams

    requests = (
        GenerationRequest(
            request_id=row["id"],
            prompt=row["prompt"],
            sampling_params=SamplingParams(**prepared(row)["sampling_params"]),
        )
        for row in table
    )
    with LLM(args.model, seed=SEED, **engine(args)) as llm:
        return {output.request_id: output.outputs[0].text for output in llm.stream(requests)}


# -- throughput --------------------------------------------------------------------------------------------------------


def throughput(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    table = rows(args.rows, args.max_tokens)
    write_parquet(folder / "in", table, num_files=args.files)
    write_jsonl(folder / "in.jsonl", table)
    start_ray(args)
    seconds: dict[str, list[float]] = {"run_batch": [], "ray": []}
    tokens = sum(row["max_tokens"] for row in table)
    for repeat in range(args.repeats):
        seconds["run_batch"].append(time_run_batch(folder, args))
        ready = folder / f"ready{repeat}"
        ready.mkdir()
        ray_job(folder / "in", folder / f"out{repeat}", ready, args, num_actors=1)
        target = folder / f"out{repeat}"
        last_write = max(file.stat().st_mtime for file in target.glob("*.parquet"))
        seconds["ray"].append(last_write - float(next(ready.iterdir()).read_text()))
        assert sorted(row["id"] for row in read_output(target)) == sorted(row["id"] for row in table)
        print(f"run-batch {seconds['run_batch'][-1]:.2f} s, Ray {seconds['ray'][-1]:.2f} s", file=sys.stderr)
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "rows": len(table),
        "output_tokens": tokens,
        "seconds": seconds,
        "output_tokens_per_second": {name: tokens / value for name, value in best.items()},
        "ray_to_run_batch": best["run_batch"] / best["ray"],
    }


def time_run_batch(folder: Path, args: argparse.Namespace) -> float:
    """Seconds from the model being loaded, as the job's own summary has them."""
    flags = [word for name, value in engine(args).items() for word in ("--" + name.replace("_", "-"), str(value))]
    command = [sys.executable, "-c", SCRIPT, "run-batch", "-i", str(folder / "in.jsonl"), "--overwrite"]
    command += ["-o", str(folder / "answers.jsonl"), "--model", str(args.model), "--seed", str(SEED), *flags]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    found = re.search(rf"{args.rows:,} rows answered, 0 failed, in ([\d,.]+) s", done.stderr)
    if done.returncode or not found:
        raise SystemExit(done.stderr)
    return float(found[1].replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "throughput"])
    parser.add_argument("--model", type=Path, help="default: a tiny one")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--files", type=int, default=40, help="Parquet files, and blocks of Ray")
    parser.add_argument("--batch-size", type=int, help="default: the processor's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a pipeline, on a CPU")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "what")}
    with tempfile.TemporaryDirectory(prefix="pipemax-ray-") as name:
        folder = Path(name)
        if args.model is None:
            args.model = folder / "model"
            save_tiny_model(args.model)
        args.model = args.model.resolve()  # Ray's workers run elsewhere
        report = {"kill": kill, "throughput": throughput}[args.what](args, folder)
    report["settings"] = settings
    report["cores"] = len(os.sched_getaffinity(0))
    report["python"] = platform.python_version()
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if args.json is not None:
        args.json.write_text(text)
    if args.what == "kill":
        exact = report["rows"] == report["rows_out"] == report["different_ids_out"]
        if not exact or report["rows_with_another_text_than_one_llm"] or report["actors_started"] < 3:
            raise SystemExit("not every row came out exactly once, or the kill missed")


if __name__ == "__main__":
    main()
