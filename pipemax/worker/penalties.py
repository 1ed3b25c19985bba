"""`Penalties`: what repetition, presence and frequency penalties have to know of a request, and what they do to logits.

Never here: which requests there are (`sampler.py`), other changes of logits.

Shape letters: S sampling rows of a step, R some of them, V vocabulary, L distinct tokens known of a request, M slots.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipemax.plan import Int32Array, Int64Array
from pipemax.worker.row_chunks import row_chunks
from pipemax.worker.row_parameters import RowParameters
from pipemax.worker.upload import upload

# Entries looked at together, about 40 bytes of temporaries each: long texts must not take more than logits do.
_CHUNK_ENTRIES = 1 << 20

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Penalties:
    """The distinct tokens of every request with penalties, on the device, and how often each came in the output.

    tokens_ML    int32   a request's tokens in the order in which they were first seen, known ones of the prompt first
    counts_ML    int32   occurrences in the output (0: only in the prompt)
    num_seen_M   int64   entries in use

    Which entry a sampled token goes to is decided on the device; the host has only an upper bound of num_seen, the
    prompt's tokens and all outputs, so that it never waits. Memory grows with texts, not with the vocabulary.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._tokens_ML = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._counts_ML = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._num_seen_M = torch.zeros(0, dtype=torch.int64, device=device)
        self._most_seen = np.zeros(0, np.int64)
        self._free_slots: list[int] = []

    def add(self, prompt_token_ids: Int32Array) -> int:
        """The slot of a new request; the prompt's token ids are distinct and below V."""
        if not self._free_slots:
            size = len(self._most_seen)
            self._grow(max(16, 2 * size), self._tokens_ML.shape[1])
            self._free_slots.extend(reversed(range(size, len(self._most_seen))))
        slot = self._free_slots.pop()
        num_tokens = len(prompt_token_ids)
        self._reserve(num_tokens)
        self._tokens_ML[slot, :num_tokens] = upload(prompt_token_ids, self._device)
        self._counts_ML[slot].zero_()
        self._num_seen_M[slot] = num_tokens
        self._most_seen[slot] = num_tokens
        return slot

    def remove(self, slot: int) -> None:
        self._free_slots.append(slot)

    def apply(self, logits_RV: Tensor, rows: RowParameters) -> None:
        """Penalises in place the rows that have a slot: repetition first, then frequency and presence."""
        chosen = np.flatnonzero(rows["penalty_slot"] >= 0)
        if len(chosen) == 0:
            return
        bound = int(self._most_seen[rows["penalty_slot"][chosen]].max())
        if bound == 0:
            return
        for chunk in row_chunks(chosen, row_elements=bound, most_elements=_CHUNK_ENTRIES):
            self._apply(logits_RV, chunk, rows[chunk], bound)

    def _apply(self, logits_RV: Tensor, chosen: Int64Array, rows: RowParameters, bound: int) -> None:
        row_R1 = upload(chosen, self._device)[:, None]
        slot_R = upload(rows["penalty_slot"], self._device)
        num_seen_R1 = self._num_seen_M[slot_R, None]
        # Entries past a row's end repeat its first one, so that writing them again changes nothing.
        entry_L = torch.arange(bound, device=self._device)
        entry_RL = torch.where(entry_L < num_seen_R1, entry_L, 0)
        token_RL = self._tokens_ML[slot_R[:, None], entry_RL].to(torch.int64)
        count_RL = self._counts_ML[slot_R[:, None], entry_RL]
        logit_RL = logits_RV[row_R1, token_RL]
        repetition_R1 = upload(rows["repetition"], self._device)[:, None]
        repeated_RL = torch.where(logit_RL > 0, logit_RL / repetition_R1, logit_RL * repetition_R1)
        repeated_RL -= upload(rows["frequency"], self._device)[:, None] * count_RL
        repeated_RL -= upload(rows["presence"], self._device)[:, None] * (count_RL > 0)
        # An absurd penalty must not look like a broken model: no logit becomes +inf here.
        penalised_RL = repeated_RL.clamp_(max=_FLOAT32_MAX)
        logits_RV[row_R1, token_RL] = torch.where(num_seen_R1 > 0, penalised_RL, logit_RL)

    def record(self, slots: Int64Array, token_S: Tensor) -> None:
        """Notes one more output token, int64 [S], of each row; slots: int64 [S], -1 for rows without penalties."""
        chosen = np.flatnonzero(slots >= 0)
        if len(chosen) == 0:
            return
        bound = int(self._most_seen[slots[chosen]].max()) + 1
        self._reserve(bound)
        for chunk in row_chunks(chosen, row_elements=bound, most_elements=_CHUNK_ENTRIES):
            self._record(slots[chunk], token_S[upload(chunk, self._device)].to(torch.int32), bound)

    def _record(self, slots: Int64Array, token_R: Tensor, bound: int) -> None:
        slot_R = upload(slots, self._device)
        num_seen_R = self._num_seen_M[slot_R]
        entry_L = torch.arange(bound, device=self._device)
        same_RL = (self._tokens_ML[slot_R, :bound] == token_R[:, None]) & (entry_L < num_seen_R[:, None])
        known_R = same_RL.any(dim=1)
        entry_R = torch.where(known_R, same_RL.to(torch.int32).argmax(dim=1), num_seen_R)
        self._tokens_ML[slot_R, entry_R] = token_R
        self._counts_ML[slot_R, entry_R] += 1
        self._num_seen_M[slot_R] += ~known_R
        self._most_seen[slots] += 1

    def _reserve(self, num_tokens: int) -> None:
        if num_tokens > self._tokens_ML.shape[1]:
            self._grow(len(self._most_seen), max(64, num_tokens, 2 * self._tokens_ML.shape[1]))

    def _grow(self, num_slots: int, num_tokens: int) -> None:
        old_slots, old_tokens = self._tokens_ML.shape
        padding = (0, num_tokens - old_tokens, 0, num_slots - old_slots)
        self._tokens_ML = torch.nn.functional.pad(self._tokens_ML, padding)
        self._counts_ML = torch.nn.functional.pad(self._counts_ML, padding)
        self._num_seen_M = torch.nn.functional.pad(self._num_seen_M, (0, num_slots - old_slots))
        self._most_seen = np.pad(self._most_seen, (0, num_slots - old_slots))
