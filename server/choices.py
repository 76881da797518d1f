"""One choice while it is decoded: events become chunks, and are counted as they do.

Knows text, tokens, counts and times; knows nothing of requests or transport.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from decoding.messages import Decoded, FinishReason, Generate, TokenLogprob
from server.drafts import CycleDrafts
from server.metrics import Metrics
from server.text_stream import TextRun, TextStream
from server.token_stream import Arrival

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Chunk:
    """What came of one choice at once: text, and the new tokens that count as delivered with it.

    `text_offsets` has where each token begins in the choice's text, `logprobs` how probable each was, if that was
    asked for. Text may come later than its tokens, when a character or a stop string is not decided yet.
    `is_first` marks the choice's first chunk, which alone has `prompt_logprobs`; `finish_reason` is set on its
    last, which has `stop_reason` too: the stop string or token, none for an end-of-sequence token.
    """

    choice_index: int
    text: str = ""
    token_ids: Sequence[int] = ()
    text_offsets: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    drafts: Sequence[CycleDrafts] = ()
    prompt_logprobs: Sequence[TokenLogprob] = ()
    is_first: bool = False
    finish_reason: str | None = None
    stop_reason: str | int | None = None


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """All chunks of one choice, at least one, as the one chunk that says the same."""
    first, last = chunks[0], chunks[-1]
    return Chunk(
        first.choice_index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=_chained(chunk.token_ids for chunk in chunks),
        text_offsets=_chained(chunk.text_offsets for chunk in chunks),
        logprobs=_chained(chunk.logprobs for chunk in chunks),
        drafts=_chained(chunk.drafts for chunk in chunks),
        prompt_logprobs=first.prompt_logprobs,
        is_first=first.is_first,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def _chained(parts: Iterable[Sequence[_T]]) -> list[_T]:
    return list(chain.from_iterable(parts))


@dataclass(frozen=True, slots=True)
class TokenStops:
    """Which tokens end a choice: `asked` for by the request, the others end a sequence by themselves.

    With `keeps_text`, the text of the last token stays.
    """

    asked: frozenset[int] = frozenset()
    keeps_text: bool = False


class ChoiceProgress:
    """What one choice has given so far, and what its client has not seen of it yet."""

    def __init__(
        self, index: int, sequence: Generate, text: TextStream, *, stops: TokenStops, received_s: float
    ) -> None:
        self.index = index
        self.sequence = sequence
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.has_begun = False
        self.finish_reason: str | None = None
        self._text = text
        self._stops = stops
        self._received_s = received_s
        self._first_s: float | None = None
        self._latest_s = received_s

    @property
    def ttft_s(self) -> float | None:
        """How long its first event took, None before it."""
        return None if self._first_s is None else self._first_s - self._received_s

    def take(self, arrival: Arrival, metrics: Metrics) -> Chunk:
        """Turn an event into a chunk and count it."""
        decoded, is_first = arrival.decoded, not self.has_begun
        run = self._read(decoded)
        self._count(arrival, run.num_tokens, metrics)
        self.finish_reason = FinishReason.STOP if run.stop is not None else decoded.finish_reason
        if self.finish_reason is not None:
            self._count_end(metrics)
        return Chunk(
            self.index,
            text=run.text,
            token_ids=decoded.token_ids[: run.num_tokens],
            text_offsets=run.offsets,
            logprobs=(decoded.logprobs or ())[: run.num_tokens],
            drafts=_drafts(decoded),
            prompt_logprobs=decoded.prompt_logprobs or (),
            is_first=is_first,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason(decoded, run),
        )

    def _read(self, decoded: Decoded) -> TextRun:
        """The event's text, and as many offsets as tokens are delivered."""
        is_last = decoded.finish_reason is not None
        hides_last = decoded.finish_reason is FinishReason.STOP and not self._stops.keeps_text
        run = self._text.push(decoded.token_ids[:-1] if hides_last else decoded.token_ids, is_last=is_last)
        if hides_last and run.stop is None:
            return TextRun(run.text, [*run.offsets, self._text.offset])
        return run

    def _stop_reason(self, decoded: Decoded, run: TextRun) -> str | int | None:
        if run.stop is not None or decoded.finish_reason is not FinishReason.STOP:
            return run.stop
        last = decoded.token_ids[-1]
        return last if last in self._stops.asked else None

    def _count(self, arrival: Arrival, num_delivered: int, metrics: Metrics) -> None:
        decoded = arrival.decoded
        metrics.drafts(
            exit_layer=decoded.exit_layer,
            drafted=decoded.drafted,
            kept=decoded.kept,
            drafter=decoded.drafter,
        )
        metrics.discarded(len(decoded.token_ids) - num_delivered)
        metrics.generation_tokens.inc(num_delivered)
        if not self.has_begun:
            self.has_begun = True
            self.num_cached_tokens = decoded.num_cached_tokens or 0
            metrics.queue_s.observe(decoded.queued_s or 0.0)
        if num_delivered:
            self._count_times(arrival.at_s, num_delivered, metrics)
        self.num_tokens += num_delivered
        self._latest_s = arrival.at_s

    def _count_times(self, at_s: float, num_delivered: int, metrics: Metrics) -> None:
        if self._first_s is None:
            self._first_s = at_s
            metrics.first_token_s.observe(at_s - self._received_s)
        else:
            metrics.token_gap((at_s - self._latest_s) / num_delivered, num_tokens=num_delivered)

    def _count_end(self, metrics: Metrics) -> None:
        metrics.finished(str(self.finish_reason))
        metrics.end_to_end_s.observe(self._latest_s - self._received_s)
        metrics.request_prompt_tokens.observe(len(self.sequence.prompt_ids))
        metrics.request_generation_tokens.observe(self.num_tokens)
        metrics.request_max_tokens.observe(self.sequence.max_new_tokens)
        if self._first_s is not None and self.num_tokens > 1:
            metrics.per_token_s.observe((self._latest_s - self._first_s) / (self.num_tokens - 1))


def _drafts(decoded: Decoded) -> Sequence[CycleDrafts]:
    """The drafts of the cycle, if they are traced."""
    if decoded.drafted_ids is None or not decoded.token_ids:
        return ()
    return (CycleDrafts(decoded.drafted_ids, decoded.kept, decoded.exit_layer, decoded.drafter),)
