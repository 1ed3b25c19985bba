"""Links between real processes, a GPU each: what is sent arrives whole and in order, whoever is ahead, over the medium
that is given and over the one that was found to be better."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch

from pipemax.worker import link_probe, transport
from pipemax.worker.link import LinkError
from pipemax.worker.link_probe import LinkProbe, StepMessages, probe_links
from pipemax.worker.transport import LinkMedium, StageLinks, wait_for_device
from tests.worker.test_transport import KEPT, run_stages

HIDDEN = 1024
# Tokens and samples of each step: small ones that leave at once, and some that no buffer of the library holds.
STEPS = [(1 + 37 * step % 90 if step % 5 else 4096, step % 4) for step in range(40)]


def connect(medium: LinkMedium, stage: int, num_stages: int, rendezvous: Path) -> StageLinks:
    torch.cuda.set_device(stage)
    device = torch.device("cuda", stage)
    links = StageLinks(stage=stage, num_stages=num_stages, rendezvous=rendezvous, device=device, medium=medium)
    KEPT.append(links)
    return links


def many_steps(medium: LinkMedium, stage: int, num_stages: int, rendezvous: Path) -> object:
    return run_steps(connect(medium, stage, num_stages, rendezvous), stage, num_stages)


def run_steps(links: StageLinks, stage: int, num_stages: int) -> tuple[int, list[list[int]]]:
    """Stage s adds s to what it gets; the last answers with the sum over the first row. No host waits."""
    device = torch.device("cuda", stage)
    links.set_hidden(HIDDEN, torch.bfloat16)
    num_answers, wrong = 0, torch.zeros(1, dtype=torch.int64, device=device)
    weight = torch.randn(2048, 2048, device=device)
    for step, (num_tokens, num_samples) in enumerate(STEPS):
        for _ in range(30 if (step + stage) % 3 == 0 else 1):  # one side, then the other, is late
            weight = torch.tanh(weight @ weight)
        if stage == 0:
            hidden_TH = torch.full((num_tokens, HIDDEN), float(step), dtype=torch.bfloat16, device=device)
        else:
            links.expect_hidden(num_tokens)
            hidden_TH = links.receive_hidden() + stage
            wrong += (hidden_TH != step + sum(range(stage + 1))).sum()
        if stage < num_stages - 1:
            links.send_hidden(hidden_TH)
            if stage == 0 and num_samples:
                links.expect_tokens(num_samples)
                num_answers += 1
        elif num_samples:
            links.send_tokens(hidden_TH[:1].float().sum(dim=1).to(torch.int32).expand(num_samples).contiguous())
    tokens = [links.receive_tokens() for _ in range(num_answers)]
    torch.cuda.synchronize()
    return int(wrong), [token_ids.tolist() for token_ids in tokens]


def expected_tokens(num_stages: int) -> list[list[int]]:
    added = sum(range(num_stages))
    return [[(step + added) * HIDDEN] * samples for step, (_, samples) in enumerate(STEPS) if samples]


def need_gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


@pytest.mark.parametrize("medium", list(LinkMedium))
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_many_steps_in_flight_arrive_whole_and_in_order(num_stages: int, medium: LinkMedium, tmp_path: Path) -> None:
    need_gpus(num_stages)
    outcomes = run_stages([partial(many_steps, medium)] * num_stages, tmp_path)
    assert [wrong for wrong, _ in outcomes] == [0] * num_stages
    assert outcomes[0][1] == expected_tokens(num_stages)


def waits_in_vain(medium: LinkMedium, stage: int, num_stages: int, rendezvous: Path) -> object:
    links = connect(medium, stage, num_stages, rendezvous)
    links.set_hidden(HIDDEN, torch.bfloat16)
    transport.CONNECT_TIMEOUT = timedelta(seconds=2)
    if stage == 1:
        links.expect_hidden(5)
        links.receive_hidden()
    wait_for_device(torch.device("cuda", stage))
    return None


@pytest.mark.parametrize("medium", list(LinkMedium))
def test_a_message_that_never_comes_is_an_error_with_the_remedy(medium: LinkMedium, tmp_path: Path) -> None:
    need_gpus(2)
    sender, receiver = run_stages([partial(waits_in_vain, medium)] * 2, tmp_path)
    assert sender is None
    assert isinstance(receiver, LinkError)
    assert "set PIPEMAX_STAGE_LINK=host, or nccl and NCCL_P2P_DISABLE=1" in str(receiver)


def probes_then_runs(preferred: LinkMedium | None, stage: int, num_stages: int, rendezvous: Path) -> object:
    """With `preferred` the measurement is made and overruled, so that each of the two is closed once."""
    if preferred is not None:
        link_probe.better_medium = lambda figures, decode_bytes: preferred
    close, freed_bytes = StageLinks.close, 0

    def close_and_look(closed: StageLinks) -> None:
        nonlocal freed_bytes
        free_before_bytes = torch.cuda.mem_get_info()[0]
        close(closed)
        freed_bytes += torch.cuda.mem_get_info()[0] - free_before_bytes

    StageLinks.close = close_and_look
    links = {medium: connect(medium, stage, num_stages, rendezvous) for medium in (LinkMedium.NCCL, LinkMedium.HOST)}
    probe = probe_links(
        links,
        stage=stage,
        num_stages=num_stages,
        messages=StepMessages.of_steps(
            max_num_seqs=256, max_num_batched_tokens=2048, hidden_size=HIDDEN, dtype=torch.bfloat16
        ),
        device=torch.device("cuda", stage),
    )
    return probe, freed_bytes, torch.cuda.memory_reserved(), run_steps(links[probe.taken], stage, num_stages)


@pytest.mark.parametrize("preferred", [None, *LinkMedium])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_measured_links_agree_on_a_medium_and_carry_steps(
    num_stages: int, preferred: LinkMedium | None, tmp_path: Path
) -> None:
    need_gpus(num_stages)
    outcomes = run_stages([partial(probes_then_runs, preferred)] * num_stages, tmp_path)
    probe: LinkProbe = outcomes[0][0]
    assert [one for one, *_ in outcomes] == [probe] * num_stages
    assert preferred is None or probe.taken is preferred
    assert [(one.sender, one.receiver, one.medium) for one in probe.figures] == [
        (sender, sender + 1, medium)
        for sender in range(num_stages - 1)
        for medium in (LinkMedium.NCCL, LinkMedium.HOST)
    ]
    for one in probe.figures:  # no link is a hundred times as fast or as slow
        assert 2e-6 < one.decode_seconds < 0.05 and 0.1e9 < one.prefill_bytes_per_second < 1e12
    for _, freed_bytes, reserved_bytes, (wrong, _) in outcomes:
        assert wrong == 0
        assert reserved_bytes < 8 * 1024**2  # no message is left,
        assert probe.taken is LinkMedium.NCCL or freed_bytes > 0  # and none of NCCL's buffers
    assert outcomes[0][3][1] == expected_tokens(num_stages)
