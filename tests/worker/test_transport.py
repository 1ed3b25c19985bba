"""Stage links between real processes, over gloo on the loopback interface."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipemax.config import ConfigError
from pipemax.worker import transport
from pipemax.worker.link import LinkError
from pipemax.worker.transport import LinkMedium, StageLinks, possible_media

HIDDEN = 96
# Tokens and samples of each step: the first stage hands all of them on before it looks at any answer.
STEPS = [(1 + 37 * step % 90, step % 4) for step in range(24)]


def run_stages(stages: list[Callable[[int, int, Path], object]], folder: Path) -> list[object]:
    """Runs stage i as stages[i](i, number of stages, rendezvous), each in a process; what each returned or raised."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipemax.worker.preload"])
    processes, pipes = [], []
    for index, stage in enumerate(stages):
        pipe, child_pipe = context.Pipe(duplex=False)
        process = context.Process(
            target=report, args=(child_pipe, stage, index, len(stages), folder / "rendezvous"), daemon=True
        )
        process.start()
        child_pipe.close()
        processes.append(process)
        pipes.append(pipe)
    outcomes = []
    try:
        for pipe in pipes:
            assert pipe.poll(60), "a stage hangs"
            try:
                outcomes.append(pipe.recv())
            except EOFError:
                outcomes.append(None)
    finally:  # they wait for nothing, and take no notice of SIGTERM
        for process in processes:
            process.kill()
            process.join()
    return outcomes


KEPT: list[StageLinks] = []


def connect(stage: int, num_stages: int, rendezvous: Path) -> StageLinks:
    """Links that live as long as the process: a send that is dropped before it has arrived is cancelled."""
    links = StageLinks(stage=stage, num_stages=num_stages, rendezvous=rendezvous)
    KEPT.append(links)
    return links


def report(pipe: Connection, stage: Callable[[int, int, Path], object], *arguments: object) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        try:
            pipe.send(stage(*arguments))  # type: ignore[arg-type]
        except LinkError as error:
            pipe.send(error)
    signal.pause()  # stays, so that links do not break before the others are done


def many_steps(stage: int, num_stages: int, rendezvous: Path) -> object:
    """Stage s adds s to what it gets; the last stage answers with the sum over each of the first rows."""
    links = connect(stage, num_stages, rendezvous)
    links.set_hidden(HIDDEN, torch.bfloat16)
    num_answers = 0
    for step, (num_tokens, num_samples) in enumerate(STEPS):
        if stage == 0:
            hidden_TH = torch.full((num_tokens, HIDDEN), float(step), dtype=torch.bfloat16)
        else:
            links.expect_hidden(num_tokens)
            hidden_TH = links.receive_hidden() + stage
            assert hidden_TH.shape == (num_tokens, HIDDEN)
        if stage < num_stages - 1:
            links.send_hidden(hidden_TH)
            if stage == 0 and num_samples:
                links.expect_tokens(num_samples)
                num_answers += 1
        elif num_samples:
            links.send_tokens(hidden_TH[:1].sum(dim=1).to(torch.int32).expand(num_samples).contiguous())
    return [links.receive_tokens().tolist() for _ in range(num_answers)]


@pytest.mark.parametrize("num_stages", [2, 3])
def test_many_steps_in_flight_arrive_whole_and_in_order(num_stages: int, tmp_path: Path) -> None:
    answers = run_stages([many_steps] * num_stages, tmp_path)[0]
    added = sum(range(num_stages))
    assert answers == [[(step + added) * HIDDEN] * samples for step, (_, samples) in enumerate(STEPS) if samples]


def many_halves(stage: int, num_stages: int, rendezvous: Path) -> object:
    """The last stage sends of each step what it is and its negative; the first takes all of them at the end."""
    links = StageLinks(stage=stage, num_stages=num_stages, rendezvous=rendezvous, returns_halves=True)
    KEPT.append(links)
    links.set_hidden(HIDDEN, torch.bfloat16)
    if stage == num_stages - 1:
        for step, (num_rows, _) in enumerate(STEPS):
            hidden_SH = torch.full((num_rows, HIDDEN), float(step), dtype=torch.bfloat16)
            links.send_half(hidden_SH, torch.full((num_rows, 40), -float(step)))
    if stage > 0:
        return None
    links.set_half(40, torch.float32)
    for num_rows, _ in STEPS:
        links.expect_half(num_rows)
    halves = [links.receive_half() for _ in STEPS]
    return [
        (tuple(hidden.shape), tuple(logits.shape), set(hidden.unique().tolist()) | set(logits.unique().tolist()))
        for hidden, logits in halves
    ]


