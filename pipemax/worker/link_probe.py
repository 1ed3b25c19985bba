"""`probe_links`: which medium carries what stages send in less time, measured at the start of a pipeline.

Where GPUs reach each other, NCCL is the faster one by design, and not on every server: with an IOMMU, access control
or a bridge between sockets in the way, P2P can be slower than memory of the host that both map. Where they do not,
there is one medium, and what is measured is for whoever reads the report.

    stage 0     meet | send                    | meet ...
    stage 1     meet | send, receive .. it came| meet ...
    stage 2     meet |       receive .. it came| meet ...
                     ^ one instant for all; from there on the receiving end counts

All links are used at once, as steps use them: stages of equal time end their steps, and send, together, and what links
share (a switch, host memory, cores) they have to share here. The messages are those of decode and of prefill steps.
Sampled tokens take the same medium and are not measured: they are a few bytes, and theirs is the link that would close
the chain to a ring.

A chain cannot stand still, whatever the driver does in between: no stage has a receive posted when it sends, so all
send; the last one only receives, so it ends, and frees the one before it.

Here live the measurement and the decision. Never here: the links themselves (`transport.py`), which media can be tried.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipemax.config import ConfigError
from pipemax.worker.link import LinkError
from pipemax.worker.transport import MEDIUM_VARIABLE, LinkMedium, StageLinks, wait_for_device

_DECODE_ROWS = 64
# More does not change the rate, and takes pinned memory, which is slow to come by.
_MOST_BYTES = 32 * 1024**2
_WARM_UP_ROUNDS = 2
_DECODE_ROUNDS = 15
_PREFILL_ROUNDS = 3
# From hearing of a round's begin to the begin: longer than the news takes to reach the last stage.
_LEAD_SECONDS = 0.5e-3


@dataclass(frozen=True, slots=True)
class StepMessages:
    """Activations that a decode step and a prefill step send: rows of `hidden_size` elements."""

    decode_rows: int
    prefill_rows: int
    hidden_size: int
    dtype: torch.dtype

    @classmethod
    def of_steps(
        cls, *, max_num_seqs: int, max_num_batched_tokens: int, hidden_size: int, dtype: torch.dtype
    ) -> StepMessages:
        """For steps that are bounded so; named and meant as in `EngineConfig`."""
        decode_rows = min(_DECODE_ROWS, max_num_seqs)
        most_rows = _MOST_BYTES // (hidden_size * dtype.itemsize)
        prefill_rows = max(decode_rows, min(max_num_batched_tokens, most_rows))
        return cls(decode_rows, prefill_rows, hidden_size, dtype)

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What was measured on the link from stage `sender` to stage `receiver`, from GPU to GPU."""

    sender: int
    receiver: int
    medium: LinkMedium
    decode_seconds: float
    prefill_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class LinkProbe:
    """Figures of messages of decode and of prefill over every link and medium, link by link; the medium to take."""

    taken: LinkMedium
    decode_bytes: int
    prefill_bytes: int
    figures: tuple[LinkFigures, ...]


def better_medium(figures: Sequence[LinkFigures], *, decode_bytes: int) -> LinkMedium:
    """The medium whose slowest link costs a job least; the same on all stages.

    A message's time is added to the step that waits for it, be it decode or prefill: with as many batches in flight as
    stages there is nothing else to run meanwhile. A job of as many output tokens as prompt tokens sends the rows of the
    former in messages of decode and those of the latter in messages of prefill. So what a link costs it is, but for a
    factor, the time of a byte in the one and the time of a byte in the other, added. The slowest link counts, since the
    stages behind it and, by way of the tokens, those before it wait for it.
    """

    def worst_seconds_per_byte(medium: LinkMedium) -> float:
        return max(
            one.decode_seconds / decode_bytes + 1 / one.prefill_bytes_per_second
            for one in figures
            if one.medium is medium
        )

    measured = {one.medium for one in figures}
    return min((medium for medium in LinkMedium if medium in measured), key=worst_seconds_per_byte)


