"""The one-way channel between neighbouring ranks.

The rule: one direction, down the line, at most `depth` messages in flight; a buffer lives,
unmodified, until its send completes.
"""

from __future__ import annotations

from typing import Protocol

from scpl.message import Message

__all__ = ["EndOfLine", "Outbox"]


class Outbox(Protocol):
    """Where a rank's last stage sends what it makes."""

    def send(self, message: Message) -> None:
        """Send on; returns at once unless `depth` messages are still in flight."""

    def close(self) -> None:
        """Wait until everything has left."""


class EndOfLine:
    """The outbox of the last rank: there is nobody to send to."""

    def send(self, message: Message) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