@pytest.mark.parametrize("num_stages", [2, 3])
def test_halves_of_many_steps_come_whole_and_in_order(num_stages: int, tmp_path: Path) -> None:
    halves = run_stages([many_halves] * num_stages, tmp_path)[0]
    assert halves == [
        ((num_rows, HIDDEN), (num_rows, 40), {float(step), -float(step)}) for step, (num_rows, _) in enumerate(STEPS)
    ]


def dies_after_connecting(stage: int, num_stages: int, rendezvous: Path) -> object:
    connect(stage, num_stages, rendezvous)
    os._exit(3)


def waits_for_hidden(stage: int, num_stages: int, rendezvous: Path) -> object:
    links = connect(stage, num_stages, rendezvous)
    links.set_hidden(HIDDEN, torch.float32)
    links.expect_hidden(5)
    return links.receive_hidden()


def waits_for_tokens(stage: int, num_stages: int, rendezvous: Path) -> object:
    links = connect(stage, num_stages, rendezvous)
    links.expect_tokens(5)
    return links.receive_tokens()


def test_a_dead_stage_before_breaks_the_link(tmp_path: Path) -> None:
    assert isinstance(run_stages([dies_after_connecting, waits_for_hidden], tmp_path)[1], LinkError)


def test_a_dead_last_stage_breaks_the_link_to_the_first(tmp_path: Path) -> None:
    assert isinstance(run_stages([waits_for_tokens, dies_after_connecting], tmp_path)[0], LinkError)


def connects_alone(stage: int, num_stages: int, rendezvous: Path) -> object:
    transport.CONNECT_TIMEOUT = timedelta(seconds=0.5)
    return StageLinks(stage=0, num_stages=2, rendezvous=rendezvous)


def test_a_stage_that_never_comes_does_not_hang_the_others(tmp_path: Path) -> None:
    error = run_stages([connects_alone], tmp_path)[0]
    assert isinstance(error, LinkError) and "stage 0 could not connect" in str(error)


def closes_one_of_two(stage: int, num_stages: int, rendezvous: Path) -> object:
    """Sockets before, with both and afterwards, and whether what is left still carries messages."""
    left = connect(stage, num_stages, rendezvous)
    before = count_sockets()
    other = StageLinks(stage=stage, num_stages=num_stages, rendezvous=rendezvous)
    for links in (other, left):
        links.set_hidden(HIDDEN, torch.float32)
        if stage == 0:
            links.send_hidden(torch.ones(3, HIDDEN))
        else:
            links.expect_hidden(3)
            assert links.receive_hidden().sum() == 3 * HIDDEN
    both = count_sockets()
    other.close()
    other.close()
    return before, both, count_sockets()


def count_sockets() -> int:
    return sum(_is_socket(fd) for fd in os.listdir("/proc/self/fd"))


def test_closed_links_leave_the_others_alone(tmp_path: Path) -> None:
    for before, both, after in run_stages([closes_one_of_two] * 2, tmp_path):  # type: ignore[misc]
        assert after == before < both


def listening_addresses(stage: int, num_stages: int, rendezvous: Path) -> object:
    connect(stage, num_stages, rendezvous)
    inodes = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_socket(fd)}
    addresses = []
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            words = line.split()
            if f"socket:[{words[9]}]" in inodes:
                addresses.append(words[1].rpartition(":")[0])
    return addresses


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False


def test_sockets_are_on_the_loopback_interface_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    loopback = socket.inet_aton("127.0.0.1")[::-1].hex().upper()
    for addresses in run_stages([listening_addresses] * 2, tmp_path):
        assert addresses and set(addresses) == {loopback}  # type: ignore[call-overload]


