"""`pipemax doctor` as a user meets it."""

import json
import sys

import pytest

from pipemax import cli
from pipemax.doctor.finding import Finding, Severity


@pytest.fixture
def doctor(monkeypatch):
    """Runs the command on a machine with these findings."""

    def run(*arguments, findings):
        asked = []

        def examine(*, measure):
            asked.append(measure)
            return iter(findings)

        monkeypatch.setattr("pipemax.doctor.examination.examine", examine)
        monkeypatch.setattr(sys, "argv", ["pipemax", "doctor", *arguments])
        return cli.main(), asked

    return run


@pytest.mark.parametrize(("severity", "code"), [(Severity.GOOD, 0), (Severity.COSTS, 0), (Severity.BLOCKS, 1)])
def test_the_exit_code_says_whether_something_blocks(doctor, capsys, severity, code):
    assert doctor(findings=[Finding("cores", severity, "32", "fine")]) == (code, [True])
    assert "cores: 32" in capsys.readouterr().out


def test_json_and_no_measuring(doctor, capsys):
    assert doctor("--json", "--no-measure", findings=[Finding("cores", Severity.BLOCKS, "0", "none")]) == (1, [False])
    assert json.loads(capsys.readouterr().out)[0]["severity"] == "blocks"


def test_on_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipemax", "doctor", "--no-measure"])
    assert cli.main() in (0, 1)
    assert "host memory" in capsys.readouterr().out
