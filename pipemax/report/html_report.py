"""The report of a run: one HTML page with everything in it. It loads nothing, runs no script, prints.

Words and tables come from the page's template (`page.html.j2`), charts from `charts.py`, colours from `palette.py`.
Here is what the page says: which numbers, and which of them call for a remark. Never here: recording.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipemax.plan import Phase
from pipemax.report import charts
from pipemax.report.atomic_file import atomic_text_file
from pipemax.report.palette import COLOURS, Colour
from pipemax.report.recorder import RunSnapshot
from pipemax.report.row_log import RowLog
from pipemax.report.step_record import StepRecord

_WINDOW_WAIT_SHARE = 0.02
_INPUT_WAIT_SHARE = 0.10
_IDLE_SHARE = 0.10
_TIMELINE_STEPS_A_STAGE = 6


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a job ended. `problem` is "" if it ran to its end.

    `earlier_rows` of the answered and failed ones were done by earlier runs: all other numbers are of this one.
    """

    title: str
    total_rows: int
    answered_rows: int
    failed_rows: int
    earlier_rows: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Chart:
    """`title` says what is to be seen, `note` how to read it."""

    name: str
    title: str
    svg: str
    note: str


@dataclass(frozen=True, slots=True)
class _StageShares:
    """Shares of the run's time, 0 to 1, and GiB each way."""

    compute: float
    window_wait: float
    input_wait: float
    idle: float
    refill_gib: float
    home_gib: float


@dataclass(frozen=True, slots=True)
class _PhaseRow:
    """One phase in numbers; `measured_to_expected` is the median over its steps."""

    phase: str
    steps: int
    mean_rows: float
    median_step_seconds: float | None
    measured_to_expected: float | None


def write_html_report(
    path: Path, run: RunSnapshot, *, outcome: JobOutcome, manifest: Mapping[str, Any], rows: RowLog | None = None
) -> None:
    """Writes the page. Raises OSError; the file is there whole or not at all."""
    page = render_html_report(run, outcome=outcome, manifest=manifest, rows=rows)
    with atomic_text_file(path) as file:
        file.write(page)


