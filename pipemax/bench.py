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
from pipemax.executor.stage_handle import start_server
from pipemax.report.html_report import JobOutcome
from pipemax.report.job_record import JobRecord, RecordWishes
from pipemax.request import SamplingParams
from pipemax.scheduling.request_state import RequestState, RequestUpdate
from pipemax.settled_heap import settled_heap
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
    length_hints: bool,
    output_json: Path | None,
    wishes: RecordWishes,
    engine_settings: Mapping[str, Any],
    stdout: TextIO,
) -> dict[str, Any]:
    """Runs the benchmark, prints a summary and writes `output_json`, trace and report; gives what it wrote as JSON.

    Raises ConfigError for a wrong file or settings, before anything is loaded; ExecutorError when a stage fails;
    KeyboardInterrupt when it was ended early, after what had come by then is printed and written.
    """
    lengths = read_lengths(dataset_path, num_prompts=num_prompts)
    _check_targets(dataset_path, {"--output-json": output_json, "--trace": wishes.trace, "--report": wishes.report})
    start_server()
    from pipemax.llm import LLM

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
            **measure_throughput(llm, lengths, length_hints=length_hints, on_warm=lambda: record.watch(llm)),
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
                answered_rows=report["requests_finished"],
                failed_rows=0,
            )
        )
    if report["requests_finished"] < len(lengths):
        raise KeyboardInterrupt
    return report


def longest_request_tokens(lengths: Sequence[LengthPair]) -> int:
    """The longest prompt and the longest answer together: nobody knows beforehand which prompt gets which answer."""
    return max(row.prompt_tokens for row in lengths) + max(row.output_tokens for row in lengths)


def measure_throughput(
    llm: LLM,
    lengths: Sequence[LengthPair],
    *,
    length_hints: bool = False,
    on_warm: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """All requests at once through an engine that is idle, after a warm-up; what it took, as JSON values.

    With `length_hints` each request's own length is its `max_tokens`. `on_warm` is called between the two. Ctrl-C ends
    it early: what had come by then is the result, which says so; the engine is good for nothing after that.
    """
    engine, capacity = llm.engine, llm.engine.executor.capacity
    rng = np.random.default_rng(llm.seed)
    warm_up = [LengthPair(16, _WARM_UP_TOKENS)] * _WARM_UP_REQUESTS
    _Drive(llm, _requests(warm_up, llm, rng, length_hints=True), warm_up).run()
    requests = _requests(lengths, llm, rng, length_hints=length_hints)
    memory = engine.scheduler.memory
    left_before, restarted_before = memory.num_left, memory.num_restarted
    log = ThroughputLog(capacity=capacity)
    engine.observe(log)
    on_warm()
    started_seconds = time.monotonic()
    drive = _Drive(llm, requests, lengths)
    try:
        with settled_heap():
            drive.run()
    except KeyboardInterrupt:
        pass  # half an hour of measuring is not lost for the minute that was too much
    finally:
        engine.stop_observing(log)
    wall_seconds = time.monotonic() - started_seconds
    prompt_tokens, output_tokens = drive.prompt_tokens, drive.output_tokens
    gauges = log.most_gauges
    return {
        "requests": len(lengths),
        "requests_finished": drive.num_finished,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "output_lengths": "known to the scheduler" if length_hints else "hidden from the scheduler",
        "max_tokens": "its own length" if length_hints else max(row.output_tokens for row in lengths),
        "wall_seconds": wall_seconds,
        "requests_per_second": drive.num_finished / wall_seconds,
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


def _requests(
    lengths: Sequence[LengthPair], llm: LLM, rng: np.random.Generator, *, length_hints: bool
) -> list[RequestState]:
    longest = max(row.output_tokens for row in lengths)
    first_id = llm.take_request_ids(len(lengths))
    requests = []
    for index, row in enumerate(lengths):
        max_tokens = row.output_tokens if length_hints else longest
        requests.append(
            RequestState(
                request_id=first_id + index,
                prompt_token_ids=rng.integers(0, llm.vocab_size, row.prompt_tokens, dtype=np.int32),
                sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
                seed=index,
                stop_token_ids=frozenset(),
                max_outputs=max_tokens,
            )
        )
    return requests


class _Drive:
    """Requests through an engine, all at once; each is ended when it has its length. Counts what has come."""

    def __init__(self, llm: LLM, requests: Sequence[RequestState], lengths: Sequence[LengthPair]) -> None:
        self._engine = llm.engine
        self._left = {request.request_id: row.output_tokens for request, row in zip(requests, lengths, strict=True)}
        self._prompt_tokens = {request.request_id: request.num_prompt for request in requests}
        self.num_finished = 0
        self.prompt_tokens = 0  # of those that have finished
        self.output_tokens = 0
        for request in requests:
            self._engine.add_request(request)

    def run(self) -> None:
        engine = self._engine
        while self._left:
            for news in engine.step():
                self._take(news.update)
        while engine.scheduler.num_plans_in_flight:
            engine.step()

    def _take(self, update: RequestUpdate) -> None:
        if update.error is not None:
            raise RuntimeError(f"request {update.request_id} failed: {update.error}")
        remaining = self._left.get(update.request_id)
        if remaining is None:
            return  # the token of a row that was dropped one step late
        self.output_tokens += 1
        self._left[update.request_id] = remaining - 1
        if remaining == 1:
            del self._left[update.request_id]
            self.num_finished += 1
            self.prompt_tokens += self._prompt_tokens[update.request_id]
            if update.finish_reason is None:
                self._engine.finish_request(update.request_id, is_complete=True)


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


def _links_line(links: Mapping[str, Any]) -> str:
    """What stages measured of their links at the start, and what they took."""
    names = {"nccl": "NCCL", "host": "host memory"}
    by_link: dict[str, list[str]] = {}
    for one in links["figures"]:
        by_link.setdefault(f"{one['sender']}-{one['receiver']}", []).append(
            f"{names[one['medium']]} {1e6 * one['decode_seconds']:.0f} us, "
            f"{one['prefill_bytes_per_second'] / 1e9:.1f} GB/s"
        )
    figures = "; ".join(f"{link} {', '.join(of_link)}" for link, of_link in by_link.items())
    return f"links: {names[links['taken']]} taken; {figures}"


def print_throughput(report: Mapping[str, Any], stdout: TextIO) -> None:
    steady, requests = report["steady_decode"], report["requests"]
    if report["requests_finished"] < requests:
        requests = f"Ended early: {report['requests_finished']} of {requests}"
    lines = [
        f"{requests} requests, {report['prompt_tokens']} prompt and {report['output_tokens']} output tokens "
        f"(lengths {report['output_lengths']}) in {report['wall_seconds']:.2f} s; loading took "
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
            f"{entry['window_wait_share']:.2%}, for input {entry['activation_wait_share']:.2%}; its host issues "
            f"{entry['issue_share']:.1%} of the time, copies {entry['copy_issue_share']:.1%}; "
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
        lines += [_links_line(part["links"]) for part in parts if part["links"] is not None]
    blocks = report["blocks"]
    lines.append(
        f"KV blocks: {blocks['device']} on the device ({blocks['window']} window), {blocks['host']} at home; "
        f"at most {blocks['most_resident']} resident, {blocks['most_home']} live"
    )
    print("\n".join(lines), file=stdout, flush=True)
