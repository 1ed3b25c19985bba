"""How findings are shown, and the examination of this machine as a whole."""

import io
import json

import pytest

from pipemax.doctor.display import findings_json, show_findings
from pipemax.doctor.examination import examine
from pipemax.doctor.finding import Finding, Severity

GOOD = Finding("cores", Severity.GOOD, "32", "enough")
COSTS = Finding("GPU 0 PCIe", Severity.COSTS, "x4", "slow [and] steady", "use another slot")
BLOCKS = Finding("open files", Severity.BLOCKS, "10", "too few", "ulimit -n 64")


@pytest.mark.parametrize(
    ("findings", "closing"),
    [
        ([GOOD], "nothing blocks a job"),
        ([GOOD, COSTS], "nothing blocks a job; 1 of 2 findings cost throughput"),
        ([GOOD, COSTS, BLOCKS], "1 of 3 findings block a job"),
    ],
)
def test_text(findings, closing):
    stream = io.StringIO()
    assert show_findings(iter(findings), stream) == findings
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert lines[0] == "ok     cores: 32" and lines[-1] == closing
    if COSTS in findings:
        assert "       slow [and] steady" in lines and "       do: use another slot" in lines


def test_json():
    assert json.loads(findings_json([COSTS])) == [
        {
            "subject": "GPU 0 PCIe",
            "severity": "costs",
            "found": "x4",
            "meaning": "slow [and] steady",
            "action": "use another slot",
        }
    ]


def test_this_machine_is_examined_to_the_end():
    findings = list(examine(measure=False))
    assert {"GPUs", "host memory", "CPU cores", "libraries"} & {finding.subject for finding in findings}
    assert all(finding.found and finding.meaning for finding in findings)
