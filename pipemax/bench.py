"""`pipemax bench throughput`: how fast a pipeline works through a file of request lengths.

Prompts are random token ids. Output lengths come from the file and are hidden from the scheduler: every request carries
the same `max_tokens`, and a simulated end token stops it, which this module plays by finishing the request when the
token that completes its length has come. The engine learns of an end as late as it does of a real one.

    load, warm-up | all requests at once ... the last one finishes |
                  |<------------- what is measured ---------------->|

Never here: how the pipeline works; other ways to drive it (`llm.py`).
"""

from __future__ import annotations

import csv
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from pipemax.config import ConfigError
from pipemax.report.html_report import JobOutcome
from pipemax.report.job_record import JobRecord, RecordWishes
from pipemax.request import SamplingParams
from pipemax.scheduling.request_state import RequestState
from pipemax.target import check_target, is_same_file
from pipemax.throughput_log import ThroughputLog

if TYPE_CHECKING:
    from pipemax.llm import LLM

_WARM_UP_REQUESTS = 8
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class LengthPair:
    """Tokens of one request."""

    prompt_tokens: int
    output_tokens: int


def read_lengths(file: Path, *, num_prompts: int | None) -> list[LengthPair]:
    """Rows of a CSV with columns prompt_tokens and output_tokens; the first `num_prompts`. Raises ConfigError."""
    try:
        with file.open(newline="") as lines:
            rows = [LengthPair(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(lines)]
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: needs columns prompt_tokens and output_tokens with numbers in them") from error
    if num_prompts is not None and num_prompts > len(rows):
        raise ConfigError(f"{file}: has {len(rows)} rows; --num-prompts {num_prompts} is more")
    rows = rows[:num_prompts]
    if not rows or min(min(row.prompt_tokens, row.output_tokens) for row in rows) < 1:
        raise ConfigError(f"{file}: every request needs at least one prompt token and one output token")
    return rows


def run_throughput(
    *,
    dataset_path: Path,
    num_prompts: int | None,
    output_json: Path | None,
    wishes: RecordWishes,
    engine_settings: Mapping[str, Any],
    stdout: TextIO,
) -> dict[str, Any]:
    """Runs the benchmark, prints a summary and writes `output_json`, trace and report; gives what it wrote as JSON.

    Raises ConfigError for a wrong file or settings, before anything is loaded; ExecutorError when a stage fails.
    """
    from pipemax.llm import LLM

    lengths = read_lengths(dataset_path, num_prompts=num_prompts)
    _check_targets(dataset_path, {"--output-json": output_json, "--trace": wishes.trace, "--report": wishes.report})
    settings = {**engine_settings, "skip_tokenizer_init": True}
    if settings.get("max_model_len") is None:
        settings["max_model_len"] = longest_request_tokens(lengths)
    load_started_seconds = time.monotonic()
    with LLM(**settings) as llm:
        load_seconds = time.monotonic() - load_started_seconds
        record = JobRecord(wishes)
        report = {
            "load_seconds": load_seconds,
            "start_up": llm.start_up,
            **measure_throughput(llm, lengths, on_warm=lambda: record.watch(llm)),
            "dataset": str(dataset_path),
            "settings": {name: str(value) for name, value in settings.items()},
            "environment": environment(),
        }
        print_throughput(report, stdout)
        if output_json is not None:
            output_json.write_text(json.dumps(report, indent=1) + "\n")
        record.write(
            JobOutcome(
                title=f"{dataset_path.name} with {llm.model_name}",
                total_rows=len(lengths),
                answered_rows=len(lengths),
                failed_rows=0,
            )
        )
    return report


def longest_request_tokens(lengths: Sequence[LengthPair]) -> int:
    """The longest prompt and the longest answer together: nobody knows beforehand which prompt gets which answer."""
    return max(row.prompt_tokens for row in lengths) + max(row.output_tokens for row in lengths)


def measure_throughput(
    llm: LLM, lengths: Sequence[LengthPair], *, on_warm: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """All requests at once through an engine that is idle, after a warm-up; what it took, as JSON values.

    `on_warm` is called between the two.
    """
    engine, capacity = llm.engine, llm.engine.executor.capacity
    max_tokens = max(row.output_tokens for row in lengths)
    rng = np.random.default_rng(llm.seed)
    warm_up = [LengthPair(16, _WARM_UP_TOKENS)] * _WARM_UP_REQUESTS
    _run(llm, _requests(warm_up, llm, _WARM_UP_TOKENS, rng), warm_up)
    requests = _requests(lengths, llm, max_tokens, rng)
    memory = engine.scheduler.memory
    left_before, restarted_before = memory.num_left, memory.num_restarted
    log = ThroughputLog(capacity=capacity)
    engine.observe(log)
    on_warm()
    started_seconds = time.monotonic()
    try:
        _run(llm, requests, lengths)
    finally:
        engine.stop_observing(log)
    wall_seconds = time.monotonic() - started_seconds
    prompt_tokens = sum(row.prompt_tokens for row in lengths)
    output_tokens = sum(row.output_tokens for row in lengths)
    gauges = log.most_gauges
    return {
        "requests": len(lengths),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "output_lengths": "hidden from the scheduler",
        "max_tokens_per_request": max_tokens,
        "wall_seconds": wall_seconds,
        "requests_per_second": len(lengths) / wall_seconds,
        "output_tokens_per_second": output_tokens / wall_seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / wall_seconds,
        "steady_decode": log.steady_decode(),
        "phases": log.phases(),
        "stages": log.stages(wall_seconds),
        "blocks": {
            "device": capacity.num_device_blocks,
            "window": capacity.num_window_blocks,
            "host": capacity.num_host_blocks,
            "block_bytes_per_stage": capacity.block_bytes,
            "most_resident": gauges.resident_blocks,
            "most_home": gauges.home_blocks,
        },
        "requests_left_batch": memory.num_left - left_before,
        "requests_restarted": memory.num_restarted - restarted_before,
    }


def _check_targets(dataset: Path, targets: Mapping[str, Path | None]) -> None:
    """Raises ConfigError for a file that could not be written at the end, or would take another one's place."""
    taken = {"--dataset-path": dataset}
    for flag, path in targets.items():
        if path is None:
            continue
        check_target(flag, path)
        for other_flag, other in taken.items():
            if is_same_file(path, other):
                raise ConfigError(f"{flag} {path} is the file of {other_flag}: choose another")
        taken[flag] = path


def _requests(lengths: Sequence[LengthPair], llm: LLM, max_tokens: int, rng: np.random.Generator) -> list[RequestState]:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    first_id = llm.take_request_ids(len(lengths))
    return [
        RequestState(
            request_id=first_id + index,
            prompt_token_ids=rng.integers(0, llm.vocab_size, row.prompt_tokens, dtype=np.int32),
            sampling=sampling,
            seed=index,
            stop_token_ids=frozenset(),
            max_outputs=max_tokens,
        )
        for index, row in enumerate(lengths)
    ]


def _run(llm: LLM, requests: Sequence[RequestState], lengths: Sequence[LengthPair]) -> None:
    """All requests at once; each is ended when it has its length."""
    engine = llm.engine
    left = {request.request_id: row.output_tokens for request, row in zip(requests, lengths, strict=True)}
    for request in requests:
        engine.add_request(request)
    while left:
        for news in engine.step():
            update = news.update
            if update.error is not None:
                raise RuntimeError(f"request {update.request_id} failed: {update.error}")
            remaining = left.get(update.request_id)
            if remaining is None:
                continue  # the token of a row that was dropped one step late
            if remaining == 1:
                del left[update.request_id]
                if update.finish_reason is None:
                    engine.finish_request(update.request_id)
            else:
                left[update.request_id] = remaining - 1
    while engine.scheduler.num_plans_in_flight:
        engine.step()


def environment() -> dict[str, str | None]:
    """What a figure was measured on, with and when."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": gpu or platform.processor() or platform.machine(),
        "gpus": str(torch.cuda.device_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    """Of the source tree that this runs from; None where that is no checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def print_throughput(report: Mapping[str, Any], stdout: TextIO) -> None:
    steady = report["steady_decode"]
    lines = [
        f"{report['requests']} requests, {report['prompt_tokens']} prompt and {report['output_tokens']} output tokens "
        f"(lengths hidden from the scheduler) in {report['wall_seconds']:.2f} s; loading took "
        f"{report['load_seconds']:.1f} s",
        f"Throughput: {report['requests_per_second']:.2f} requests/s, {report['total_tokens_per_second']:.0f} total "
        f"tokens/s, {report['output_tokens_per_second']:.0f} output tokens/s",
    ]
    if steady is None:
        lines.append("Steady decode: no full decode steps that follow each other")
    else:
        lines.append(
            f"Steady decode: {steady['tokens_per_second']:.0f} tokens/s over {steady['steps']} steps of "
            f"{steady['rows_per_step']:.1f} rows and {1e3 * steady['seconds_per_step']:.2f} ms"
        )
        lines += [
            f"  stage {stage}: computes {entry['compute_share']:.1%} of the time, waits for the window "
            f"{entry['window_wait_share']:.2%}, for input {entry['activation_wait_share']:.2%}; "
            + ("no refill" if rate is None else f"refills at {rate / 1e9:.1f} GB/s while it does")
            for stage, entry in enumerate(steady["stages"])
            for rate in [entry["refill_bytes_per_second"]]
        ]
    for phase, entry in report["phases"].items():
        steps = entry["steps"]
        lines.append(
            f"{phase}: {steps} steps of {entry['rows'] / steps:.1f} rows and {entry['tokens'] / steps:.1f} tokens, "
            f"{1e3 * entry['compute_seconds'] / steps:.2f} ms each"
        )
    for stage, entry in enumerate(report["stages"]):
        lines.append(
            f"stage {stage}: compute {entry['compute_seconds']:.2f} s, "
            f"window wait {entry['window_wait_seconds']:.2f} s, "
            f"activation wait {entry['activation_wait_seconds']:.2f} s, idle {entry['idle_seconds']:.2f} s; "
            f"refill {entry['refill_bytes'] / 1e9:.2f} GB, home {entry['home_bytes'] / 1e9:.2f} GB"
        )
    for stage, parts in enumerate(report["start_up"]):
        costs = [f"{part['name']} {part['seconds']:.1f} s {part['device_bytes'] / 1024**3:+.2f} GiB" for part in parts]
        lines.append(f"stage {stage} started: {', '.join(costs)}")
    blocks = report["blocks"]
    lines.append(
        f"KV blocks: {blocks['device']} on the device ({blocks['window']} window), {blocks['host']} at home; "
        f"at most {blocks['most_resident']} resident, {blocks['most_home']} live"
    )
    print("\n".join(lines), file=stdout, flush=True)
