"""The sampler: at the last stage, from the logits of a step's sampling rows to one token a row.

Here live the sampling parameters' meaning (vLLM's), the random draw, and what both need to remember of a request: how
many tokens it has, and, if it asked for penalties, which. Never here: stop conditions and lengths (control plane),
text, the model's head.

A row goes through, in this order, only the steps that it asked for:

    raw logits -> min_tokens -> penalties -> [argmax] or -> temperature -> min_p -> top_k -> top_p -> draw
        |
        +-> logprobs

The draw is an inverse CDF over the kept tokens in the order of their ids. Its uniform number is a pure function of the
request's seed and the number of tokens sampled before, so the same request gives the same tokens whatever else is in
the batch, in whichever row it sits, and after a restart.

Nothing here waits for the device while rows are greedy and unpenalised; what the host has to know (errors, logprobs) is
read when it is asked for. A top_p without top_k waits once a step, to learn whether its shortcut was enough.

Shape letters: S sampling rows of a step, R some of them, V vocabulary, D sorted candidates of a row, N alternatives of
the logprobs, G groups of the vocabulary, E tokens in a group, L distinct tokens that penalties know, M penalty slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipemax.plan import Int32Array, Int64Array, NewRequest, TokenLogprobs
from pipemax.request import SamplingParams
from pipemax.worker.upload import upload

# One float32 temporary is at most 64 MiB: rows that need more than argmax are worked on in chunks of this many logits.
_CHUNK_ELEMENTS = 1 << 24
# Candidates looked at before the whole vocabulary is sorted; real distributions hold a top_p of 0.95 in far fewer.
_CANDIDATES = 1024
# Tokens in one group of the two-level inverse CDF.
_GROUP_TOKENS = 512

_FLOAT32 = np.finfo(np.float32)
_SPLITMIX_GAMMA = np.uint64(0x9E3779B97F4A7C15)

_PARAMETERS = np.dtype(
    [
        ("seed", np.uint64),
        ("num_outputs", np.int64),
        ("greedy", np.bool_),
        ("inverse_temperature", np.float32),
        ("min_p_margin", np.float32),  # how far below the top logit min_p reaches; -inf: off
        ("top_k", np.int64),  # vocab_size: off
        ("top_p", np.float64),  # 1: off
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("penalty_slot", np.int64),  # -1: no penalties
        ("min_tokens", np.int64),  # 0: nothing to hold back
        ("num_logprobs", np.int64),  # -1: not asked for
    ],
    align=True,
)
_Rows = NDArray[Any]  # a structured array of _PARAMETERS


def uniform_draws(seeds: NDArray[np.uint64], output_indices: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, index), on a grid of 2**-53. All [R].

    Counter-based: SplitMix64's finaliser turns the seed into a stream's start, and again (start + index * gamma) into
    the bits. The first pass keeps neighbouring seeds, the common case, from giving overlapping streams.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        bits = _splitmix64(_splitmix64(seeds) + (output_indices + np.uint64(1)) * _SPLITMIX_GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class SampledTokens:
    """What `Sampler.sample` gave for S rows.

    token_ids   int32 [S] on the device; -1 where the row failed

    `row_errors` and `logprobs` wait for the device when they are first read, and not before; or not at all, if
    `start_read_back` was called and the device has passed that point.
    """

    def __init__(
        self,
        *,
        request_ids: Int64Array,
        output_indices: Int64Array,
        token_ids: Tensor,
        health_S: Tensor,
        logprobs: _LogprobTensors | None,
    ) -> None:
        self.token_ids = token_ids
        self._request_ids = request_ids
        self._output_indices = output_indices
        self._health_S = health_S
        self._logprobs = logprobs

    def start_read_back(self) -> None:
        """Starts copies to the host of all that it will read: `host_token_ids`, `row_errors`, `logprobs`."""
        self._host_token_ids = self.token_ids.to("cpu", non_blocking=True)
        self._health_S = self._health_S.to("cpu", non_blocking=True)
        if self._logprobs is not None:
            self._logprobs = self._logprobs.start_read_back()

    @property
    def host_token_ids(self) -> Int32Array:
        """`token_ids`, once the device has passed `start_read_back`."""
        token_ids: Int32Array = self._host_token_ids.numpy()
        return token_ids

    @cached_property
    def _health(self) -> NDArray[np.float32]:
        health: NDArray[np.float32] = self._health_S.cpu().numpy()
        return health

    @cached_property
    def row_errors(self) -> dict[int, str]:
        """Request id to one line, for each row whose token is -1."""
        return {
            int(self._request_ids[row]): _row_error(float(self._health[row]), int(self._output_indices[row]) + 1)
            for row in np.flatnonzero(~np.isfinite(self._health))
        }

    @cached_property
    def logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """One entry a row, None where not asked for or failed; None when no row asked."""
        return None if self._logprobs is None else self._logprobs.to_host(self._health)


def _row_error(health: float, output_number: int) -> str:
    if health == -math.inf:
        return f"no token is left to choose as output token {output_number}: the logits of all others are -inf"
    value = "NaN" if math.isnan(health) else "+inf"
    return f"the model gave {value} logits for output token {output_number}; try dtype float32 or bfloat16"


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
        self._table: _Rows = np.zeros(0, _PARAMETERS)
        self._held_back: dict[int, Int64Array] = {}  # slot to the token ids that min_tokens suppresses
        self._penalties = _PenaltyState(device=device)
        self._minus_infinity = torch.full((), -math.inf, device=device)

    def add(self, request: NewRequest) -> None:
        """Makes a request known. Before its first row; once."""
        assert request.request_id not in self._slot_of
        if not self._free_slots:
            size = len(self._table)
            self._table = np.concatenate([self._table, np.zeros(max(64, size), _PARAMETERS)])
            self._free_slots.extend(reversed(range(size, len(self._table))))
        slot = self._free_slots.pop()
        self._slot_of[request.request_id] = slot

        sampling = request.sampling
        held_back = np.array([i for i in request.stop_token_ids if i < self._vocab_size], np.int64)
        if sampling.min_tokens > 0 and len(held_back) > 0:
            self._held_back[slot] = held_back
        row = self._table[slot]
        row["penalty_slot"] = -1  # first: should anything below raise, `forget` must not free another request's
        row["seed"] = request.seed & (2**64 - 1)
        row["num_outputs"] = 0
        row["greedy"] = sampling.greedy
        row["inverse_temperature"], row["min_p_margin"] = _temperature_terms(sampling)
        row["top_k"] = sampling.top_k if 0 < sampling.top_k < self._vocab_size else self._vocab_size
        row["top_p"] = sampling.top_p
        row["repetition"] = min(max(sampling.repetition_penalty, float(_FLOAT32.tiny)), float(_FLOAT32.max))
        row["presence"] = sampling.presence_penalty
        row["frequency"] = sampling.frequency_penalty
        row["min_tokens"] = sampling.min_tokens if slot in self._held_back else 0
        row["num_logprobs"] = -1 if sampling.logprobs is None else min(sampling.logprobs, self._vocab_size)
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
        """The next token of each row. request_ids: int64 [S], no request twice; logits_SV: float32, left unchanged.

        A row with NaN or +inf among its logits, or with no token left, gives -1 and an entry in `row_errors`; the other
        rows are not affected.
        """
        assert logits_SV.shape == (len(request_ids), self._vocab_size) and logits_SV.dtype == torch.float32
        slots = np.fromiter((self._slot_of[int(i)] for i in request_ids), np.int64, len(request_ids))
        rows = self._table[slots]
        # The maximum finds every bad value in one pass: it is NaN or +inf if any logit is, -inf if all are.
        health_S, token_S = logits_SV.max(dim=1)

        held_back = rows["num_outputs"] < rows["min_tokens"]
        edited = held_back | (rows["penalty_slot"] >= 0)
        for chunk in self._chunks(np.flatnonzero(edited | ~rows["greedy"])):
            chunk_R = upload(chunk, self._device)
            raw_health_R = health_S[chunk_R]
            logits_RV = logits_SV[chunk_R]  # a copy: what follows writes into it
            self._hold_back(logits_RV, slots[chunk], held_back[chunk])
            self._penalties.apply(logits_RV, rows[chunk])
            top_R, chosen_R = logits_RV.max(dim=1) if edited[chunk].any() else (raw_health_R, token_S[chunk_R])
            random = np.flatnonzero(~rows["greedy"][chunk])
            if len(random) == len(chunk):
                chosen_R = self._draw(logits_RV, top_R, rows[chunk])
            elif len(random) > 0:
                random_R = upload(random, self._device)
                chosen_R[random_R] = self._draw(logits_RV[random_R], top_R[random_R], rows[chunk][random])
            token_S[chunk_R] = chosen_R
            health_S[chunk_R] = torch.where(raw_health_R.isfinite(), top_R, raw_health_R)

        logprobs = self._logprobs(logits_SV, token_S, rows["num_logprobs"])
        self._penalties.record(rows["penalty_slot"], token_S)
        self._table["num_outputs"][slots] += 1
        return SampledTokens(
            request_ids=request_ids,
            output_indices=rows["num_outputs"],
            token_ids=torch.where(health_S.isfinite(), token_S, -1).to(torch.int32),
            health_S=health_S,
            logprobs=logprobs,
        )

    def _chunks(self, rows: Int64Array) -> list[Int64Array]:
        size = max(1, _CHUNK_ELEMENTS // self._vocab_size)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _hold_back(self, logits_RV: Tensor, slots: Int64Array, held_back: NDArray[np.bool_]) -> None:
        """Sets the end tokens of rows below min_tokens to -inf, in place."""
        rows = np.flatnonzero(held_back)
        if len(rows) == 0:
            return
        tokens = [self._held_back[int(slot)] for slot in slots[rows]]
        row_of_token = np.repeat(rows, [len(ids) for ids in tokens])
        where = (upload(row_of_token, self._device), upload(np.concatenate(tokens), self._device))
        logits_RV.index_put_(where, self._minus_infinity)

    def _draw(self, logits_RV: Tensor, top_R: Tensor, rows: _Rows) -> Tensor:
        """Random tokens, int64 [R], from logits that are overwritten; top_R is each row's largest."""
        inverse_temperature_R = upload(rows["inverse_temperature"], self._device)
        if (rows["min_p_margin"] > -np.inf).any():
            floor_R = top_R + upload(rows["min_p_margin"], self._device)
            logits_RV.masked_fill_(logits_RV < floor_R[:, None], -math.inf)
        restricted = np.flatnonzero((rows["top_k"] < self._vocab_size) | (rows["top_p"] < 1.0))
        if len(restricted) == len(rows):
            self._restrict(logits_RV, top_R, inverse_temperature_R, rows)
        elif len(restricted) > 0:
            at_R = upload(restricted, self._device)
            part_RV = logits_RV[at_R]
            self._restrict(part_RV, top_R[at_R], inverse_temperature_R[at_R], rows[restricted])
            logits_RV[at_R] = part_RV
        weights_RV = logits_RV.sub_(top_R[:, None]).mul_(inverse_temperature_R[:, None]).exp_()
        draws = uniform_draws(rows["seed"], rows["num_outputs"].astype(np.uint64))
        return _inverse_cdf(weights_RV, upload(draws, self._device))

    def _restrict(self, logits_RV: Tensor, top_R: Tensor, inverse_temperature_R: Tensor, rows: _Rows) -> None:
        """Applies top_k, then top_p, in place: -inf for the tokens that fall away. Of equal logits lower ids stay."""
        edge_R = torch.empty_like(top_R)
        num_equal_R = torch.empty_like(top_R, dtype=torch.int64)

        def find_edges(chosen: Int64Array, depth: int) -> Int64Array:
            """Of the chosen rows, those that need more candidates than `depth`; the edges of the others are done."""
            at_R = upload(chosen, self._device)
            edges = _find_edges(
                logits_RV if len(chosen) == len(rows) else logits_RV[at_R],
                top_R[at_R],
                inverse_temperature_R[at_R],
                top_k=rows["top_k"][chosen],
                top_p=rows["top_p"][chosen],
                depth=depth,
            )
            edge_R[at_R], num_equal_R[at_R] = edges.logit, edges.num_equal
            return chosen[edges.needs_more]

        # A row with top_k needs top_k candidates; one with top_p alone tries a few before it sorts the vocabulary.
        tried = min(_CANDIDATES, self._vocab_size)
        depths = np.where(rows["top_k"] < self._vocab_size, rows["top_k"], tried)
        few, many = np.flatnonzero(depths <= tried), np.flatnonzero(depths > tried)
        if len(many) > 0:
            find_edges(many, int(depths[many].max()))
        if len(few) > 0:
            wide = find_edges(few, int(depths[few].max()))
            if len(wide) > 0:
                find_edges(wide, self._vocab_size)

        at_edge_RV = logits_RV == edge_R[:, None]
        kept_RV = at_edge_RV.cumsum(dim=1, dtype=torch.int32) <= num_equal_R[:, None]
        kept_RV.logical_and_(at_edge_RV).logical_or_(logits_RV > edge_R[:, None])
        logits_RV.masked_fill_(kept_RV.logical_not_(), -math.inf)

    def _logprobs(self, logits_SV: Tensor, token_S: Tensor, num_logprobs: Int64Array) -> _LogprobTensors | None:
        rows = np.flatnonzero(num_logprobs >= 0)
        if len(rows) == 0:
            return None
        num_top = int(num_logprobs[rows].max())
        parts = [
            _top_logprobs(logits_SV[at_R], token_S[at_R], num_top)
            for at_R in (upload(chunk, self._device) for chunk in self._chunks(rows))
        ]
        ids, values, ranks = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return _LogprobTensors(rows, num_logprobs[rows], ids, values, ranks)


