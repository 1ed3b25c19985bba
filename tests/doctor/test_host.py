"""What is said of a machine, on made-up file systems and limits."""

import pytest

from pipemax.doctor.finding import Severity
from pipemax.doctor.host import ProcessLimits, host_findings, shared_memory_free_bytes

GIB = 1024**3
LIMITS = ProcessLimits(locked_bytes=None, open_files=65536)


@pytest.fixture
def root(tmp_path):
    """A machine with 64 GiB, 40 of them free, no control group, one memory node."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {64 * 1024**2} kB\nMemAvailable: {40 * 1024**2} kB\n")
    (tmp_path / "sys/devices/system/node/node0").mkdir(parents=True)
    return tmp_path


def look(root, *, limits=LIMITS, num_gpus=1, shared_memory_bytes=GIB):
    findings = host_findings(limits=limits, num_gpus=num_gpus, shared_memory_bytes=shared_memory_bytes, root=root)
    return {finding.subject: finding for finding in findings}


def test_a_good_machine(root):
    found = look(root)
    assert {finding.severity for finding in found.values()} == {Severity.GOOD}
    assert found["host memory"].found == "40.0 GiB free to this process, of 64.0 GiB in the machine"


def test_a_control_group_counts(root):
    (root / "proc/self/cgroup").write_text("0::/job\n")
    group = root / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(str(4 * GIB))
    (group / "memory.current").write_text(str(GIB))
    (group / "cpu.max").write_text("100000 100000")
    found = look(root, num_gpus=4)
    assert found["host memory"].severity is Severity.COSTS and found["host memory"].found.startswith("3.0 GiB free")
    assert found["CPU cores"].severity is Severity.COSTS and "at least 5 cores" in found["CPU cores"].action


def test_limits(root):
    found = look(root, limits=ProcessLimits(locked_bytes=65536, open_files=100), num_gpus=4)
    assert found["open files (ulimit -n)"].severity is Severity.BLOCKS
    assert "ulimit -n 256" in found["open files (ulimit -n)"].action


def test_locked_memory_is_for_those_who_are_not_root(root, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    limited = ProcessLimits(locked_bytes=8 * 1024**2, open_files=None)
    assert look(root, limits=limited)["locked memory (ulimit -l)"].severity is Severity.NOTE
    assert look(root)["locked memory (ulimit -l)"].severity is Severity.GOOD
    assert "locked memory (ulimit -l)" not in look(root, num_gpus=0)


@pytest.mark.parametrize(
    ("free", "severity"), [(None, Severity.BLOCKS), (16 * 1024**2, Severity.BLOCKS), (GIB, Severity.GOOD)]
)
def test_shared_memory_matters_between_gpus(root, free, severity):
    subject = "shared memory (/dev/shm)"
    assert look(root, num_gpus=2, shared_memory_bytes=free)[subject].severity is severity
    assert subject not in look(root, num_gpus=1, shared_memory_bytes=free)


def test_memory_nodes(root):
    (root / "sys/devices/system/node/node1").mkdir()
    assert look(root)["NUMA"].found == "2 memory nodes"


def test_this_machine():
    limits = ProcessLimits.read()
    assert limits.open_files is None or limits.open_files > 0
    assert shared_memory_free_bytes() is None or shared_memory_free_bytes() >= 0
    for finding in host_findings(limits=limits, num_gpus=0, shared_memory_bytes=None):
        assert finding.severity in (Severity.GOOD, Severity.NOTE)
