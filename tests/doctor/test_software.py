"""Whether libraries fit, on this environment and on stand-ins for others."""

import importlib.metadata

import pytest

from pipemax.doctor import software
from pipemax.doctor.finding import Severity
from pipemax.doctor.software import software_findings
from tests.doctor.test_gpus import GPU, survey


def look(gpus):
    return {finding.subject: finding for finding in software_findings(gpus)}


def test_this_environment_has_what_the_package_asks_for():
    (finding,) = look(survey()).values()
    assert finding.severity is Severity.GOOD and "torch 2." in finding.found


def test_another_version_blocks(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        software.importlib.metadata, "version", lambda name: "4.9" if name == "transformers" else version(name)
    )
    finding = look(survey())["libraries"]
    assert finding.severity is Severity.BLOCKS and "transformers 4.9 is not <6,>=5.17" in finding.found


def test_a_missing_package_blocks(monkeypatch):
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: ["torch", "no-such-package-at-all>=1"])
    finding = look(survey())["libraries"]
    assert finding.severity is Severity.BLOCKS and finding.found == "no-such-package-at-all is missing"


@pytest.mark.parametrize(
    ("cuda", "visible", "severity", "words"),
    [
        (None, 0, Severity.BLOCKS, "a build for CPUs"),
        ("13.0", 0, Severity.BLOCKS, "does not start"),
        ("13.0", 1, Severity.NOTE, "1 of 2 GPUs visible"),
        ("13.0", 2, Severity.GOOD, "2 of 2 GPUs visible"),
    ],
)
def test_torch_on_a_machine_with_gpus(monkeypatch, cuda, visible, severity, words):
    import torch

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    finding = look(survey(GPU, GPU))["CUDA in torch"]
    assert finding.severity is severity and words in finding.found
    if visible == 1:
        assert finding.meaning == "one stage"


def test_flashinfer_that_is_not_there(monkeypatch):
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: None)
    finding = look(survey(GPU))["FlashInfer"]
    assert finding.severity is Severity.COSTS and "flashinfer" in finding.action


def test_flashinfer_that_does_not_import(monkeypatch):
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(software.importlib.metadata, "version", lambda name: "0.6.14")

    def fail(name):
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr(software.importlib, "import_module", fail)
    finding = software._flashinfer(survey(GPU))
    assert finding.severity is Severity.COSTS
    assert finding.found == "0.6.14 does not import: libcudart.so.13: cannot open shared object file"
