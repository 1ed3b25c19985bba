"""The sampler: from the logits of a step's sampling rows to one token a row.

Here live the order in which the sampling parameters (vLLM's) are applied, the cut of a step into parts of bounded
memory, and which requests there are. Never here: stop conditions and lengths (control plane), text, the model's head,
and what single parameters do: `row_parameters.py`, `penalties.py`, `top_filter.py`, `random_draw.py`, `logprobs.py`.

A row goes through, in this order, only the steps that it asked for:

    raw logits -> min_tokens -> penalties -> [argmax] or -> temperature -> min_p -> top_k -> top_p -> draw
        |
        +-> logprobs

The same request gives the same tokens whatever else is in the batch, in whichever row it sits, in whichever chunk it is
worked on, and after a restart.

Memory: logits stay as they are, in the model's dtype. Rows that need no more than argmax of the raw logits take none.
Others are copied to float32 in chunks, and only they. So what a step takes beside its logits does not grow with its
rows, but for some numbers a row (more where logprobs are asked for).

Time: nothing here waits for the device, and what the host has to know (errors, logprobs) is read when it is asked for;
but for top_p without top_k, which waits once a step:

    all chunks: draw from the 1024 largest logits -> wait: which rows needed more? -> those again, by sorting

Shape letters: S sampling rows of a step, R some of them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipemax.plan import Int64Array, NewRequest
from pipemax.request import SamplingParams
from pipemax.worker.logprobs import Logprobs, top_logprobs
from pipemax.worker.penalties import Penalties
from pipemax.worker.random_draw import inverse_cdf, uniform_draws
from pipemax.worker.row_chunks import row_chunks
from pipemax.worker.row_parameters import PARAMETERS, RowParameters, fill_row
from pipemax.worker.sampled_tokens import SampledTokens
from pipemax.worker.top_filter import keep_top
from pipemax.worker.upload import upload

# Logits of the rows that are worked on together. Their float32 copy and its temporaries take up to 16 bytes a logit,
# 64 MiB in all; the copy alone, 16 MiB, lies in the L2 cache of newer cards, and is enough to keep one busy.
_CHUNK_LOGITS = 1 << 22
# The same where the whole vocabulary, or a good part of it, is sorted: 25 bytes a logit, and more while it is sorted.
_SORTED_CHUNK_LOGITS = 1 << 20
# Candidates looked at before the whole vocabulary is sorted; real distributions hold a top_p of 0.95 in far fewer.
_CANDIDATES = 1024


@dataclass(frozen=True, slots=True)
class _Step:
    """One step under way.

    logits       [S, V], as they were given
    slots        int64 [S] on the host: where the sampler keeps each row's request
    rows         [S] on the host
    held_back    bool [S] on the host: rows below min_tokens
    edited       bool [S] on the host: rows that are held back or penalised
    token_ids    int64 [S]: the raw argmax, then what was chosen
    health       float32 [S]: the largest logit, NaN or +inf if any raw logit is, -inf if no token is left
    """

    logits: Tensor
    slots: Int64Array
    rows: RowParameters
    held_back: NDArray[np.bool_]
    edited: NDArray[np.bool_]
    token_ids: Tensor
    health: Tensor


@dataclass(frozen=True, slots=True)
class _Unsure:
    """Rows of a step (int64 [R], host) that got a token, and of which of them it may be wrong (bool [R], device)."""

    rows: Int64Array
    needs_more: Tensor


class Sampler:
    """Chooses one token a row, and keeps what that needs of every live request between steps.

    vocab_size   V, the width of the logits
    device       where the logits are, and where the tokens will be
    """

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._slot_of: dict[int, int] = {}
        self._free_slots: list[int] = []
        self._table: RowParameters = np.zeros(0, PARAMETERS)
        self._held_back: dict[int, Int64Array] = {}  # slot to the token ids that min_tokens suppresses
        self._penalties = Penalties(device=device)
        self._minus_infinity = torch.full((), -math.inf, device=device)

    def add(self, request: NewRequest) -> None:
        """Makes a request known. Before its first row; once."""
        assert request.request_id not in self._slot_of
        if not self._free_slots:
            size = len(self._table)
            self._table = np.concatenate([self._table, np.zeros(max(64, size), PARAMETERS)])
            self._free_slots.extend(reversed(range(size, len(self._table))))
        slot = self._free_slots.pop()
        self._slot_of[request.request_id] = slot

        sampling = request.sampling
        row = self._table[slot]
        fill_row(row, sampling, seed=request.seed, vocab_size=self._vocab_size)
        held_back = np.array([i for i in request.stop_token_ids if i < self._vocab_size], np.int64)
        if sampling.min_tokens > 0 and len(held_back) > 0:
            self._held_back[slot] = held_back
        else:
            row["min_tokens"] = 0
        if sampling.has_penalties:
            # Presence and frequency look at the output alone, so only repetition needs the prompt.
            prompt = request.prompt_token_ids if sampling.repetition_penalty != 1.0 else request.prompt_token_ids[:0]
            known = np.unique(prompt[(prompt >= 0) & (prompt < self._vocab_size)])
            row["penalty_slot"] = self._penalties.add(known)

    def forget(self, request_ids: Iterable[int]) -> None:
        """Drops the state of these requests; ids that are not known are passed over."""
        for request_id in request_ids:
            slot = self._slot_of.pop(request_id, None)
            if slot is None:
                continue
            self._held_back.pop(slot, None)
            if self._table[slot]["penalty_slot"] >= 0:
                self._penalties.remove(int(self._table[slot]["penalty_slot"]))
            self._free_slots.append(slot)

    @torch.no_grad()
    def sample(self, request_ids: Int64Array, logits_SV: Tensor) -> SampledTokens:
        """The next token of each row. request_ids: int64 [S], no request twice.

        logits_SV may be bfloat16, float16 or float32, and are left unchanged. The result is that of their float32
        values. A row with NaN or +inf among its logits, or with no token left, gives -1 and an entry in `row_errors`;
        the other rows are not affected.
        """
        assert logits_SV.shape == (len(request_ids), self._vocab_size) and logits_SV.is_floating_point()
        slots = np.fromiter((self._slot_of[int(i)] for i in request_ids), np.int64, len(request_ids))
        rows = self._table[slots]
        # One pass finds each row's argmax and every bad value. Conversion keeps order and equality, so it can wait.
        health_S, token_S = logits_SV.max(dim=1)
        held_back = rows["num_outputs"] < rows["min_tokens"]
        edited = held_back | (rows["penalty_slot"] >= 0)
        step = _Step(logits_SV, slots, rows, held_back, edited, token_S, health_S.float())

        self._choose_greedy(step, np.flatnonzero(edited & rows["greedy"]))
        has_top_k, has_top_p = rows["top_k"] < self._vocab_size, rows["top_p"] < 1.0
        self._draw(step, np.flatnonzero(~rows["greedy"] & ~has_top_k & ~has_top_p))
        self._draw_from_top(step, np.flatnonzero(~rows["greedy"] & (has_top_k | has_top_p)))

        logprobs = self._logprobs(step)
        self._penalties.record(rows["penalty_slot"], token_S)
        self._table["num_outputs"][slots] += 1
        return SampledTokens(
            request_ids=request_ids,
            output_indices=rows["num_outputs"],
            token_ids=torch.where(step.health.isfinite(), token_S, -1).to(torch.int32),
            health_S=step.health,
            logprobs=logprobs,
        )

    def warm_up(self, num_rows: int, *, dtype: torch.dtype) -> None:
        """Samples `num_rows` rows of zeros, logits of `dtype`, on the paths that take most memory; then forgets them.

        So the allocator has what later steps of up to so many rows need, for up to 20 logprobs a token. Penalties of
        long texts take more: they grow with the text.
        """
        # Of equal logits no few hold a top_p of 0.9: the first half of the rows sort the vocabulary.
        common = {"top_p": 0.9, "min_p": 0.5, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "logprobs": 20}
        kinds = (SamplingParams(**common), SamplingParams(**common, top_k=100))  # type: ignore[arg-type]
        request_ids = -1 - np.arange(num_rows, dtype=np.int64)  # real ones are not negative
        prompt = np.zeros(1, np.int32)
        try:
            for row, request_id in enumerate(request_ids.tolist()):
                self.add(NewRequest(request_id, prompt, kinds[2 * row // num_rows], seed=row, stop_token_ids=()))
            logits_SV = torch.zeros(num_rows, self._vocab_size, dtype=dtype, device=self._device)
            for _ in range(2):  # penalties of outputs show in the second step
                self.sample(request_ids, logits_SV)
        finally:
            self.forget(request_ids.tolist())

    def _chunks(self, rows: Int64Array, most_logits: int) -> list[Int64Array]:
        return row_chunks(rows, row_elements=self._vocab_size, most_elements=most_logits)

    def _choose_greedy(self, step: _Step, rows: Int64Array) -> None:
        """Greedy rows whose raw argmax need not be their token."""
        for chunk in self._chunks(rows, _CHUNK_LOGITS):
            chunk_R = upload(chunk, self._device)
            top_R, token_R = self._edited_logits(step, chunk, chunk_R).max(dim=1)
            self._note(step, chunk_R, top_R, token_R)

    def _draw_from_top(self, step: _Step, rows: Int64Array) -> None:
        """Random tokens of rows that have a top_k or a top_p."""
        # A row with top_k needs top_k candidates; one with top_p alone tries a few before it sorts the vocabulary.
        tried = min(_CANDIDATES, self._vocab_size)
        top_k_S = step.rows["top_k"]
        depth_S = np.where(top_k_S < self._vocab_size, top_k_S, tried)
        unsure = self._draw(step, rows[depth_S[rows] <= tried], depth_S=depth_S)
        self._draw(step, rows[depth_S[rows] > tried], depth_S=depth_S)
        if unsure:
            needs_more = torch.cat([part.needs_more for part in unsure]).cpu().numpy()
            wide = np.concatenate([part.rows for part in unsure])[needs_more]
            self._draw(step, wide, depth_S=np.full_like(depth_S, self._vocab_size))

    def _draw(self, step: _Step, rows: Int64Array, *, depth_S: Int64Array | None = None) -> list[_Unsure]:
        """Random tokens of these rows, and those of them that may be wrong for want of depth.

        depth_S is how many candidates top_k and top_p of a row must look at, on the host; None where both are off.
        """
        unsure = []
        is_sorted = depth_S is not None and bool((depth_S[rows] > _CANDIDATES).any())
        for chunk in self._chunks(rows, _SORTED_CHUNK_LOGITS if is_sorted else _CHUNK_LOGITS):
            chunk_R, parameters = upload(chunk, self._device), step.rows[chunk]
            logits_RV = self._edited_logits(step, chunk, chunk_R)
            top_R = logits_RV.amax(dim=1) if step.edited[chunk].any() else step.health[chunk_R]
            inverse_temperature_R = upload(parameters["inverse_temperature"], self._device)
            if (parameters["min_p_margin"] > -np.inf).any():
                floor_R = top_R + upload(parameters["min_p_margin"], self._device)
                logits_RV.masked_fill_(logits_RV < floor_R[:, None], -math.inf)
            if depth_S is not None:
                needs_more_R = keep_top(
                    logits_RV,
                    top_R,
                    inverse_temperature_R,
                    top_k=parameters["top_k"],
                    top_p=parameters["top_p"],
                    depth=int(depth_S[chunk].max()),
                )
                if needs_more_R is not None:
                    unsure.append(_Unsure(chunk, needs_more_R))
            weights_RV = logits_RV.sub_(top_R[:, None]).mul_(inverse_temperature_R[:, None]).exp_()
            draws = uniform_draws(parameters["seed"], parameters["num_outputs"].astype(np.uint64))
            token_R = inverse_cdf(weights_RV, upload(draws, self._device))
            del logits_RV, weights_RV  # before the next chunk has its own
            self._note(step, chunk_R, top_R, token_R)
        return unsure

    def _edited_logits(self, step: _Step, chunk: Int64Array, chunk_R: Tensor) -> Tensor:
        """float32 [R, V], to be overwritten: the chunk's logits with min_tokens and penalties applied."""
        logits_RV = step.logits[chunk_R].float()
        self._hold_back(logits_RV, step.slots[chunk], step.held_back[chunk])
        self._penalties.apply(logits_RV, step.rows[chunk])
        return logits_RV

    def _hold_back(self, logits_RV: Tensor, slots: Int64Array, held_back: NDArray[np.bool_]) -> None:
        """Sets the end tokens of rows below min_tokens to -inf, in place."""
        rows = np.flatnonzero(held_back)
        if len(rows) == 0:
            return
        tokens = [self._held_back[int(slot)] for slot in slots[rows]]
        row_of_token = np.repeat(rows, [len(ids) for ids in tokens])
        where = (upload(row_of_token, self._device), upload(np.concatenate(tokens), self._device))
        logits_RV.index_put_(where, self._minus_infinity)

    @staticmethod
    def _note(step: _Step, chunk_R: Tensor, top_R: Tensor, token_R: Tensor) -> None:
        raw_health_R = step.health[chunk_R]
        step.token_ids[chunk_R] = token_R
        step.health[chunk_R] = torch.where(raw_health_R.isfinite(), top_R, raw_health_R)

    def _logprobs(self, step: _Step) -> Logprobs | None:
        num_logprobs = step.rows["num_logprobs"]
        rows = np.flatnonzero(num_logprobs >= 0)
        if len(rows) == 0:
            return None
        num_top = int(num_logprobs[rows].max())
        parts = [
            top_logprobs(step.logits[at_R].float(), step.token_ids[at_R], num_top)
            for at_R in (upload(chunk, self._device) for chunk in self._chunks(rows, _CHUNK_LOGITS))
        ]
        ids, values, ranks = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Logprobs(rows, num_logprobs[rows], ids, values, ranks)
