"""The report: what it says, that it holds together as a page, and how a real browser takes it (where there is one)."""

import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from pipemax.observer import EngineGauges
from pipemax.plan import Phase
from pipemax.report import charts
from pipemax.report.html_report import JobOutcome, render_html_report, timeline_window, write_html_report
from pipemax.report.manifest import run_manifest
from pipemax.report.palette import COLOURS
from pipemax.report.recorder import StepRecorder
from pipemax.report.row_log import RowLog
from tests.report.browser import chromium, use_colour_scheme
from tests.report.runs import CAPACITY, recorded_run

CHARTS = ["throughput", "stages", "batches", "kv", "link", "prediction", "pipeline"]
OUTCOME = JobOutcome("requests.jsonl with some-model", 42, 40, 2)
HOSTILE = "<script>alert(1)</script>&\"'"


@pytest.fixture(scope="module")
def rows():
    log = RowLog()
    for number in range(40):
        log.started(f"row-{number}", now_seconds=0.1 * number)
        log.answered(
            f"row-{number}", prompt_tokens=10, output_tokens=number, finish_reason="stop", now_seconds=0.2 * number
        )
    log.refused(HOSTILE, code="invalid_value", message=f"max_tokens must be at least 1, got {HOSTILE}")
    log.refused(None, code="invalid_json", message="line 7 is not JSON")
    return log


@pytest.fixture(scope="module")
def manifest():
    return run_manifest(
        command=["pipemax", "run-batch", "-i", HOSTILE], settings={"model": HOSTILE}, capacity=asdict(CAPACITY)
    )


@pytest.fixture(scope="module")
def page(rows, manifest):
    return render_html_report(recorded_run(), outcome=OUTCOME, manifest=manifest, rows=rows)


class Structure(HTMLParser):
    """Ids, tags and unclosed elements of a page."""

    VOID = {"meta", "link", "br"}

    def __init__(self, page):
        super().__init__()
        self.ids, self.tags, self.open, self.references = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        for name in ("href", "src", "xlink:href"):
            if name in values:
                self.references.append(values[name])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_its_ids_are_unique(page):
    structure = Structure(page)
    assert structure.open == []
    assert len(structure.ids) == len(set(structure.ids))
    assert [name for name in structure.ids if name in CHARTS] == CHARTS
    for name in re.findall(r"url\(#([^)]*)\)", page):
        assert name in structure.ids
    for reference in structure.references:
        assert reference == "data:," or reference[1:] in structure.ids


def test_nothing_is_loaded_and_nothing_runs(page):
    assert "script" not in Structure(page).tags
    assert "http://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page) and "https://" not in page


def test_what_users_write_is_text(page):
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4  # id, message, command, model


def test_every_colour_is_one_of_the_palette(page):
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) <= set(COLOURS)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == len(CHARTS)
    assert not any(re.search(r"(fill|stroke): #(?!000000|ffffff)", drawing) for drawing in drawings)


