"""NCCL links between real processes, a GPU each: what is sent arrives whole and in order, whoever is ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipemax.worker.transport import LinkMedium, StageLinks
from tests.worker.test_transport import KEPT, run_stages

HIDDEN = 1024
# Tokens and samples of each step: small ones that leave at once, and some that no buffer of the library holds.
STEPS = [(1 + 37 * step % 90 if step % 5 else 4096, step % 4) for step in range(40)]


def many_steps(stage: int, num_stages: int, rendezvous: Path) -> object:
    """Stage s adds s to what it gets; the last answers with the sum over the first row. The host never waits."""
    torch.cuda.set_device(stage)
    device = torch.device("cuda", stage)
    links = StageLinks(stage=stage, num_stages=num_stages, rendezvous=rendezvous, device=device, medium=LinkMedium.NCCL)
    KEPT.append(links)
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


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_many_steps_in_flight_arrive_whole_and_in_order(num_stages: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < num_stages:
        pytest.skip(f"needs {num_stages} GPUs")
    outcomes = run_stages([many_steps] * num_stages, tmp_path)
    added = sum(range(num_stages))
    expected = [[(step + added) * HIDDEN] * samples for step, (_, samples) in enumerate(STEPS) if samples]
    assert [wrong for wrong, _ in outcomes] == [0] * num_stages
    assert outcomes[0][1] == expected
