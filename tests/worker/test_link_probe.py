"""Links measured at the start: the decision exactly, the rounds between real processes over gloo as both media."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipemax.config import ConfigError, LoadFormat
from pipemax.cuda_options import CudaOptions
from pipemax.worker import stage_process, transport
from pipemax.worker.link import LinkError
from pipemax.worker.link_probe import LinkFigures, LinkProbe, StepMessages, better_medium, probe_links
from pipemax.worker.pulse import Pulse
from pipemax.worker.stage_model import StageSlice
from pipemax.worker.stage_process import StageSettings
from pipemax.worker.start_up import StartUp, StartUpPart
from pipemax.worker.transport import LinkMedium, StageLinks
from tests.worker.families import config_of, save_model
from tests.worker.test_transport import HIDDEN, KEPT, count_sockets, run_stages

CPU = torch.device("cpu")
MESSAGES = StepMessages(decode_rows=4, prefill_rows=300, hidden_size=HIDDEN, dtype=torch.bfloat16)
SLOW_SECONDS = 0.05


def figures(medium: LinkMedium, *links: tuple[float, float]) -> list[LinkFigures]:
    """By link: microseconds of a decode message, GB/s of a prefill message."""
    return [
        LinkFigures(sender, sender + 1, medium, 1e-6 * microseconds, 1e9 * rate)
        for sender, (microseconds, rate) in enumerate(links)
    ]


# A decode message of 1,000,000 bytes: 1,000 us of it are worth as much as 1 GB/s.
@pytest.mark.parametrize(
    ("nccl", "host", "medium"),
    [
        ([(95, 31)], [(210, 11)], LinkMedium.NCCL),
        ([(900, 2)], [(210, 11)], LinkMedium.HOST),
        # Nearly equal.
        ([(100, 10)], [(105, 10)], LinkMedium.NCCL),  # 0.2 to 0.205 ns a byte
        ([(105, 10)], [(100, 10)], LinkMedium.HOST),
        # What is lost on one size may be won on the other.
        ([(100, 10)], [(300, 20)], LinkMedium.NCCL),  # 0.2 to 0.35
        ([(300, 20)], [(100, 10)], LinkMedium.HOST),
        ([(100, 1)], [(300, 4)], LinkMedium.HOST),  # 1.1 to 0.55
        # The slowest link counts, wherever it is.
        ([(10, 50), (900, 2), (10, 50)], [(210, 11), (210, 11), (210, 11)], LinkMedium.HOST),
        ([(95, 31), (95, 31), (95, 31)], [(20, 90), (20, 90), (210, 11)], LinkMedium.NCCL),
    ],
)
def test_the_medium_is_that_whose_slowest_link_costs_a_job_less(
    nccl: list[tuple[float, float]], host: list[tuple[float, float]], medium: LinkMedium
) -> None:
    measured = [*figures(LinkMedium.NCCL, *nccl), *figures(LinkMedium.HOST, *host)]
    assert better_medium(measured, decode_bytes=1_000_000) is medium
    assert better_medium(measured[::-1], decode_bytes=1_000_000) is medium


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "rows"),
    [
        (256, 1024, (64, 1024)),
        (16, 1024, (16, 1024)),
        (256, 32, (64, 64)),
        (256, 100_000, (64, 2048)),  # of 16 KiB each: 32 MiB
    ],
)
def test_messages_are_those_of_steps(max_num_seqs: int, max_num_batched_tokens: int, rows: tuple[int, int]) -> None:
    messages = StepMessages.of_steps(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        hidden_size=8192,
        dtype=torch.bfloat16,
    )
    assert (messages.decode_rows, messages.prefill_rows) == rows and messages.row_bytes == 16384


class SlowLinks(StageLinks):
    """Every activation leaves late."""

    def send_hidden(self, hidden_TH: Tensor) -> None:
        time.sleep(SLOW_SECONDS)
        super().send_hidden(hidden_TH)


class WrongLinks(StageLinks):
    """One number of every activation arrives changed."""

    def send_hidden(self, hidden_TH: Tensor) -> None:
        changed_TH = hidden_TH.clone()
        changed_TH[-1, -1] += 1
        super().send_hidden(changed_TH)


def probe(
    kinds: dict[LinkMedium, type[StageLinks]], stage: int, num_stages: int, rendezvous: Path
) -> tuple[LinkProbe, StageLinks]:
    links = {medium: kind(stage=stage, num_stages=num_stages, rendezvous=rendezvous) for medium, kind in kinds.items()}
    KEPT.extend(links.values())
    found = probe_links(links, stage=stage, num_stages=num_stages, messages=MESSAGES, device=CPU)
    return found, links[found.taken]


def probes_then_works(slow: LinkMedium, stage: int, num_stages: int, rendezvous: Path) -> object:
    """The slow medium is not taken; over the other a step goes down and its tokens come back."""
    kinds = {medium: SlowLinks if medium is slow else StageLinks for medium in (LinkMedium.NCCL, LinkMedium.HOST)}
    found, links = probe(kinds, stage, num_stages, rendezvous)
    hidden_TH = torch.full((5, HIDDEN), 7.0, dtype=torch.bfloat16)
    if stage > 0:
        links.expect_hidden(5)
        hidden_TH = links.receive_hidden() + 1
    if stage < num_stages - 1:
        links.send_hidden(hidden_TH)
    else:
        links.send_tokens(hidden_TH[:2, 0].to(torch.int32))
    if stage > 0:
        return found, count_sockets(), None
    links.expect_tokens(2)
    return found, count_sockets(), links.receive_tokens().tolist()


def connects_only(stage: int, num_stages: int, rendezvous: Path) -> object:
    KEPT.append(StageLinks(stage=stage, num_stages=num_stages, rendezvous=rendezvous))
    return count_sockets()


@pytest.mark.parametrize("slow", list(LinkMedium))
@pytest.mark.parametrize("num_stages", [2, 3])
def test_all_stages_take_the_faster_medium_and_close_the_other(
    slow: LinkMedium, num_stages: int, tmp_path: Path
) -> None:
    stages: list[Callable[[int, int, Path], object]] = [partial(probes_then_works, slow)] * num_stages
    outcomes = run_stages(stages, tmp_path)
    (tmp_path / "one").mkdir()
    assert [sockets for _, sockets, _ in outcomes] == run_stages([connects_only] * num_stages, tmp_path / "one")
    found: LinkProbe = outcomes[0][0]
    assert [one for one, _, _ in outcomes] == [found] * num_stages
    assert found.taken in LinkMedium and found.taken is not slow
    assert (found.decode_bytes, found.prefill_bytes) == (4 * 2 * HIDDEN, 300 * 2 * HIDDEN)
    assert [(one.sender, one.receiver, one.medium) for one in found.figures] == [
        (sender, sender + 1, medium)
        for sender in range(num_stages - 1)
        for medium in (LinkMedium.NCCL, LinkMedium.HOST)
    ]
    for one in found.figures:
        if one.medium is slow:
            assert one.decode_seconds > SLOW_SECONDS
            assert one.prefill_bytes_per_second < found.prefill_bytes / SLOW_SECONDS
    assert outcomes[0][2] == [7 + num_stages - 1] * 2


def meets_a_wrong_medium(stage: int, num_stages: int, rendezvous: Path) -> object:
    transport.CONNECT_TIMEOUT = timedelta(seconds=2)
    try:
        return probe({LinkMedium.NCCL: WrongLinks, LinkMedium.HOST: StageLinks}, stage, num_stages, rendezvous)[0]
    except ConfigError as error:
        return str(error)


def test_a_medium_that_changes_messages_is_found_out(tmp_path: Path) -> None:
    lost, told = run_stages([meets_a_wrong_medium] * 2, tmp_path)
    assert told == (
        "what stage 0 sends over nccl arrives changed at stage 1: set PIPEMAX_STAGE_LINK=host, or nccl and "
        "NCCL_P2P_DISABLE=1"
    )
    assert isinstance(lost, LinkError) and "stage 0 lost another stage while links were measured" in str(lost)


class DyingLinks(StageLinks):
    def send_hidden(self, hidden_TH: Tensor) -> None:
        os._exit(3)


def dies_while_probing(stage: int, num_stages: int, rendezvous: Path) -> object:
    kind = DyingLinks if stage == 0 else StageLinks
    return probe({LinkMedium.NCCL: StageLinks, LinkMedium.HOST: kind}, stage, num_stages, rendezvous)[0]


def test_a_stage_that_dies_meanwhile_breaks_the_links(tmp_path: Path) -> None:
    assert isinstance(run_stages([dies_while_probing] * 2, tmp_path)[1], LinkError)


def connects_as_a_stage_does(model_dir: Path, stage: int, num_stages: int, rendezvous: Path) -> object:
    """With gloo in the place of NCCL, which is the slower one here."""

    def connect(*, medium: LinkMedium, **settings: object) -> StageLinks:
        links = (SlowLinks if medium is LinkMedium.NCCL else StageLinks)(medium=LinkMedium.HOST, **settings)
        KEPT.append(links)
        return links

    stage_process.possible_media = lambda device, gpus: (LinkMedium.NCCL, LinkMedium.HOST)
    stage_process.StageLinks = connect
    settings = StageSettings(
        stage=StageSlice(stage, num_stages, range(stage, stage + 1)),
        model_dir=model_dir,
        rendezvous=rendezvous,
        device="cpu",
        dtype="bfloat16",
        load_format=LoadFormat.AUTO,
        trust_remote_code=False,
        seed=0,
        max_model_len=64,
        block_size=16,
        num_threads=1,
        environment={},
        max_num_seqs=8,
        max_num_batched_tokens=100,
        beat_seconds=1.0,
        cuda=CudaOptions(),
    )
    start_up = StartUp(Pulse())
    links = stage_process._connect(settings, CPU, start_up)
    return type(links) is StageLinks, start_up.end()


def test_a_stage_measures_what_its_model_sends_and_the_first_one_tells(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    stage: Callable[[int, int, Path], object] = partial(connects_as_a_stage_does, tmp_path / "model")
    hidden_size = config_of("llama").hidden_size
    outcomes = run_stages([stage, stage], tmp_path)
    assert [is_taken for is_taken, _ in outcomes] == [True, True]
    first, second = (parts for _, parts in outcomes)
    names = ["connecting to the other stages", "measuring the links"]
    assert [part.name for part in first] == names == [part.name for part in second]
    assert [part.links for part in second] == [None, None] and first[0].links is None
    found = first[1].links
    assert found.taken is LinkMedium.HOST
    assert (found.decode_bytes, found.prefill_bytes) == (8 * 2 * hidden_size, 100 * 2 * hidden_size)


def test_what_was_measured_belongs_to_its_part_of_the_start() -> None:
    start_up = StartUp(Pulse())
    start_up.begin("one")
    start_up.begin("two")
    found = LinkProbe(LinkMedium.NCCL, 1, 2, ())
    start_up.measured(found)
    start_up.begin("three")
    parts: tuple[StartUpPart, ...] = start_up.end()
    assert [(part.name, part.links) for part in parts] == [("one", None), ("two", found), ("three", None)]
