"""A job of very many short rows through a tiny model on the CPU: does anything grow?

    python benchmarks/soak.py --rows 50000           minutes
    python benchmarks/soak.py --rows 1000000         the better part of an hour

Runs `pipemax run-batch` over two stages and looks every second at every process of the job: resident memory, open
files, threads; and at its temporary files. Writes the samples as JSON and as a picture, and exits with 1 if anything
went on growing after the first fifth of the rows. The input and the output files themselves grow, of course.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 1.0
# Resident memory may differ by this much from the first fifth to the end: allocators do not give back at once.
ALLOWED_GROWTH_MIB = 24.0
WARM_UP_SHARE = 0.2
NAMES = ("control plane", "fork server", "stage 0", "stage 1")


def save_model(folder: Path) -> None:
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


def write_rows(path: Path, num_rows: int) -> None:
    """Short completions; a third with random draws, some with penalties, logprobs or stop strings; 1 % bad lines."""
    rng = random.Random(1)
    with path.open("w") as file:
        for number in range(num_rows):
            body: dict[str, Any] = {"prompt": f"row {number:x}"[: rng.randint(3, 10)], "max_tokens": rng.randint(1, 5)}
            match rng.randrange(6):
                case 0 | 1:
                    body |= {"temperature": 0.8, "top_p": 0.9}
                case 2:
                    body |= {"temperature": 0, "repetition_penalty": 1.1, "logprobs": 2}
                case 3:
                    body |= {"temperature": 0, "stop": ["e", "zz"]}
                case _:
                    body["temperature"] = 0
            if rng.random() < 0.01:
                body["temperature"] = -1
            record = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(record) + "\n")


def family_of(pid: int) -> dict[str, int]:
    """Name to process id, as far as they run: the fork server is the job's child, stages are the server's."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(words[1]), []).append(int(stat.parent.name))
    found = {NAMES[0]: pid}
    for child in sorted(children.get(pid, [])):
        stages = sorted(children.get(child, []))
        if stages:
            found[NAMES[1]] = child
            found.update(zip(NAMES[2:], stages, strict=False))
    return found


def look_at(pid: int) -> dict[str, float] | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return {
            "resident_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
            "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
        }
    except OSError:
        return None


def sizes_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.lstat().st_size
        except OSError:
            continue
    return total


def count_lines(path: Path, position: int) -> tuple[int, int]:
    """Lines since the last look, and where that was."""
    if not path.exists():
        return 0, position
    with path.open("rb") as file:
        file.seek(position)
        data = file.read()
    return data.count(b"\n"), position + len(data)


def run(num_rows: int, folder: Path) -> list[dict[str, Any]]:
    model, output, temporary = folder / "model", folder / "out.jsonl", folder / "tmp"
    save_model(model)
    temporary.mkdir()
    write_rows(folder / "in.jsonl", num_rows)
    flags = (
        "--device cpu --dtype float32 -pp 2 --max-model-len 64 --block-size 4 --max-num-seqs 128 "
        "--num-device-blocks 900 --num-window-blocks 200 --host-memory-gib 0.02 --threads-per-stage 1 "
        "--error-threshold -1 --quiet"
    )
    command = [str(Path(sys.executable).with_name("pipemax")), "run-batch", "-i", str(folder / "in.jsonl")]
    command += ["-o", str(output), "--model", str(model), *flags.split()]
    samples: list[dict[str, Any]] = []
    done, positions = 0, [0, 0]
    started = time.monotonic()
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)}) as job:
        while job.poll() is None:
            time.sleep(SAMPLE_SECONDS)
            for index, path in enumerate((output, output.with_name("out.errors.jsonl"))):
                lines, positions[index] = count_lines(path, positions[index])
                done += lines
            processes = {name: look_at(pid) for name, pid in family_of(job.pid).items()}
            if done and all(processes.get(name) is not None for name in NAMES):
                samples.append(
                    {
                        "seconds": round(time.monotonic() - started, 1),
                        "rows": done,
                        "processes": processes,
                        "temporary_bytes": sizes_of(temporary),
                    }
                )
    assert job.returncode == 0, f"the job ended with {job.returncode}"
    for index, path in enumerate((output, output.with_name("out.errors.jsonl"))):
        done += count_lines(path, positions[index])[0]
    assert done == num_rows, f"{done} of {num_rows} rows have a result"
    return samples


def growth_of(samples: list[dict[str, Any]], num_rows: int) -> dict[str, dict[str, float]]:
    """How much each process's figures rose from the first fifth (its highest) to the last tenth (its mean)."""
    early = [one for one in samples if one["rows"] <= WARM_UP_SHARE * num_rows]
    late = samples[-max(1, len(samples) // 10) :]
    return {
        name: {
            figure: round(
                sum(one["processes"][name][figure] for one in late) / len(late)
                - max(one["processes"][name][figure] for one in early),
                2,
            )
            for figure in ("resident_mib", "open_files", "threads")
        }
        for name in NAMES
    }


def draw(samples: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for name in NAMES:
        axes.plot(
            [one["rows"] for one in samples],
            [one["processes"][name]["resident_mib"] for one in samples],
            label=name,
        )
    axes.set(xlabel="rows done", ylabel="resident memory, MiB", ylim=(0, None), title="Memory of a job of short rows")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for soak.json and soak.svg")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pipemax-soak-") as folder:
        samples = run(arguments.rows, Path(folder))
    growth = growth_of(samples, arguments.rows)
    arguments.results.mkdir(parents=True, exist_ok=True)
    record = {
        "rows": arguments.rows,
        "seconds": samples[-1]["seconds"],
        "rows_per_second": round(arguments.rows / samples[-1]["seconds"], 1),
        "growth_after_warm_up": growth,
        "allowed_growth_mib": ALLOWED_GROWTH_MIB,
        "temporary_bytes_highest": max(one["temporary_bytes"] for one in samples),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "samples": samples[:: max(1, len(samples) // 200)],
    }
    (arguments.results / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(samples, arguments.results / "soak.svg")
    for name, figures in growth.items():
        now = samples[-1]["processes"][name]
        print(f"{name:14} {now['resident_mib']:7.1f} MiB, {now['open_files']:.0f} files; grew by {figures}")
    grown = any(
        figures["resident_mib"] > ALLOWED_GROWTH_MIB or figures["open_files"] > 2 or figures["threads"] > 2
        for figures in growth.values()
    )
    print("something grows" if grown else "nothing grows")
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