def test_numbers_of_the_run(page):
    totals = recorded_run().totals
    text = re.sub(r"<[^>]*>", " ", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    words = " ".join(text.split())
    assert f"{totals.output_tokens:,} output tokens" in words
    assert "40 of 42 rows answered" in words and "2 rows failed" in words
    assert f"decode {totals.steps[Phase.DECODE]:,}" in words
    assert "1.11" in words  # measured over expected: the forecast is 10 % too low
    assert "1 x invalid_json , 1 x invalid_value" in words and "line 7 is not JSON" in words


def test_the_slowest_rows_come_first(page):
    table = page[page.index('id="slowest"') :]
    assert re.findall(r"<code>(row-\d+)</code>", table)[:3] == ["row-39", "row-38", "row-37"]


def test_remarks_name_what_was_slow(page):
    assert "waited for the window" in page and "Worth a look" in page
    calm = replace(
        recorded_run().totals,
        stages=[replace(use, window_wait_seconds=0, activation_wait_seconds=0) for use in recorded_run().totals.stages],
    )
    for use in calm.stages:
        use.compute_seconds = recorded_run().elapsed_seconds
    quiet = render_html_report(
        replace(recorded_run(), totals=calm),
        outcome=OUTCOME,
        manifest=run_manifest(command=[], settings={}, capacity={}),
    )
    assert "Worth a look" not in quiet


def test_a_run_that_ended_before_its_first_step(manifest):
    run = StepRecorder(capacity=CAPACITY).snapshot()
    outcome = JobOutcome("x", 3, 0, 3, problem="stage 1 was killed by SIGKILL")
    page = render_html_report(run, outcome=outcome, manifest=manifest, rows=RowLog())
    assert "stage 1 was killed by SIGKILL" in page and "<svg" not in page


def test_a_run_without_rows_or_forecast(manifest):
    run = recorded_run()
    bare = tuple(replace(step, gauges=replace(step.gauges, expected_seconds=0.0)) for step in run.head)
    page = render_html_report(
        replace(run, head=bare), outcome=JobOutcome("simulated", 0, 0, 0), manifest=manifest, rows=None
    )
    assert "rows answered" not in page and "Slowest" not in page
    assert 'id="prediction"' not in page and "not known" in page


def test_the_timeline_is_taken_from_the_middle_of_decode():
    run = recorded_run()
    steps = timeline_window(run)
    assert len(steps) == 12 and all(step.phase is Phase.DECODE for step in steps)
    assert steps[0].step_id > run.head[0].step_id and steps[-1].step_id < run.head[-1].step_id
    assert tuple(timeline_window(replace(run, head=run.head[:1]))) == run.head[:1]
    assert timeline_window(replace(run, head=(), tail=())) == ()


def test_the_timeline_says_when_it_begins():
    run = recorded_run()
    steps = timeline_window(run)
    svg = charts.pipeline_chart(run, steps)
    assert svg is not None and f"ms from {steps[0].stages[0].start_seconds:.3f} s on" in svg


def test_charts_of_a_run_without_copies():
    run = recorded_run()
    totals = replace(run.totals, stages=[replace(use, refill_bytes=0, home_bytes=0) for use in run.totals.stages])
    assert charts.link_chart(replace(run, totals=totals)) is None
    assert charts.kv_chart(replace(run, intervals=())) is None
    assert charts.pipeline_chart(run, ()) is None


def test_gauges_hold_where_nothing_was_planned():
    recorder = StepRecorder(capacity=CAPACITY)
    run = recorded_run()
    full = next(interval for interval in run.intervals if interval.gauges is not None)
    empty = replace(full, gauges=None)
    svg = charts.kv_chart(replace(run, intervals=(full, empty, empty, full), elapsed_seconds=1.0))
    assert svg is not None and "nan" not in svg
    assert isinstance(full.gauges, EngineGauges) and recorder.live().gauges is None


def test_writing_replaces_the_file(tmp_path, manifest):
    path = tmp_path / "report.html"
    path.write_text("old")
    write_html_report(path, recorded_run(), outcome=OUTCOME, manifest=manifest)
    assert path.read_text().startswith("<!doctype html>") and list(tmp_path.iterdir()) == [path]


def test_the_manifest_is_enough_to_run_it_again_and_has_no_environment(manifest, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    again = run_manifest(command=["pipemax", "x y"], settings={"a": None, "b": 3}, capacity=asdict(CAPACITY))
    assert again["settings"] == {"a": None, "b": 3} and again["capacity"]["num_stages"] == 2
    assert again["versions"]["python"] and again["versions"]["torch"] and again["host"]["cores"] >= 1
    assert "hunter2" not in repr(again)
    assert again["command"] == "pipemax 'x y'"


def test_in_a_browser(tmp_path, page):
    path = tmp_path / "report.html"
    path.write_text(page)
    with chromium() as session:
        session.get(path.as_uri())
        assert session.get_log("browser") == []
        requests = [
            entry for entry in session.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
        ]
        assert all("report.html" in entry["message"] or "data:," in entry["message"] for entry in requests)
        boxes = session.execute_script(
            "return [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect())"
            ".map(b => [b.width, b.height])"
        )
        assert len(boxes) == len(CHARTS) and all(width > 600 and height > 100 for width, height in boxes)
        text = "return getComputedStyle(document.querySelector('#throughput text')).fill"
        body = "return getComputedStyle(document.body).backgroundColor"
        seen = {}
        for scheme in ("light", "dark"):
            use_colour_scheme(session, scheme)
            seen[scheme] = (session.execute_script(text), session.execute_script(body))
        assert seen["light"][1] == "rgb(255, 255, 255)" and seen["dark"][1] == "rgb(20, 23, 26)"
        assert seen["light"][0] != seen["dark"][0]
        session.set_window_size(420, 900)
        assert session.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        session.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        use_colours = session.execute_script(body)
        assert use_colours == "rgb(255, 255, 255)"  # paper is white, also for those who like their screen dark
