"""The charts of a report: SVG text from what a recorder kept, drawn by Matplotlib in the page's colours (`palette.py`).

Every function gives one figure's SVG, ready to stand in an HTML page, or None where there is nothing to show. Never
here: words around the charts (`html_report.py`), numbers that no snapshot has.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipemax.plan import CopyDirection, Phase
from pipemax.report.interval import Interval
from pipemax.report.palette import marker, series, with_variables
from pipemax.report.recorder import RunSnapshot
from pipemax.report.step_record import StepRecord

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_INCHES = 9.0
_MAX_POINTS = 160
_MIN_STEPS_A_POINT = 4
# Where a copy's bar lies below its stage, in stages; and its colour.
_COPY_BARS = {CopyDirection.REFILL: (0.22, 1), CopyDirection.HOME: (0.32, 2)}
_PHASE_SERIES = {Phase.PREFILL: 1, Phase.DECODE: 0, Phase.MIXED: 3, Phase.COPY: 7}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pipemax",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": marker("line"),
    "axes.labelcolor": marker("muted"),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": marker("line"),
    "grid.linewidth": 0.5,
    "xtick.color": marker("muted"),
    "ytick.color": marker("muted"),
    "text.color": marker("text"),
    "figure.facecolor": "none",
}


class _Timeline:
    """Intervals merged to as many points as a chart can show, each with a few steps in it."""

    def __init__(self, run: RunSnapshot) -> None:
        num_steps = sum(run.totals.steps.values())
        wanted = max(1, min(_MAX_POINTS, num_steps // _MIN_STEPS_A_POINT))
        together = max(1, -(-len(run.intervals) // wanted))
        self.points: list[Interval] = []
        for index, interval in enumerate(run.intervals):
            if index % together == 0:
                self.points.append(Interval())
            self.points[-1].add(interval)
        width = together * run.interval_seconds
        ends = [(index + 1) * width for index in range(len(self.points))]
        if ends:
            ends[-1] = max(run.elapsed_seconds, (len(ends) - 1) * width + 1e-9)
        self.edges = [0.0, *ends]
        self.widths = [end - begin for begin, end in zip(self.edges, ends, strict=False)]

    def rate(self, amounts: Sequence[float]) -> list[float]:
        """Amounts a point to amounts a second."""
        return [amount / width for amount, width in zip(amounts, self.widths, strict=True)]


def throughput_chart(run: RunSnapshot) -> str | None:
    """Output and prefill tokens a second, over bands that show what the stages were busy with."""
    line = _Timeline(run)
    if not line.points:
        return None
    figure, (output, prefill) = _figure(rows=2, height_inches=3.4)
    output.stairs(line.rate([p.output_tokens for p in line.points]), line.edges, color=series(0), linewidth=1.4)
    prefill.stairs(line.rate([p.prefill_tokens for p in line.points]), line.edges, color=series(1), linewidth=1.4)
    output.set_ylabel("output tokens/s")
    prefill.set_ylabel("prefill tokens/s")
    for axes in (output, prefill):
        _draw_phase_bands(axes, line)
        axes.set_ylim(bottom=0)
    _label_phase_bands(output, line)
    _time_axis(prefill, run)
    return _svg(figure, "throughput")


def batch_chart(run: RunSnapshot) -> str | None:
    """Mean rows of a step by phase, and requests that wait, are ready, run."""
    line = _Timeline(run)
    if not line.points:
        return None
    figure, (rows, requests) = _figure(rows=2, height_inches=3.4)
    for phase in (Phase.DECODE, Phase.PREFILL, Phase.MIXED):
        if run.totals.steps[phase]:
            means = [p.rows[phase] / p.steps[phase] if p.steps[phase] else float("nan") for p in line.points]
            rows.stairs(means, line.edges, color=series(_PHASE_SERIES[phase]), label=str(phase), linewidth=1.4)
    rows.set_ylabel("rows a step, mean")
    for index, name in enumerate(("waiting", "ready", "running")):
        counts = [None if p.gauges is None else getattr(p.gauges, f"num_{name}") for p in line.points]
        requests.plot(_middles(line), _held(counts), color=series(index + 2), label=name, linewidth=1.4)
    requests.set_ylabel("requests")
    for axes in (rows, requests):
        axes.set_ylim(bottom=0)
        _legend(axes)
    _time_axis(requests, run)
    return _svg(figure, "batches")


def kv_chart(run: RunSnapshot) -> str | None:
    """Live KV blocks: resident ones, and those that travel; the device's slots as lines."""
    line = _Timeline(run)
    gauges = [point.gauges for point in line.points]
    if not any(gauges):
        return None
    figure, (axes,) = _figure(rows=1, height_inches=2.4)
    resident = _held([None if g is None else g.resident_blocks for g in gauges])
    travelling = _held([None if g is None else g.travelling_blocks for g in gauges])
    axes.stackplot(
        _middles(line),
        resident,
        travelling,
        colors=[series(0), series(1)],
        alpha=0.65,
        labels=["resident", "travelling: at home, in the window when read"],
        linewidth=0,
    )
    device = run.capacity.num_device_blocks
    axes.axhline(device, color=marker("text"), linewidth=1, linestyle="--", label=f"device slots ({device:,})")
    axes.set_ylabel("KV blocks")
    axes.set_ylim(bottom=0)
    _legend(axes)
    _time_axis(axes, run)
    return _svg(figure, "kv")


