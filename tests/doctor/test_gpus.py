"""What the driver says of GPUs, and what is made of it; the driver here is a stand-in with NVML's functions."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipemax.doctor.finding import Severity
from pipemax.doctor.gpus import Gpu, GpuSurvey, PeerAccess, gpu_findings, read_gpus

GIB = 1024**3
GPU = Gpu(
    index=0,
    name="NVIDIA GeForce RTX 4090",
    memory_bytes=24 * GIB,
    free_memory_bytes=23 * GIB + GIB // 2,
    compute_capability=(8, 9),
    pcie_generation=4,
    pcie_lanes=16,
    max_pcie_generation=4,
    max_pcie_lanes=16,
    replays=0,
    num_processes=0,
)


def survey(*gpus, peer=PeerAccess.NONE):
    peers = tuple(tuple(PeerAccess.NONE if a is b else peer for b in gpus) for a in gpus)
    return GpuSurvey("580.65", "13.0", gpus, peers)


def severities(findings):
    return {finding.subject: finding.severity for finding in findings}


def test_eight_good_cards():
    gpus = tuple(replace(GPU, index=index) for index in range(8))
    findings = gpu_findings(survey(*gpus))
    assert set(severities(findings).values()) == {Severity.GOOD}
    assert findings[0].found == "8 x NVIDIA GeForce RTX 4090 (24 GiB)"
    assert findings[0].meaning == "up to 8 stages: --pipeline-parallel-size 8"
    assert "no peer access between 28 of 28 pairs" in findings[-1].found


def test_one_card_is_one_stage():
    assert gpu_findings(survey(GPU))[0].meaning == "one stage: --pipeline-parallel-size 1"


@pytest.mark.parametrize(
    ("changes", "subject", "severity", "words"),
    [
        ({"pcie_lanes": 4}, "GPU 0 PCIe", Severity.COSTS, "25%"),
        ({"pcie_generation": 1}, "GPU 0 PCIe", Severity.NOTE, "generation 1 x16 now, 4 x16 at most"),
        ({"pcie_lanes": None}, "GPU 0 PCIe", Severity.NOTE, "does not tell"),
        ({"replays": 1234}, "GPU 0 PCIe errors", Severity.COSTS, "1,234"),
        ({"free_memory_bytes": 10 * GIB, "num_processes": 2}, "GPU 0 memory", Severity.COSTS, "2 processes"),
        ({"compute_capability": (7, 5)}, "GPU 0 generation", Severity.COSTS, "7.5"),
    ],
)
def test_what_is_wrong_with_a_card(changes, subject, severity, words):
    (finding,) = [one for one in gpu_findings(survey(replace(GPU, **changes))) if one.subject == subject]
    assert finding.severity is severity
    assert words in finding.found + finding.meaning
    if severity is Severity.COSTS:
        assert finding.action


def test_unequal_cards():
    other = replace(GPU, index=1, name="NVIDIA GeForce RTX 3060", memory_bytes=12 * GIB, free_memory_bytes=12 * GIB)
    finding = gpu_findings(survey(GPU, other))[0]
    assert finding.severity is Severity.COSTS and "1 x NVIDIA GeForce RTX 3060 (12 GiB)" in finding.found


@pytest.mark.parametrize(
    ("peer", "severity"),
    [
        (PeerAccess.NVLINK, Severity.NOTE),
        (PeerAccess.PCIE, Severity.GOOD),
        (PeerAccess.NONE, Severity.GOOD),
        (PeerAccess.UNKNOWN, Severity.NOTE),
    ],
)
def test_peers(peer, severity):
    assert severities(gpu_findings(survey(GPU, replace(GPU, index=1), peer=peer)))["GPU to GPU"] is severity


class RefusedError(Exception):
    pass


class Driver(SimpleNamespace):
    """Two GPUs; `missing` are functions that this driver refuses."""

    NVMLError = RefusedError
    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_CAPS_INDEX_READ, NVML_P2P_STATUS_OK = 2, 0, 0

    def __init__(self, *, missing=(), peer_status=1):
        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: f"gpu-{index}",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 13010,
            "nvmlSystemGetDriverVersion": lambda: b"590.1",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=24 * GIB, free=23 * GIB),
            "nvmlDeviceGetName": lambda handle: "Card",
            "nvmlDeviceGetCudaComputeCapability": lambda handle: [8, 9],
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [1],
            "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 3,
            "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 8,
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 4,
            "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
            "nvmlDeviceGetPcieReplayCounter": lambda handle: 0,
            "nvmlDeviceGetP2PStatus": lambda one, other, index: peer_status,
        }

        def refuse(*arguments):
            raise RefusedError("Not Supported")

        super().__init__(**{name: refuse if name in missing else answer for name, answer in answers.items()})


def test_reading(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    read = read_gpus()
    assert (read.driver_version, read.cuda_version, read.problem) == ("590.1", "13.1", "")
    assert [gpu.index for gpu in read.gpus] == [0, 1]
    assert read.gpus[0].pcie_lanes == 8 and read.gpus[0].num_processes == 1
    assert read.peers[0][1] is PeerAccess.NONE


def test_reading_what_a_driver_refuses(monkeypatch):
    missing = ("nvmlDeviceGetPcieReplayCounter", "nvmlDeviceGetCurrPcieLinkWidth", "nvmlDeviceGetP2PStatus")
    monkeypatch.setitem(sys.modules, "pynvml", Driver(missing=missing))
    read = read_gpus()
    assert read.gpus[0].replays is None and read.gpus[0].pcie_lanes is None
    assert read.peers[0][1] is PeerAccess.UNKNOWN
    assert all(finding.found for finding in gpu_findings(read))


def test_without_a_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Driver(missing=("nvmlInit",)))
    read = read_gpus()
    assert read.gpus == () and read.problem == "Not Supported"
    (finding,) = gpu_findings(read)
    assert finding.severity is Severity.NOTE and "Not Supported" in finding.found
