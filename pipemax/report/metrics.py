"""`MetricsServer`: a job's numbers for Prometheus, on a port of this machine.

Values are read from the recorder and the job's counts when they are asked for, so that a job pays nothing in between.
Names follow Prometheus: base units, `_total` for what only grows. Never here: measuring.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipemax.config import ConfigError
from pipemax.plan import Phase
from pipemax.report.interval import StageUse
from pipemax.report.recorder import StepRecorder

_STAGE_SECONDS = {
    "compute": "compute_seconds",
    "window_wait": "window_wait_seconds",
    "input_wait": "activation_wait_seconds",
}


class RowCounts(Protocol):
    """A job's rows; the numbers change while it runs."""

    @property
    def total_rows(self) -> int: ...
    @property
    def answered_rows(self) -> int: ...
    @property
    def failed_rows(self) -> int: ...


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """Where to listen; port 0 takes a free one. An address other than loopback shows the numbers to the network."""

    host: str
    port: int

    def check(self) -> None:
        """Raises ConfigError when the port cannot be had now: better known before a model is loaded."""
        try:
            socket.create_server((self.host, self.port)).close()
        except OSError as error:
            raise self.refused(error) from None

    def refused(self, error: OSError) -> ConfigError:
        """What to tell a user of it."""
        reason = error.strerror or str(error)
        return ConfigError(f"--metrics-port: cannot listen on {self.host}:{self.port} ({reason}): choose another")


class MetricsServer:
    """Serves `/metrics` from a thread while the context is open. Raises ConfigError when the port cannot be had."""

    def __init__(self, address: MetricsAddress, *, recorder: StepRecorder, counts: RowCounts) -> None:
        registry = CollectorRegistry()
        registry.register(_JobCollector(recorder, counts))
        try:
            self._server, self._thread = start_http_server(address.port, addr=address.host, registry=registry)
        except OSError as error:
            raise address.refused(error) from None

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(
    address: MetricsAddress | None, *, recorder: StepRecorder, counts: RowCounts
) -> contextlib.AbstractContextManager[MetricsServer | None]:
    """A server, or nothing where no address is given."""
    if address is None:
        return contextlib.nullcontext()
    return MetricsServer(address, recorder=recorder, counts=counts)


class _JobCollector(Collector):
    def __init__(self, recorder: StepRecorder, counts: RowCounts) -> None:
        self._recorder = recorder
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        totals, live = self._recorder.totals(), self._recorder.live()
        counts = self._counts
        yield _gauge("pipemax_rows", "Rows of the input.", counts.total_rows)
        rows = CounterMetricFamily("pipemax_rows_done", "Rows that have ended.", labels=["outcome"])
        rows.add_metric(["answered"], counts.answered_rows)
        rows.add_metric(["failed"], counts.failed_rows)
        yield rows
        tokens = CounterMetricFamily("pipemax_tokens", "Tokens computed.", labels=["kind"])
        tokens.add_metric(["prefill"], totals.prefill_tokens)
        tokens.add_metric(["output"], totals.output_tokens)
        yield tokens
        steps = CounterMetricFamily("pipemax_steps", "Steps done.", labels=["phase"])
        for phase in Phase:
            steps.add_metric([str(phase)], totals.steps[phase])
        yield steps
        blocks = CounterMetricFamily("pipemax_kv_blocks_moved", "KV blocks that moved.", labels=["direction"])
        blocks.add_metric(["refill"], totals.refill_blocks)
        blocks.add_metric(["home"], totals.home_blocks)
        yield blocks
        yield from _stages(totals.stages)
        yield _gauge(
            "pipemax_output_tokens_per_second", "Over about the last ten seconds.", live.output_tokens_per_second
        )
        if live.gauges is not None:
            gauges = live.gauges
            requests = GaugeMetricFamily("pipemax_requests", "Live requests.", labels=["state"])
            for state in ("waiting", "ready", "running"):
                requests.add_metric([state], getattr(gauges, f"num_{state}"))
            yield requests
            held = GaugeMetricFamily("pipemax_kv_blocks", "KV blocks taken.", labels=["place"])
            held.add_metric(["resident"], gauges.resident_blocks)
            held.add_metric(["window"], gauges.window_blocks)
            held.add_metric(["home"], gauges.home_blocks)
            yield held


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _stages(stages: list[StageUse]) -> Iterator[Metric]:
    seconds = CounterMetricFamily("pipemax_stage_seconds", "Where stages' time went.", labels=["stage", "activity"])
    moved = CounterMetricFamily("pipemax_link_bytes", "Bytes over host links.", labels=["stage", "direction"])
    for index, use in enumerate(stages):
        for activity, name in _STAGE_SECONDS.items():
            seconds.add_metric([str(index), activity], getattr(use, name))
        moved.add_metric([str(index), "refill"], use.refill_bytes)
        moved.add_metric([str(index), "home"], use.home_bytes)
    yield seconds
    yield moved