@dataclass(frozen=True, slots=True)
class _Edges:
    """Where top_k and top_p cut: logits above a row's edge stay, and of those equal to it the first `num_equal`.

    logit        float32 [R]
    num_equal    int64 [R]
    needs_more   bool [R] on the host: the candidates did not reach top_p, and the row's edge means nothing
    """

    logit: Tensor
    num_equal: Tensor
    needs_more: NDArray[np.bool_]


def _find_edges(
    logits_RV: Tensor,
    top_R: Tensor,
    inverse_temperature_R: Tensor,
    *,
    top_k: Int64Array,
    top_p: NDArray[np.float64],
    depth: int,
) -> _Edges:
    """Edges from the `depth` largest logits. depth >= top_k in each row, but where top_k is off (V) it may be less."""
    vocab_size, device = logits_RV.shape[1], logits_RV.device
    shift_R1, scale_R1 = top_R[:, None], inverse_temperature_R[:, None]
    if depth == vocab_size:
        sorted_RD = logits_RV.sort(dim=1, descending=True).values
    else:
        sorted_RD = logits_RV.topk(depth, dim=1).values
    kept_RD = torch.arange(depth, device=device) < upload(top_k, device)[:, None]
    needs_more = np.zeros(len(top_k), np.bool_)
    if (top_p < 1.0).any():
        weight_RD = ((sorted_RD - shift_R1) * scale_R1).exp_() * kept_RD
        mass_RD = weight_RD.cumsum(dim=1, dtype=torch.float64)
        total_R1 = mass_RD[:, -1:]
        nucleus_R1 = upload(top_p, device)[:, None]
        unlimited = (top_k == vocab_size) & (top_p < 1.0)
        if depth < vocab_size and unlimited.any():
            whole_R1 = ((logits_RV - shift_R1) * scale_R1).exp_().sum(dim=1, keepdim=True, dtype=torch.float64)
            total_R1 = torch.where(upload(unlimited, device)[:, None], whole_R1, total_R1)
            needs_more = unlimited & (mass_RD[:, -1:] < nucleus_R1 * total_R1)[:, 0].cpu().numpy()
        # A token stays while the mass before it is below top_p: the smallest set that reaches top_p.
        before_RD = torch.nn.functional.pad(mass_RD[:, :-1], (1, 0))
        kept_RD = kept_RD & (before_RD < nucleus_R1 * total_R1)
    num_kept_R1 = kept_RD.sum(dim=1, keepdim=True).clamp_(min=1)
    edge_R1 = sorted_RD.gather(1, num_kept_R1 - 1)
    num_above_R = (sorted_RD > edge_R1).sum(dim=1)
    return _Edges(edge_R1[:, 0], num_kept_R1[:, 0] - num_above_R, needs_more)


