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

    def restarting(self, message: str) -> None:
        """The worker died after it had served, and another follows; `message` is one line."""

    def failed(self, message: str) -> None:
        """No worker will serve; `message` is one line."""


class StepObserver(Protocol):
    """Who counts what the worker does."""

    def worker_ready(self, ready: Ready) -> None:
        """The worker serves from now on."""

    def step(self, report: StepReport) -> None:
        """A step ended."""

    def restarted(self) -> None:
        """A worker is started in the place of one that died."""

    def resumed(self) -> None:
        """A request that the last worker had is given to this one."""

    def discarded(self, num_tokens: int) -> None:
        """Tokens came for a sequence that nobody waits for any more."""

    def expired(self, reason: str) -> None:
        """A request was stopped at a deadline."""
