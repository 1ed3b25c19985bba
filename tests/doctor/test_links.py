"""What measured link rates mean; measuring itself needs a GPU."""

import pytest
import torch

from pipemax.doctor.finding import Severity
from pipemax.doctor.links import LinkRates, LinkSurvey, link_findings, measure_links
from tests.doctor.test_gpus import GPU

FAST = LinkRates(25e9, 25e9, 19e9)


def test_a_fast_link():
    (finding,) = link_findings(LinkSurvey((FAST,), ()), (GPU,))
    assert finding.severity is Severity.GOOD
    assert finding.found == "25.0 GB/s up, 25.0 down, 19.0 each way at once"
    assert "0.44 GiB" in finding.meaning


def test_a_link_below_its_generation():
    (finding,) = link_findings(LinkSurvey((LinkRates(6e9, 6e9, 5e9),), ()), (GPU,))
    assert finding.severity is Severity.COSTS and "PCIe 4 x16 could carry 32" in finding.found and finding.action


def test_a_gpu_that_the_driver_does_not_list_is_not_judged():
    (finding,) = link_findings(LinkSurvey((LinkRates(1e9, 1e9, 1e9),), ()), ())
    assert finding.severity is Severity.GOOD


@pytest.mark.parametrize(("up", "severity"), [(24e9, Severity.GOOD), (12e9, Severity.COSTS)])
def test_links_that_share_something(up, severity):
    together = (LinkRates(up, None, up / 2),) * 2
    finding = link_findings(LinkSurvey((FAST, FAST), together), (GPU, GPU))[-1]
    assert finding.severity is severity and f"{up / 25e9:.0%}" in finding.found


def test_memory_that_cannot_be_registered_blocks():
    (finding,) = link_findings(LinkSurvey((), (), "CUDA cannot register 0.2 GiB of host memory"), (GPU,))
    assert finding.severity is Severity.BLOCKS and "register" in finding.found


@pytest.mark.cuda
def test_measuring():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    survey = measure_links()
    assert survey.problem == "" and len(survey.alone) >= 1
    for rates in survey.alone:
        assert rates.down is not None and min(rates.up, rates.down, rates.duplex) > 1e9
        assert rates.duplex < 1.1 * max(rates.up, rates.down)
