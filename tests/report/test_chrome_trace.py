"""The trace against the rules of its format, and against the run that it shows."""

import itertools
import json
import math
from collections import defaultdict
from dataclasses import replace

import pytest

from pipemax.plan import CopyDirection
from pipemax.report.chrome_trace import CONTROL_PLANE, trace_events, write_chrome_trace
from tests.report.runs import recorded_run


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    write_chrome_trace(path, recorded_run(), manifest={"pipemax": "0.0"})
    return json.loads(path.read_text())


def tracks(trace):
    """Slices by (process name, thread name), in order."""
    processes, threads, slices = {}, {}, defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            slices[processes[event["pid"]], threads[event["pid"], event["tid"]]].append(event)
    return slices


def test_a_process_for_each_stage_with_its_tracks(trace):
    expected = {("control plane", "phases")}
    expected |= {(f"stage {s}", name) for s in (0, 1) for name in ("compute", "refill", "home", "waits")}
    assert set(tracks(trace)) == expected


def test_events_have_what_their_kind_asks_for(trace):
    needed = {
        "X": {"ts", "dur", "name"},
        "C": {"ts", "args"},
        "s": {"ts", "id"},
        "f": {"ts", "id", "bp"},
        "M": {"args"},
    }
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} | needed[event["ph"]] <= set(event), event
        assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
    assert trace["otherData"] == {"pipemax": "0.0", "steps_not_in_trace": 0}


def test_slices_of_a_stage_do_not_overlap(trace):
    for (process, track), slices in tracks(trace).items():
        ordered = sorted(slices, key=lambda event: event["ts"])
        for here, there in itertools.pairwise(ordered):
            assert here["ts"] + here["dur"] <= there["ts"] + 0.01, (process, track)


def test_compute_slices_are_the_steps(trace):
    run = recorded_run()
    for stage in (0, 1):
        slices = tracks(trace)[f"stage {stage}", "compute"]
        steps = [step for step in run.head if step.num_rows]
        assert [event["args"]["step"] for event in slices] == [step.step_id for step in steps]
        assert sum(event["dur"] for event in slices) == pytest.approx(
            1e6 * sum(step.stages[stage].duration_seconds for step in steps)
        )
        assert [event["cat"] for event in slices] == [str(step.phase) for step in steps]


def test_copies_carry_their_bytes(trace):
    totals = recorded_run().totals
    for stage in (0, 1):
        refill = tracks(trace)[f"stage {stage}", "refill"]
        assert sum(event["args"]["bytes"] for event in refill) == totals.stages[stage].refill_bytes
        home = tracks(trace)[f"stage {stage}", "home"]
        assert sum(event["args"]["blocks"] for event in home) == totals.home_blocks


def test_copies_lie_where_they_ran(trace):
    """From the simulator's times of them, not over the steps that they belong to."""
    run = recorded_run()
    for stage in (0, 1):
        for direction in CopyDirection:
            copies = [copy for step in run.head for copy in step.stages[stage].copies if copy.direction is direction]
            slices = tracks(trace)[f"stage {stage}", str(direction)]
            assert [event["args"]["step"] for event in slices] == [copy.step_id for copy in copies]
            for event, copy in zip(slices, copies, strict=True):
                assert event["ts"] == pytest.approx(1e6 * copy.start_seconds, abs=0.01)
                assert event["ts"] + event["dur"] == pytest.approx(1e6 * copy.end_seconds, abs=0.01)
        spans = {step.step_id: step.stages[stage] for step in run.head}
        refills = tracks(trace)[f"stage {stage}", "refill"]
        assert any(
            event["dur"] != pytest.approx(1e6 * spans[event["args"]["step"]].duration_seconds) for event in refills
        )


def test_the_format_s_rules_for_viewers(trace):
    """What Perfetto and chrome://tracing rely on: known kinds of events only; every track named once, before any
    event on it; slices of a track nested or apart; flows that begin and end inside a slice; counters with the same
    numeric series each time and a time that never goes back."""
    named, series, last_seconds, opened = set(), {}, defaultdict(float), defaultdict(list)
    for event in trace["traceEvents"]:
        track = event["pid"], event["tid"]
        if event["ph"] == "M":
            if event["name"] in ("process_name", "thread_name"):
                assert isinstance(event["args"]["name"], str)
                assert (event["name"], *track) not in named
                named.add((event["name"], *track))
            continue
        assert ("process_name", event["pid"], 0) in named
        assert math.isfinite(event["ts"])
        if event["ph"] == "C":
            key = event["pid"], event["name"]
            assert series.setdefault(key, set(event["args"])) == set(event["args"])
            assert event["ts"] >= last_seconds[key]
            last_seconds[key] = event["ts"]
            continue
        assert ("thread_name", *track) in named and event["ph"] in "Xsf"
        if event["ph"] == "X":
            assert math.isfinite(event["dur"]) and event["name"]
            opened[track].append((event["ts"], event["ts"] + event["dur"]))
    for event in trace["traceEvents"]:
        if event["ph"] in ("s", "f"):
            slices = opened[event["pid"], event["tid"]]
            assert any(begin <= event["ts"] <= end for begin, end in slices), event


def test_every_arrow_goes_from_a_step_to_the_same_step_on_the_next_stage(trace):
    begins = {event["id"]: event for event in trace["traceEvents"] if event["ph"] == "s"}
    ends = {event["id"]: event for event in trace["traceEvents"] if event["ph"] == "f"}
    assert set(begins) == set(ends) and len(begins) == sum(step.num_rows > 0 for step in recorded_run().head)
    for name, begin in begins.items():
        assert (begin["pid"], ends[name]["pid"]) == (1, 2) and begin["ts"] <= ends[name]["ts"]


def test_phases_cover_the_run_in_order(trace):
    slices = tracks(trace)["control plane", "phases"]
    assert {event["name"] for event in slices} >= {"prefill", "decode"}
    for here, there in itertools.pairwise(slices):
        assert here["ts"] + here["dur"] == pytest.approx(there["ts"], abs=0.01)


def test_counters_are_the_gauges(trace):
    blocks = [event["args"] for event in trace["traceEvents"] if event["ph"] == "C" and event["name"] == "KV blocks"]
    gauges = [step.gauges for step in recorded_run().head]
    assert [block["travelling"] for block in blocks] == [gauge.travelling_blocks for gauge in gauges]
    assert all(event["pid"] == CONTROL_PLANE for event in trace["traceEvents"] if event["ph"] == "C")


def test_a_gap_between_first_and_last_steps_is_told(tmp_path):
    run = recorded_run()
    gapped = replace(run, head=run.head[:10], tail=run.head[-10:], num_skipped=len(run.head) - 20)
    write_chrome_trace(tmp_path / "t.json", gapped, manifest={})
    assert json.loads((tmp_path / "t.json").read_text())["otherData"]["steps_not_in_trace"] == len(run.head) - 20
    assert len(list(trace_events(gapped))) < len(list(trace_events(run)))


def test_a_failed_write_leaves_neither_half_a_file_nor_another(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_chrome_trace(path, recorded_run(), manifest={"not": object()})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
