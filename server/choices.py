"""One choice while it is decoded: events become chunks of text, and are counted as they do.

Knows text, counts and times; knows nothing of requests or transport.
"""

from __future__ import annotations

from dataclasses import dataclass

from decoding.messages import FinishReason, Generate
from server.engine_client import Arrival
from server.metrics import Metrics
from server.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text of one choice; `finish_reason` is set on its last chunk and only there."""

    choice_index: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | None = None


class ChoiceProgress:
    """What one choice has given so far, and what its client has not seen of it yet."""

    def __init__(self, index: int, sequence: Generate, text: TextStream, *, received_s: float) -> None:
        self.index = index
        self.sequence = sequence
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._text = text
        self._received_s = received_s
        self._first_s: float | None = None
        self._latest_s = received_s

    @property
    def has_begun(self) -> bool:
        """Whether anything was decoded."""
        return self._first_s is not None

    def take(self, arrival: Arrival, metrics: Metrics) -> Chunk:
        """Turn an event into a chunk and count it."""
        decoded = arrival.decoded
        ended_by_token = decoded.finish_reason is FinishReason.STOP
        visible = decoded.token_ids[:-1] if ended_by_token else decoded.token_ids
        run = self._text.push(visible, is_last=decoded.finish_reason is not None)
        num_delivered = run.num_tokens + (ended_by_token and run.stop is None)
        self._count(arrival, num_delivered, metrics)
        self.finish_reason = FinishReason.STOP if run.stop is not None else decoded.finish_reason
        if self.finish_reason is not None:
            self._count_end(metrics)
        return Chunk(self.index, run.text, self.finish_reason, run.stop)

    def _count(self, arrival: Arrival, num_delivered: int, metrics: Metrics) -> None:
        decoded = arrival.decoded
        metrics.drafts(exit_layer=decoded.exit_layer, drafted=decoded.drafted, kept=decoded.kept)
        metrics.discarded(len(decoded.token_ids) - num_delivered)
        metrics.generation_tokens.inc(num_delivered)
        if self._first_s is None:
            self._first_s = arrival.at_s
            self.num_cached_tokens = decoded.num_cached_tokens or 0
            metrics.first_token_s.observe(arrival.at_s - self._received_s)
            metrics.queue_s.observe(decoded.queued_s or 0.0)
        elif num_delivered:
            gap_s = (arrival.at_s - self._latest_s) / num_delivered
            metrics.token_gap(gap_s, num_tokens=num_delivered)
        self.num_tokens += num_delivered
        self._latest_s = arrival.at_s

    def _count_end(self, metrics: Metrics) -> None:
        assert self._first_s is not None
        metrics.finished(str(self.finish_reason))
        metrics.end_to_end_s.observe(self._latest_s - self._received_s)
        metrics.request_prompt_tokens.observe(len(self.sequence.prompt_ids))
        metrics.request_generation_tokens.observe(self.num_tokens)
        metrics.request_max_tokens.observe(self.sequence.max_new_tokens)
        if self.num_tokens > 1:
            metrics.per_token_s.observe((self._latest_s - self._first_s) / (self.num_tokens - 1))
