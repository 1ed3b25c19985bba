"""`Finding`: one thing that was looked at: what there is, what it means for a job, what to do about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Severity(enum.StrEnum):
    """GOOD as it should be; NOTE good to know; COSTS a job runs, slower or smaller; BLOCKS a job cannot run."""

    GOOD = "good"
    NOTE = "note"
    COSTS = "costs"
    BLOCKS = "blocks"


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject` is a few words; `found` what there is, with units; `meaning` for a job; `action` may be empty."""

    subject: str
    severity: Severity
    found: str
    meaning: str
    action: str = ""