def link_chart(run: RunSnapshot) -> str | None:
    """Megabytes a second over the host link, mean of the stages, each way."""
    line = _Timeline(run)
    if not any(use.refill_bytes or use.home_bytes for use in run.totals.stages):
        return None
    figure, (axes,) = _figure(rows=1, height_inches=2.2)
    num_stages = run.capacity.num_stages
    for index, (name, label) in enumerate((("refill_bytes", "refill: to the device"), ("home_bytes", "home: from it"))):
        amounts = [sum(getattr(use, name) for use in p.stages) / num_stages / 1e6 for p in line.points]
        axes.stairs(line.rate(amounts), line.edges, color=series(index + 1), label=label, linewidth=1.4)
    axes.set_ylabel("MB/s a stage")
    axes.set_ylim(bottom=0)
    _legend(axes)
    _time_axis(axes, run)
    return _svg(figure, "link")


def stage_chart(run: RunSnapshot) -> str | None:
    """Over time, for each stage: the share that it computed, waited for the window and for its input."""
    line = _Timeline(run)
    if not line.points:
        return None
    num_stages = run.capacity.num_stages
    figure, all_axes = _figure(rows=num_stages, height_inches=0.9 + 0.55 * num_stages)
    names = {
        "compute_seconds": ("computing", 2),
        "window_wait_seconds": ("waiting for the window", 1),
        "activation_wait_seconds": ("waiting for input", 7),
    }
    for stage, axes in enumerate(all_axes):
        below = [0.0] * len(line.points)
        for name, (label, colour) in names.items():
            shares = line.rate([getattr(p.stages[stage], name) if stage < len(p.stages) else 0.0 for p in line.points])
            above = [min(1.0, low + share) for low, share in zip(below, shares, strict=True)]
            axes.stairs(above, line.edges, baseline=below, fill=True, color=series(colour), alpha=0.75, label=label)
            below = above
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 1], ["", "100 %"])
        axes.set_ylabel(f"stage {stage}", rotation=0, ha="right", va="center")
    _legend(all_axes[0])
    _time_axis(all_axes[-1], run)
    return _svg(figure, "stages")