def render_html_report(
    run: RunSnapshot, *, outcome: JobOutcome, manifest: Mapping[str, Any], rows: RowLog | None = None
) -> str:
    """The page as text. `rows` None: a run without a file of rows, such as a simulated one."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipemax.report", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"count": "{:,}".format, "percent": "{:.1%}".format, "rate": "{:,.1f}".format}
    stages = [_shares(run, stage) for stage in range(run.capacity.num_stages)]
    return environment.get_template("page.html.j2").render(
        outcome=outcome,
        run=run,
        rows=rows,
        manifest=manifest,
        stages=stages,
        phases=[_phase_row(run, phase) for phase in Phase if run.totals.steps[phase]],
        remarks=list(_remarks(run, stages)),
        charts=list(_charts(run)),
        output_rate=run.totals.output_tokens / run.elapsed_seconds if run.elapsed_seconds else 0.0,
        utilisation=sum(stage.compute for stage in stages) / len(stages),
        duration=_duration(run.elapsed_seconds),
        light=_variables(lambda colour: colour.light),
        dark=_variables(lambda colour: colour.dark),
    )


def _variables(value: Callable[[Colour], str]) -> str:
    return " ".join(f"--{name}: {value(colour)};" for name, colour in COLOURS.items())


def _shares(run: RunSnapshot, stage: int) -> _StageShares:
    use, elapsed = run.totals.stages[stage], max(run.elapsed_seconds, 1e-9)
    return _StageShares(
        compute=use.compute_seconds / elapsed,
        window_wait=use.window_wait_seconds / elapsed,
        input_wait=use.activation_wait_seconds / elapsed,
        idle=max(0.0, 1 - use.busy_seconds / elapsed),
        refill_gib=use.refill_bytes / 1024**3,
        home_gib=use.home_bytes / 1024**3,
    )


def _phase_row(run: RunSnapshot, phase: Phase) -> _PhaseRow:
    steps = [step for step in (*run.head, *run.tail) if step.phase is phase and step.stages]
    spans = [span for step in steps for span in step.stages]
    expected = [step for step in steps if step.gauges.expected_seconds]
    ratios = [step.slowest_compute_seconds / step.gauges.expected_seconds for step in expected]
    return _PhaseRow(
        phase=str(phase),
        steps=run.totals.steps[phase],
        mean_rows=run.totals.rows[phase] / run.totals.steps[phase],
        median_step_seconds=median(span.duration_seconds for span in spans) if spans else None,
        measured_to_expected=median(ratios) if ratios else None,
    )


def _remarks(run: RunSnapshot, stages: Sequence[_StageShares]) -> Iterator[str]:
    """What in the numbers calls for a decision."""
    if not run.totals.steps[Phase.DECODE] + run.totals.steps[Phase.MIXED]:
        return
    worst = max(range(len(stages)), key=lambda stage: stages[stage].window_wait)
    if stages[worst].window_wait > _WINDOW_WAIT_SHARE:
        yield (
            f"Stage {worst} waited for the window {stages[worst].window_wait:.1%} of the time: the host link sets the "
            "pace. Fewer window blocks, or fewer rows a step, ask less of it; pipemax doctor measures it."
        )
    input_wait = sum(stage.input_wait for stage in stages) / len(stages)
    if len(stages) > 1 and input_wait > _INPUT_WAIT_SHARE:
        yield (
            f"Stages waited for their input {input_wait:.1%} of the time: batches or stages take unequal times, or "
            "there are too few rows for every batch in flight."
        )
    idle = sum(stage.idle for stage in stages) / len(stages)
    if idle > _IDLE_SHARE:
        yield (
            f"Stages had nothing to do {idle:.1%} of the time: the start, the last rows of a job, phase switches, or a "
            "control plane that does not keep up."
        )
    busiest, laziest = max(stage.compute for stage in stages), min(stage.compute for stage in stages)
    if laziest < 0.8 * busiest:
        yield (
            f"The busiest stage computed {busiest:.0%} of the time and the least busy one {laziest:.0%}: the layers "
            "are not split by what they cost."
        )


def _charts(run: RunSnapshot) -> Iterator[_Chart]:
    drawn = (
        (
            "throughput",
            "Throughput over time",
            charts.throughput_chart,
            "Bands show what most of the compute went to.",
        ),
        (
            "stages",
            "What the stages did",
            charts.stage_chart,
            "Shares of time; what is left empty is idle.",
        ),
        ("batches", "Batch sizes and requests", charts.batch_chart, "Ready requests have their KV at home."),
        (
            "kv",
            "Where the KV cache was",
            charts.kv_chart,
            "Without homes and a window, live blocks could not pass the dashed line.",
        ),
        ("link", "Use of the host link", charts.link_chart, "Mean of the stages."),
        (
            "prediction",
            "Step times, expected and measured",
            charts.prediction_chart,
            "A point is a step on its slowest stage; above the line it took longer than the scheduler had expected.",
        ),
    )
    for name, title, draw, note in drawn:
        svg = draw(run)
        if svg is not None:
            yield _Chart(name, title, svg, note)
    steps = timeline_window(run)
    svg = charts.pipeline_chart(run, steps)
    if svg is not None:
        yield _Chart(
            "pipeline",
            f"The pipeline, steps {steps[0].step_id:,} to {steps[-1].step_id:,}",
            svg,
            "Colours are batches, hatching is prefill, a bar along a step's upper edge is its wait for the window. "
            "Thin bars below a stage are copies: refill above, home below.",
        )


def timeline_window(run: RunSnapshot) -> Sequence[StepRecord]:
    """Some steps to look at closely: from the middle of the longest stretch of decode that is there in full."""
    wanted = max(12, _TIMELINE_STEPS_A_STAGE * run.capacity.num_stages)
    best: Sequence[StepRecord] = ()
    for part in (run.head, run.tail):
        for _, group in itertools.groupby(part, key=lambda step: step.phase not in (Phase.DECODE, Phase.MIXED)):
            stretch = list(group)
            decodes = stretch[0].phase in (Phase.DECODE, Phase.MIXED)
            if (decodes, len(stretch)) > (bool(best) and best[0].phase in (Phase.DECODE, Phase.MIXED), len(best)):
                best = stretch
    first = max(0, (len(best) - wanted) // 2)
    return best[first : first + wanted]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
