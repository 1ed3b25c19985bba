"""Metrics as a Prometheus server gets them: over HTTP, parsed."""

import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipemax.config import ConfigError
from pipemax.io.progress import JobCounts
from pipemax.report.metrics import MetricsAddress, MetricsServer, serve_metrics
from pipemax.report.recorder import StepRecorder
from tests.report.runs import CAPACITY, OUTPUT_LENGTHS, record

LOOPBACK = MetricsAddress("127.0.0.1", 0)


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_numbers_are_those_of_the_run():
    recorder, counts = StepRecorder(capacity=CAPACITY), JobCounts(total_rows=50)
    with MetricsServer(LOOPBACK, recorder=recorder, counts=counts) as server:
        before = scrape(server.port)
        assert before["pipemax_rows",] == 50 and before["pipemax_tokens_total", "output"] == 0
        assert ("pipemax_requests", "running") not in before
        sim = record(recorder)
        counts.answered_rows, counts.failed_rows = 39, 1
        after = scrape(server.port)
    assert after["pipemax_rows_done_total", "answered"] == 39 and after["pipemax_rows_done_total", "failed"] == 1
    assert after["pipemax_tokens_total", "output"] == sum(OUTPUT_LENGTHS.values())
    assert after["pipemax_link_bytes_total", "refill", "1"] == sim.stage_totals[1].refill_bytes
    assert after["pipemax_stage_seconds_total", "compute", "0"] == pytest.approx(sim.stage_totals[0].compute_seconds)
    assert sum(value for name, value in after.items() if name[0] == "pipemax_steps_total") == sim.num_steps
    assert after["pipemax_requests", "waiting"] == 0 and after["pipemax_output_tokens_per_second",] > 0


def test_the_port_is_free_again_afterwards():
    recorder, counts = StepRecorder(capacity=CAPACITY), JobCounts(1)
    with MetricsServer(LOOPBACK, recorder=recorder, counts=counts) as server:
        port = server.port
        with pytest.raises(ConfigError, match=f"--metrics-port: cannot listen on 127.0.0.1:{port}"):
            MetricsServer(MetricsAddress("127.0.0.1", port), recorder=recorder, counts=counts)
        with pytest.raises(ConfigError, match="choose another"):
            MetricsAddress("127.0.0.1", port).check()
    with pytest.raises(urllib.error.URLError):
        scrape(port)
    MetricsAddress("127.0.0.1", port).check()


def test_no_address_no_server():
    with serve_metrics(None, recorder=StepRecorder(capacity=CAPACITY), counts=JobCounts(1)) as server:
        assert server is None