def prediction_chart(run: RunSnapshot) -> str | None:
    """Expected against measured compute time of the slowest stage, for steps that are there in full."""
    steps = [step for step in (*run.head, *run.tail) if step.stages and step.gauges.expected_seconds]
    if not steps:
        return None
    steps = steps[:: max(1, len(steps) // 800)]
    figure, (axes,) = _figure(rows=1, height_inches=3.4)
    for phase in (Phase.DECODE, Phase.PREFILL, Phase.MIXED):
        pairs = [(s.gauges.expected_seconds, s.slowest_compute_seconds) for s in steps if s.phase is phase]
        if pairs:
            axes.scatter(
                [1e3 * expected for expected, _ in pairs],
                [1e3 * measured for _, measured in pairs],
                s=7,
                alpha=0.5,
                linewidths=0,
                color=series(_PHASE_SERIES[phase]),
                label=str(phase),
            )
    axes.axline((0, 0), slope=1, color=marker("text"), linewidth=1, linestyle="--", label="equal")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("expected compute, ms")
    axes.set_ylabel("measured compute, ms")
    _legend(axes)
    return _svg(figure, "prediction")


@dataclass(frozen=True, slots=True)
class _Bars:
    """Bars that look alike, drawn together. `top` and `height` in stages."""

    top: float
    height: float
    colour: str
    hatch: str | None = None


def pipeline_chart(run: RunSnapshot, steps: Sequence[StepRecord]) -> str | None:
    """A stretch of the run's steps as bars: stages below each other, coloured by batch.

    Copies that ran meanwhile are thin bars below each stage, whichever step they belong to.
    """
    num_stages = run.capacity.num_stages
    steps = [step for step in steps if step.stages]
    if not steps:
        return None
    start = min(span.start_seconds for step in steps for span in step.stages)
    end = max(span.end_seconds for step in steps for span in step.stages)
    figure, (axes,) = _figure(rows=1, height_inches=0.7 + 0.6 * num_stages)
    bars: dict[_Bars, list[tuple[float, float]]] = defaultdict(list)
    for step in steps:
        for stage, span in enumerate(step.stages):
            bar = (1e3 * (span.start_seconds - start), 1e3 * span.duration_seconds)
            if step.num_rows:
                hatch = "////" if step.phase is Phase.PREFILL else None
                bars[_Bars(stage - 0.32, 0.5, series(step.batch_id), hatch)].append(bar)
                if span.window_wait_seconds > 0:
                    wait = (bar[0], 1e3 * span.window_wait_seconds)
                    bars[_Bars(stage - 0.32, 0.14, marker("error"))].append(wait)
    for step in (*run.head, *run.tail):
        for stage, span in enumerate(step.stages):
            for copy in span.copies:
                first, last = max(copy.start_seconds, start), min(copy.end_seconds, end)
                if first < last:
                    offset, colour = _COPY_BARS[copy.direction]
                    bar = (1e3 * (first - start), 1e3 * (last - first))
                    bars[_Bars(stage + offset, 0.08, series(colour))].append(bar)
    for style, spans in sorted(bars.items(), key=lambda item: -item[0].height):  # waits over steps
        axes.broken_barh(
            spans,
            (style.top, style.height),
            facecolor=style.colour,
            edgecolor=marker("page"),
            linewidth=0.5 if style.height == 0.5 else 0,
            hatch=style.hatch,
        )
    axes.set_ylim(num_stages - 0.45, -0.45)
    axes.set_yticks(range(num_stages), [f"stage {stage}" for stage in range(num_stages)])
    axes.set_xlabel(f"ms from {start:,.3f} s on")
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    return _svg(figure, "pipeline")


def _figure(*, rows: int, height_inches: float) -> tuple[Figure, list[Axes]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def _svg(figure: Figure, name: str) -> str:
    """The drawing as an element for HTML: no XML header, ids that are its own, colours of the page."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bd="[^"]*"', _rounded, svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', rf'<svg role="img" aria-labelledby="title-{name}" \1', svg)
    return with_variables(svg)


def _rounded(path: re.Match[str]) -> str:
    """A hundredth of a point is finer than any screen."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", path.group())


def _time_axis(axes: Axes, run: RunSnapshot) -> None:
    axes.set_xlim(0, max(run.elapsed_seconds, 1e-9))
    axes.set_xlabel("seconds since the first step")


def _middles(line: _Timeline) -> list[float]:
    return [begin + width / 2 for begin, width in zip(line.edges, line.widths, strict=False)]


def _held(values: Sequence[int | None]) -> list[int]:
    """Gauges where no plan was made stay as they were."""
    held, last = [], 0
    for value in values:
        last = last if value is None else value
        held.append(last)
    return held


def _main_phase(point: Interval) -> Phase | None:
    busiest = max(Phase, key=lambda phase: point.phase_seconds[phase])
    return busiest if point.phase_seconds[busiest] > 0 else None


def _draw_phase_bands(axes: Axes, line: _Timeline) -> None:
    for point, begin, width in zip(line.points, line.edges, line.widths, strict=False):
        phase = _main_phase(point)
        if phase is not None:
            axes.axvspan(begin, begin + width, color=series(_PHASE_SERIES[phase]), alpha=0.10, linewidth=0)


def _label_phase_bands(axes: Axes, line: _Timeline) -> None:
    from matplotlib.patches import Patch

    seen = [phase for phase in Phase if any(_main_phase(point) is phase for point in line.points)]
    _legend(axes, [Patch(color=series(_PHASE_SERIES[phase]), alpha=0.3, label=f"mostly {phase}") for phase in seen])


def _legend(axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """Above the axes, where it hides nothing."""
    shown = axes.get_legend_handles_labels()[0] if handles is None else handles
    axes.legend(
        handles=shown,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=max(1, len(shown)),
        borderpad=0,
        frameon=False,
        labelcolor=marker("text"),
    )