def probe_links(
    candidates: Mapping[LinkMedium, StageLinks],
    *,
    stage: int,
    num_stages: int,
    messages: StepMessages,
    device: torch.device,
) -> LinkProbe:
    """Measures links over each medium and closes those that are not to be taken. All stages must be in this call.

    None waits for ever: a message over NCCL that does not come, or a stage that does not answer, is a LinkError after
    CONNECT_TIMEOUT. Raises ConfigError when a message comes and is not what was sent.
    """
    assert num_stages > 1
    prober = _Prober(stage=stage, num_stages=num_stages, messages=messages, device=device)
    own = [figures for medium, links in candidates.items() for figures in prober.measure(medium, links)]
    gathered: list[list[LinkFigures] | None] = [None] * num_stages
    try:
        dist.all_gather_object(gathered, own)
    except RuntimeError as error:
        raise LinkError(f"stage {stage} could not compare links with the other stages: {error}") from error
    figures = tuple(one for of_stage in gathered if of_stage is not None for one in of_stage)
    decode_bytes = messages.decode_rows * messages.row_bytes
    probe = LinkProbe(
        taken=better_medium(figures, decode_bytes=decode_bytes),
        decode_bytes=decode_bytes,
        prefill_bytes=messages.prefill_rows * messages.row_bytes,
        figures=figures,
    )
    del prober
    for medium, links in candidates.items():
        if medium is not probe.taken:
            links.close()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned memory; not every torch that is supported has a public name for it
    return probe


class _Prober:
    """One stage's part in the rounds. Shapes: T rows, H hidden size."""

    def __init__(self, *, stage: int, num_stages: int, messages: StepMessages, device: torch.device) -> None:
        self._stage = stage
        self._device = device
        self._receives, self._sends = stage > 0, stage < num_stages - 1
        self._messages = messages
        self._decode_TH = self._message(messages.decode_rows)
        self._prefill_TH = self._message(messages.prefill_rows)

    def measure(self, medium: LinkMedium, links: StageLinks) -> list[LinkFigures]:
        """Of the link that ends here; none on the first stage."""
        links.set_hidden(self._messages.hidden_size, self._messages.dtype)
        prefill_seconds = self._median_seconds(medium, links, self._prefill_TH, num_rounds=_PREFILL_ROUNDS)
        decode_seconds = self._median_seconds(medium, links, self._decode_TH, num_rounds=_DECODE_ROUNDS)
        if not self._receives:
            return []
        return [
            LinkFigures(
                sender=self._stage - 1,
                receiver=self._stage,
                medium=medium,
                decode_seconds=decode_seconds,
                prefill_bytes_per_second=self._prefill_TH.nbytes / prefill_seconds,
            )
        ]

    def _message(self, num_rows: int) -> Tensor:
        """Whole numbers that every dtype holds."""
        numbers = torch.arange(num_rows * self._messages.hidden_size, dtype=torch.int32, device=self._device) % 251
        return numbers.to(self._messages.dtype).view(num_rows, -1)

    def _median_seconds(self, medium: LinkMedium, links: StageLinks, message_TH: Tensor, *, num_rounds: int) -> float:
        for _ in range(_WARM_UP_ROUNDS):  # kernels are loaded, buffers are allocated
            self._check(medium, self._exchange(links, message_TH)[0], message_TH)
        return statistics.median(self._exchange(links, message_TH)[1] for _ in range(num_rounds))

    def _exchange(self, links: StageLinks, message_TH: Tensor) -> tuple[Tensor | None, float]:
        """One round: what came, and the seconds until then."""
        if self._receives:
            links.expect_hidden(len(message_TH))
        received_TH = None
        start_seconds = self._meet()
        if self._sends:
            links.send_hidden(message_TH)
        if self._receives:
            received_TH = links.receive_hidden()
            wait_for_device(self._device)
        seconds = time.monotonic() - start_seconds
        links.finish_sends()
        wait_for_device(self._device)
        return received_TH, seconds

    def _meet(self) -> float:
        """Returns on all stages at the same instant of this machine's clock, which it gives."""
        latest_seconds = torch.tensor([time.monotonic()], dtype=torch.float64)
        try:
            dist.all_reduce(latest_seconds, op=dist.ReduceOp.MAX)
        except RuntimeError as error:
            raise LinkError(f"stage {self._stage} lost another stage while links were measured: {error}") from error
        start_seconds = latest_seconds.item() + _LEAD_SECONDS
        while time.monotonic() < start_seconds:
            pass
        return start_seconds

    def _check(self, medium: LinkMedium, received_TH: Tensor | None, message_TH: Tensor) -> None:
        if received_TH is not None and not torch.equal(received_TH, message_TH):
            raise ConfigError(
                f"what stage {self._stage - 1} sends over {medium} arrives changed at stage {self._stage}: set "
                f"{MEDIUM_VARIABLE}=host, or nccl and NCCL_P2P_DISABLE=1"
            )
