"""What one stack fix reports about itself (ours)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fix:
    """The state of one fix in this process.

    Attributes:
        name: what it repairs, in two or three words.
        active: whether it changed anything here.
        reason: why it is active, or why it is not needed.
        ends_with: the version that makes it unnecessary.
    """

    name: str
    active: bool
    reason: str
    ends_with: str
