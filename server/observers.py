"""Who wants to hear what a worker does, as seen by its client.

Knows events; knows nothing of who listens.
"""

from __future__ import annotations

from typing import Protocol

from decoding.messages import Ready, StepReport


class StartListener(Protocol):
    """Who wants to hear how the start goes: a terminal, a log."""

    def loading(self, stage: str, fraction: float) -> None:
        """A stage is under way."""

    def ready(self, ready: Ready) -> None:
        """The worker serves."""

    def failed(self, message: str) -> None:
        """The worker will never serve, or serves no more; `message` is one line."""


class StepObserver(Protocol):
    """Who counts what the worker does."""

    def worker_ready(self, ready: Ready) -> None:
        """The worker serves from now on."""

    def step(self, report: StepReport) -> None:
        """A step ended."""

    def discarded(self, num_tokens: int) -> None:
        """Tokens came for a sequence that nobody waits for any more."""

    def expired(self, reason: str) -> None:
        """A request was stopped at a deadline."""
