"""The Chrome trace of a run: what Perfetto (ui.perfetto.dev) and chrome://tracing open.

    control plane    phases             |-- prefill --|---- decode ----| ...
                     counters           requests; KV blocks resident and travelling
    stage s          compute            |step 7|step 8| ...      ─► arrows to the same step on stage s + 1
                     waits              the input of a step: from the free stage to the step's start
                     refill, home       copies of a step, from the first layer's start to the last one's end

What is drawn is what was measured. A step's time in `compute` includes its waits for the window, which fall between its
layers: they are an argument of the slice. Copies of the last steps of all are missing if nobody waited for their end.

Never here: what is recorded (`recorder.py`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipemax.plan import CopyDirection
from pipemax.report.atomic_file import atomic_text_file
from pipemax.report.recorder import RunSnapshot
from pipemax.report.step_record import StageSpan, StepRecord

_Event = dict[str, Any]

CONTROL_PLANE = 0
"""Process id of the control plane; stage s is process s + 1."""

_PHASES, _COMPUTE, _WAITS, _REFILL, _HOME = 1, 1, 2, 3, 4
_COPY_TRACKS = {CopyDirection.REFILL: _REFILL, CopyDirection.HOME: _HOME}
_STAGE_TRACKS = {_COMPUTE: "compute", _WAITS: "waits", _REFILL: "refill", _HOME: "home"}


def write_chrome_trace(path: Path, run: RunSnapshot, *, manifest: Mapping[str, Any]) -> None:
    """Writes the steps that `run` has in full as JSON. Raises OSError; the file is there whole or not at all."""
    with atomic_text_file(path) as file:
        file.write('{"displayTimeUnit": "ms",\n')
        file.write(f'"otherData": {json.dumps({**manifest, "steps_not_in_trace": run.num_skipped})},\n')
        file.write('"traceEvents": [\n')
        for index, event in enumerate(trace_events(run)):
            file.write((",\n" if index else "") + json.dumps(event, separators=(",", ":")))
        file.write("\n]}\n")


def trace_events(run: RunSnapshot) -> Iterator[_Event]:
    """Events in the trace format's own terms: times in microseconds, `ph` X complete, C counter, s and f flow."""
    yield from _names(run.capacity.num_stages)
    arrow_ids = itertools.count()
    for part in (run.head, run.tail):
        yield from _phases(part)
        for step in part:
            yield from _counters(step)
            for stage, span in enumerate(step.stages):
                if not span.is_idle:
                    yield from _stage_events(step, stage, span)
            yield from _arrows(step, arrow_ids)


def _names(num_stages: int) -> Iterator[_Event]:
    yield _metadata("process_name", CONTROL_PLANE, 0, name="control plane")
    yield _metadata("thread_name", CONTROL_PLANE, _PHASES, name="phases")
    for stage in range(num_stages):
        yield _metadata("process_name", stage + 1, 0, name=f"stage {stage}")
        yield _metadata("process_sort_index", stage + 1, 0, sort_index=stage + 1)
        for thread, name in _STAGE_TRACKS.items():
            yield _metadata("thread_name", stage + 1, thread, name=name)
            yield _metadata("thread_sort_index", stage + 1, thread, sort_index=thread)


def _metadata(kind: str, process: int, thread: int, **arguments: Any) -> _Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": arguments}


def _phases(steps: Iterable[StepRecord]) -> Iterator[_Event]:
    """Stretches of steps of one phase on the first stage, end to end: a stretch lasts until the next one begins."""
    stretches = [
        (phase, [step for step in group if step.stages])
        for phase, group in itertools.groupby((s for s in steps if s.num_rows), key=lambda step: step.phase)
    ]
    stretches = [(phase, group) for phase, group in stretches if group]
    for index, (phase, group) in enumerate(stretches):
        begin, end = group[0].stages[0].start_seconds, group[-1].stages[0].end_seconds
        if index + 1 < len(stretches):
            end = max(begin, stretches[index + 1][1][0].stages[0].start_seconds)
        yield _slice(str(phase), CONTROL_PLANE, _PHASES, begin, end - begin, steps=len(group))


def _counters(step: StepRecord) -> Iterator[_Event]:
    gauges = step.gauges
    requests = {"waiting": gauges.num_waiting, "ready": gauges.num_ready, "running": gauges.num_running}
    blocks = {"resident": gauges.resident_blocks, "travelling": gauges.travelling_blocks}
    for name, values in (("requests", requests), ("KV blocks", blocks)):
        yield {
            "ph": "C",
            "name": name,
            "pid": CONTROL_PLANE,
            "tid": 0,
            "ts": _microseconds(step.submitted_seconds),
            "args": values,
        }


def _stage_events(step: StepRecord, stage: int, span: StageSpan) -> Iterator[_Event]:
    process = stage + 1
    if step.num_rows:
        arguments: dict[str, Any] = {
            "step": step.step_id,
            "batch": step.batch_id,
            "rows": step.num_rows,
            "new tokens": step.num_tokens,
            "KV tokens": step.kv_tokens,
            "window wait (us)": _microseconds(span.window_wait_seconds),
            "issued in (us)": _microseconds(span.issue_seconds),
        }
        if step.gauges.expected_seconds:
            arguments["expected on the slowest stage (us)"] = _microseconds(step.gauges.expected_seconds)
        yield _slice(
            f"{step.phase} b{step.batch_id}",
            process,
            _COMPUTE,
            span.start_seconds,
            span.duration_seconds,
            category=str(step.phase),
            **arguments,
        )
    if span.activation_wait_seconds > 0:
        wait_seconds = min(span.activation_wait_seconds, span.start_seconds)
        yield _slice("input", process, _WAITS, span.start_seconds - wait_seconds, wait_seconds, step=step.step_id)
    for copy in span.copies:
        yield _slice(
            f"{copy.direction} {copy.num_blocks}",
            process,
            _COPY_TRACKS[copy.direction],
            copy.start_seconds,
            copy.end_seconds - copy.start_seconds,
            step=copy.step_id,
            blocks=copy.num_blocks,
            bytes=copy.num_bytes,
        )


def _arrows(step: StepRecord, ids: Iterator[int]) -> Iterator[_Event]:
    """From a step's end on a stage to its start on the next."""
    if not step.num_rows:
        return
    for stage, (here, there) in enumerate(itertools.pairwise(step.stages)):
        if here.is_idle or there.is_idle:
            continue
        common = {"name": "activations", "cat": "activations", "id": next(ids)}
        yield {
            "ph": "s",
            **common,
            "pid": stage + 1,
            "tid": _COMPUTE,
            "ts": _microseconds(here.start_seconds + 0.999 * here.duration_seconds),
        }
        yield {
            "ph": "f",
            "bp": "e",
            **common,
            "pid": stage + 2,
            "tid": _COMPUTE,
            "ts": _microseconds(there.start_seconds),
        }


def _slice(
    name: str,
    process: int,
    thread: int,
    start_seconds: float,
    duration_seconds: float,
    *,
    category: str = "pipemax",
    **arguments: Any,
) -> _Event:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": process,
        "tid": thread,
        "ts": _microseconds(start_seconds),
        "dur": _microseconds(duration_seconds),
        "args": arguments,
    }


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
