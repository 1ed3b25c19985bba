"""`EngineStats`: what an engine has done so far, in counts. A plain value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine started. Blocks are KV blocks of all layers, on each stage."""

    prompt_tokens: int
    output_tokens: int
    steps: int
    prefill_steps: int
    decode_steps: int
    blocks_sent_home: int
    blocks_refilled: int
    requests_left_batch: int
    requests_restarted: int
    num_device_blocks: int
    num_window_blocks: int
    num_host_blocks: int
    elapsed_seconds: float