def _temperature_terms(sampling: SamplingParams) -> tuple[float, float]:
    """(1 / temperature, temperature * log(min_p)), as float32 can hold them: extreme temperatures must not give NaN."""
    if sampling.greedy:
        return 1.0, -math.inf
    with np.errstate(over="ignore"):
        inverse = np.float64(1.0) / np.float64(sampling.temperature)
    margin = -math.inf
    if sampling.min_p > 0.0:
        margin = max(sampling.temperature * math.log(sampling.min_p), float(_FLOAT32.min))
    return float(np.clip(inverse, _FLOAT32.tiny, _FLOAT32.max)), margin


def _inverse_cdf(weights_RV: Tensor, draws_R: Tensor) -> Tensor:
    """int64 [R]: the token in whose stretch of the cumulated weights, in the order of ids, draw * total falls.

    Weights are float32 and not normalised, draws float64 in [0, 1); sums are float64, first over groups of tokens, then
    within the group that was hit. A token of weight 0 is never chosen, unless all are (then the result means nothing).
    """
    num_rows, vocab_size = weights_RV.shape
    num_groups = -(-vocab_size // _GROUP_TOKENS)
    padding = num_groups * _GROUP_TOKENS - vocab_size
    weights_RGE = torch.nn.functional.pad(weights_RV, (0, padding)).view(num_rows, num_groups, _GROUP_TOKENS)
    ends_RG = weights_RGE.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target_R1 = draws_R[:, None] * ends_RG[:, -1:]
    group_R1 = torch.searchsorted(ends_RG, target_R1, right=True).clamp_(max=num_groups - 1)
    before_R1 = torch.nn.functional.pad(ends_RG, (1, 0)).gather(1, group_R1)
    weights_RE = weights_RGE.gather(1, group_R1[:, :, None].expand(-1, 1, _GROUP_TOKENS))[:, 0]
    ends_RE = weights_RE.cumsum(dim=1, dtype=torch.float64)
    # The group's two sums may differ in the last bit; the rest must fall short of the group's own end.
    rest_R1 = torch.minimum(target_R1 - before_R1, torch.nextafter(ends_RE[:, -1:], torch.zeros_like(target_R1)))
    offset_R1 = torch.searchsorted(ends_RE, rest_R1, right=True)
    return (group_R1 * _GROUP_TOKENS + offset_R1)[:, 0].clamp_(max=vocab_size - 1)


def _top_logprobs(logits_RV: Tensor, token_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (int64), logprobs (float32) and ranks (int64), each [R, 1 + num_top]: the given token, then the top ones.

    Of equal logits the lower id comes first; all of them have the rank of the first.
    """
    vocab_size = logits_RV.shape[1]
    logprobs_RV = logits_RV.log_softmax(dim=1)
    token_R1 = token_R[:, None]
    rank_R1 = (logits_RV > logits_RV.gather(1, token_R1)).sum(dim=1, keepdim=True) + 1
    if num_top == 0:
        return token_R1, logprobs_RV.gather(1, token_R1), rank_R1
    # topk leaves the order of equal values open, so it sorts integers that are never equal: the float's bits, made to
    # order like integers, above the id counted downwards.
    bits_RV = (logits_RV + 0.0).view(torch.int32)
    ordered_RV = (bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)).to(torch.int64)
    id_V = torch.arange(vocab_size, device=logits_RV.device)
    top_RN = ordered_RV.mul_(1 << 32).add_(vocab_size - 1 - id_V).topk(num_top, dim=1).indices
    value_RN = logits_RV.gather(1, top_RN)
    place_N = torch.arange(num_top, device=logits_RV.device)
    lower_RN = torch.nn.functional.pad(value_RN[:, 1:] < value_RN[:, :-1], (1, 0))
    top_rank_RN = (place_N * lower_RN).cummax(dim=1).values + 1
    ids = torch.cat([token_R1, top_RN], dim=1)
    return ids, logprobs_RV.gather(1, ids), torch.cat([rank_R1, top_rank_RN], dim=1)


@dataclass(frozen=True, slots=True)
class _LogprobTensors:
    """Logprobs of the rows that asked, still on the device.

    rows, num_top   int64 [R] on the host: which rows of the step, and how many top tokens each asked for
    ids, values, ranks   [R, 1 + N], N the largest of num_top
    """

    rows: Int64Array
    num_top: Int64Array
    ids: Tensor
    values: Tensor
    ranks: Tensor

    def start_read_back(self) -> _LogprobTensors:
        """The same with tensors on the host, once the device has passed this point."""
        ids, values, ranks = (t.to("cpu", non_blocking=True) for t in (self.ids, self.values, self.ranks))
        return _LogprobTensors(self.rows, self.num_top, ids, values, ranks)

    def to_host(self, health: NDArray[np.float32]) -> tuple[TokenLogprobs | None, ...]:
        """One entry for each row of the step; health [S] is finite where the row has a token."""
        entries: list[TokenLogprobs | None] = [None] * len(health)
        lists = zip(self.ids.tolist(), self.values.tolist(), self.ranks.tolist(), strict=True)
        for row, num_top, (ids, values, ranks) in zip(self.rows.tolist(), self.num_top.tolist(), lists, strict=True):
            if math.isfinite(health[row]):
                end = 1 + num_top
                entries[row] = TokenLogprobs(tuple(ids[:end]), tuple(values[:end]), tuple(ranks[:end]))
        return tuple(entries)


class _PenaltyState:
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

    def apply(self, logits_RV: Tensor, rows: _Rows) -> None:
        """Penalises in place the rows that have a slot: repetition first, then frequency and presence."""
        chosen = np.flatnonzero(rows["penalty_slot"] >= 0)
        if len(chosen) == 0:
            return
        rows = rows[chosen]
        bound = int(self._most_seen[rows["penalty_slot"]].max())
        if bound == 0:
            return
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
        penalised_RL = repeated_RL.clamp_(max=float(_FLOAT32.max))
        logits_RV[row_R1, token_RL] = torch.where(num_seen_R1 > 0, penalised_RL, logit_RL)

    def record(self, slots: Int64Array, token_S: Tensor) -> None:
        """Notes one more output token, int64 [S], of each row; slots: int64 [S], -1 for rows without penalties."""
        chosen = np.flatnonzero(slots >= 0)
        if len(chosen) == 0:
            return
        slots = slots[chosen]
        bound = int(self._most_seen[slots].max()) + 1
        self._reserve(bound)
        slot_R = upload(slots, self._device)
        token_R = token_S[upload(chosen, self._device)].to(torch.int32)
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
