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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pipemax.config import ConfigError
from pipemax.observer import EngineGauges
from pipemax.plan import Phase, StepPlan, StepResult
from pipemax.report.html_report import JobOutcome
from pipemax.report.job_record import JobRecord, RecordWishes
from pipemax.request import SamplingParams
from pipemax.scheduling.request_state import RequestState, RequestUpdate
from pipemax.target import check_target, is_same_file

_WARM_UP_REQUESTS = 8
_WARM_UP_TOKENS = 8
# A decode step counts as steady with at least this share of the rows of the fullest one.
_STEADY_SHARE = 0.9


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


class StepLog:
    """EngineObserver that keeps what the summary needs of every step."""

    def __init__(self, *, num_stages: int) -> None:
        self.plans: dict[int, tuple[Phase, int, int]] = {}  # step to phase, rows, new tokens
        self.results: list[StepResult] = []
        self.most_gauges = EngineGauges(0, 0, 0, 0, 0, 0)
        self._num_stages = num_stages

    def on_submit(self, plan: StepPlan, *, now_seconds: float, gauges: EngineGauges) -> None:
        self.plans[plan.step_id] = (plan.phase, plan.num_rows, plan.num_tokens)
        names = EngineGauges.__slots__
        self.most_gauges = EngineGauges(*(max(getattr(self.most_gauges, n), getattr(gauges, n)) for n in names))

    def on_result(self, result: StepResult, updates: Sequence[RequestUpdate]) -> None:
        self.results.append(result)

    def steady_decode_tokens_per_second(self) -> float | None:
        """Rows over time, of decode steps that follow another and are nearly as full as the fullest; None: no such."""
        most = max((rows for phase, rows, _ in self.plans.values() if phase is Phase.DECODE), default=0)
        rows_sum, seconds_sum = 0, 0.0
        for before, result in zip(self.results[:-1], self.results[1:], strict=True):
            phases = {self.plans[before.step_id][0], self.plans[result.step_id][0]}
            rows = self.plans[result.step_id][1]
            if phases == {Phase.DECODE} and rows >= _STEADY_SHARE * most:
                rows_sum += rows
                seconds_sum += result.finished_seconds - before.finished_seconds
        return rows_sum / seconds_sum if seconds_sum > 0 else None

    def phases(self) -> dict[str, dict[str, float]]:
        """By phase: steps, rows and tokens a step, and seconds in which the last stage computed."""
        table: dict[str, dict[str, float]] = {}
        for result in self.results:
            phase, rows, tokens = self.plans[result.step_id]
            entry = table.setdefault(phase.value, {"steps": 0, "rows": 0, "tokens": 0, "compute_seconds": 0.0})
            entry["steps"] += 1
            entry["rows"] += rows
            entry["tokens"] += tokens
            entry["compute_seconds"] += result.timings[-1].compute_seconds
        return table

    def stages(self, wall_seconds: float) -> list[dict[str, float]]:
        """Where each stage's time went, in seconds, and what it moved."""
        table = []
        for stage in range(self._num_stages):
            timings = [result.timings[stage] for result in self.results]
            entry = {
                name: float(sum(getattr(timing, name) for timing in timings))
                for name in (
                    "compute_seconds",
                    "window_wait_seconds",
                    "activation_wait_seconds",
                    "refill_bytes",
                    "home_bytes",
                )
            }
            busy = entry["compute_seconds"] + entry["window_wait_seconds"] + entry["activation_wait_seconds"]
            table.append({**entry, "idle_seconds": max(0.0, wall_seconds - busy)})
        return table


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
    max_tokens = max(row.output_tokens for row in lengths)
    settings = {**engine_settings, "skip_tokenizer_init": True}
    if settings.get("max_model_len") is None:
        settings["max_model_len"] = max(row.prompt_tokens for row in lengths) + max_tokens
    load_started_seconds = time.monotonic()
    with LLM(**settings) as llm:
        load_seconds = time.monotonic() - load_started_seconds
        engine, capacity = llm.engine, llm.engine.executor.capacity
        rng = np.random.default_rng(llm.seed)
        warm_up = [LengthPair(16, _WARM_UP_TOKENS)] * _WARM_UP_REQUESTS
        _run(llm, _requests(warm_up, llm.vocab_size, _WARM_UP_TOKENS, rng, first_id=0), warm_up)
        requests = _requests(lengths, llm.vocab_size, max_tokens, rng, first_id=len(warm_up))
        log = StepLog(num_stages=capacity.num_stages)
        engine.observe(log)
        record = JobRecord(wishes)
        record.watch(llm)
        started_seconds = time.monotonic()
        _run(llm, requests, lengths)
        wall_seconds = time.monotonic() - started_seconds
        memory = engine.scheduler.memory
        left, restarted = memory.num_left, memory.num_restarted
    prompt_tokens = sum(row.prompt_tokens for row in lengths)
    output_tokens = sum(row.output_tokens for row in lengths)
    gauges = log.most_gauges
    report = {
        "requests": len(lengths),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "output_lengths": "hidden from the scheduler",
        "max_tokens_per_request": max_tokens,
        "wall_seconds": wall_seconds,
        "requests_per_second": len(lengths) / wall_seconds,
        "output_tokens_per_second": output_tokens / wall_seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / wall_seconds,
        "steady_decode_tokens_per_second": log.steady_decode_tokens_per_second(),
        "load_seconds": load_seconds,
        "start_up": llm.start_up,
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
        "requests_left_batch": left,
        "requests_restarted": restarted,
        "dataset": str(dataset_path),
        "settings": {name: str(value) for name, value in settings.items()},
        "environment": _environment(),
    }
    _print(report, stdout)
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


def _requests(
    lengths: Sequence[LengthPair], vocab_size: int, max_tokens: int, rng: np.random.Generator, *, first_id: int
) -> list[RequestState]:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [
        RequestState(
            request_id=first_id + index,
            prompt_token_ids=rng.integers(0, vocab_size, row.prompt_tokens, dtype=np.int32),
            sampling=sampling,
            seed=index,
            stop_token_ids=frozenset(),
            max_outputs=max_tokens,
        )
        for index, row in enumerate(lengths)
    ]


def _run(llm: Any, requests: Sequence[RequestState], lengths: Sequence[LengthPair]) -> None:
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


def _environment() -> dict[str, str | None]:
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


def _print(report: Mapping[str, Any], stdout: TextIO) -> None:
    steady = report["steady_decode_tokens_per_second"]
    lines = [
        f"{report['requests']} requests, {report['prompt_tokens']} prompt and {report['output_tokens']} output tokens "
        f"(lengths hidden from the scheduler) in {report['wall_seconds']:.2f} s; loading took "
        f"{report['load_seconds']:.1f} s",
        f"Throughput: {report['requests_per_second']:.2f} requests/s, {report['total_tokens_per_second']:.0f} total "
        f"tokens/s, {report['output_tokens_per_second']:.0f} output tokens/s",
        "Steady decode: " + ("no full decode steps" if steady is None else f"{steady:.0f} tokens/s"),
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