def test_a_single_stage_has_no_links(tmp_path: Path) -> None:
    StageLinks(stage=0, num_stages=1, rendezvous=tmp_path / "rendezvous")
    assert not dist.is_initialized() and not (tmp_path / "rendezvous").exists()


def test_sockets_are_bound_to_the_loopback_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def record(*arguments: object, **settings: object) -> None:
        seen.append((os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")))
        raise RuntimeError("that is enough")

    monkeypatch.setattr(transport.dist, "init_process_group", record)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    with pytest.raises(LinkError):
        StageLinks(stage=0, num_stages=2, rendezvous=tmp_path / "rendezvous")
    assert seen == [("lo", "eth7")]
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")  # set by the code under test
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    with pytest.raises(LinkError):
        StageLinks(stage=0, num_stages=2, rendezvous=tmp_path / "rendezvous")
    assert seen[1] == ("lo", "lo")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("device", "gpus", "wanted", "p2p", "can_wait", "media"),
    [
        ("cpu", (0, 1), None, False, False, (LinkMedium.HOST,)),
        ("cuda", (0, 1), None, True, True, (LinkMedium.NCCL, LinkMedium.HOST)),
        ("cuda", (0, 1), None, False, True, (LinkMedium.HOST,)),
        ("cuda", (0, 1), None, False, False, (LinkMedium.NCCL,)),
        ("cuda", (0, 0), None, True, True, (LinkMedium.HOST,)),
        ("cuda", (0, 1), "host", True, True, (LinkMedium.HOST,)),
        ("cuda", (0, 1), "nccl", False, True, (LinkMedium.NCCL,)),
    ],
)
def test_there_is_a_choice_where_gpus_reach_each_other(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    gpus: tuple[int, int],
    wanted: str | None,
    p2p: bool,
    can_wait: bool,
    media: tuple[LinkMedium, ...],
) -> None:
    machine(monkeypatch, wanted=wanted, p2p=p2p, can_wait=can_wait)
    assert possible_media(torch.device(device), gpus=gpus) == media


def machine(monkeypatch: pytest.MonkeyPatch, *, wanted: str | None, p2p: bool, can_wait: bool) -> None:
    monkeypatch.delenv("PIPEMAX_STAGE_LINK", raising=False)
    if wanted is not None:
        monkeypatch.setenv("PIPEMAX_STAGE_LINK", wanted)
    monkeypatch.setattr(transport, "reach_each_other", lambda gpus: p2p)
    monkeypatch.setattr(transport, "streams_can_wait", lambda device: can_wait)


@pytest.mark.parametrize(
    ("device", "gpus", "wanted", "can_wait", "message"),
    [
        ("cpu", (0, 1), "nccl", False, "PIPEMAX_STAGE_LINK=nccl needs a GPU for each stage"),
        ("cpu", (0, 1), "infiniband", False, "PIPEMAX_STAGE_LINK must be host or nccl, got 'infiniband'"),
        ("cuda", (0, 0), "nccl", True, "PIPEMAX_STAGE_LINK=nccl needs a GPU for each stage"),
        ("cuda", (0, 1), "host", False, "PIPEMAX_STAGE_LINK=host needs a driver with stream memory operations"),
        ("cuda", (0, 0), None, False, "give every stage a GPU of its own"),
    ],
)
def test_a_medium_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    gpus: tuple[int, int],
    wanted: str | None,
    can_wait: bool,
    message: str,
) -> None:
    machine(monkeypatch, wanted=wanted, p2p=True, can_wait=can_wait)
    with pytest.raises(ConfigError, match=message):
        possible_media(torch.device(device), gpus=gpus)


@pytest.mark.parametrize(
    ("disabled", "unreachable", "reach"),
    [(None, None, True), ("0", None, True), ("1", None, False), (None, (1, 2), False), (None, (2, 0), False)],
)
def test_gpus_reach_each_other_along_the_links(
    monkeypatch: pytest.MonkeyPatch, disabled: str | None, unreachable: tuple[int, int] | None, reach: bool
) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if disabled is not None:
        monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) != unreachable)
    assert transport.reach_each_other((0, 1, 2)) is reach
