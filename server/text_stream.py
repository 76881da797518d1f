"""Token ids become text as they arrive: whole characters only, and nothing from a stop string on.

Knows ids, text and stop strings; knows nothing of requests or transport. Pure: the same ids give the same
text, however they were divided into runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
# UTF-8 needs at most four bytes and byte tokens carry one each; twice that is a text that never completes.
_MAX_PENDING_TOKENS: Final = 8
# Enough of the prompt for a decoder to know whether the first word continues a line.
_CONTEXT_TOKENS: Final = 6


class Detokenizer:
    """Turns ids into text deltas that end on whole characters.

    `decode` turns ids into text on its own; the window it is asked for begins with ids whose text is already
    out, because some decoders drop the space in front of the first word they see. A character that stays
    incomplete for eight tokens is given out as U+FFFD.
    """

    def __init__(self, decode: Decode, *, prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._reset(list(prompt_ids[-_CONTEXT_TOKENS:]))

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often that of several ids or none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_partial = text.endswith(_REPLACEMENT)
        num_pending = len(self._window) - self._num_shown_tokens
        if is_partial and num_pending < _MAX_PENDING_TOKENS:
            return ""
        if len(text) == len(self._shown):
            # An id without text, as special ones are, must not widen the window for ever.
            self._window.pop()
            return ""
        return self._show(text)

    def flush(self) -> str:
        """The rest, with U+FFFD for what never became a character."""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        delta = text[len(self._shown) :]
        if delta:
            self._reset(self._window[self._num_shown_tokens :])
        return delta

    def _reset(self, window: list[int]) -> None:
        shown = self._decode(window)
        if shown.endswith(_REPLACEMENT):
            window, shown = [], ""
        self._window = window
        self._shown = shown
        self._num_shown_tokens = len(window)


@dataclass(frozen=True, slots=True)
class Matched:
    """What a stop matcher let through, and the stop string it met, if any."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Lets text through until a stop string is complete, and holds back what might begin one.

    The match that is complete first wins, the longest of those complete together; so the result does not
    depend on how the text was divided. `keeps_stop` lets the stop string through too.
    """

    def __init__(self, stop_strings: Sequence[str], *, keeps_stop: bool = False) -> None:
        assert all(stop_strings), "an empty stop string matches everywhere"
        self._stops = tuple(stop_strings)
        self._keeps_stop = keeps_stop
        self._held = ""

    def push(self, delta: str, *, is_armed: bool = True) -> Matched:
        """Text that can go out now; after a match, nothing may be pushed.

        Unless `is_armed`, a stop string that `delta` completes is text like any other.
        """
        text = self._held + delta
        if is_armed and (found := self._find(text)):
            end, negative_length, stop = min(found)
            return Matched(text[: end if self._keeps_stop else end + negative_length], stop)
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return Matched(text[: len(text) - num_held])

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> list[tuple[int, int, str]]:
        """Matches that end behind what was held: end, negative length, stop string."""
        starts = ((text.find(stop, max(0, len(self._held) - len(stop) + 1)), stop) for stop in self._stops)
        return [(start + len(stop), -len(stop), stop) for start, stop in starts if start >= 0]


@dataclass(frozen=True, slots=True)
class TextRun:
    """What a run of ids became: text to send, where each delivered id begins, the stop string met if any.

    An offset counts characters of the choice's text; an id that completes no character has that of the next.
    """

    text: str
    offsets: Sequence[int]
    stop: str | None = None

    @property
    def num_tokens(self) -> int:
        """Ids that count as delivered: up to the one that completed a stop string."""
        return len(self.offsets)


@dataclass(frozen=True, slots=True)
class StopRules:
    """What ends a text: `strings`, once more than `min_tokens` ids have come, and whether they stay in it."""

    strings: Sequence[str] = ()
    min_tokens: int = 0
    keeps_stop: bool = False


class TextStream:
    """Ids of one choice to the text a client may see; its first character has the offset `begins_at`."""

    def __init__(
        self, decode: Decode, *, prompt_ids: Sequence[int], stops: StopRules, begins_at: int = 0
    ) -> None:
        self._detokenizer = Detokenizer(decode, prompt_ids=prompt_ids)
        self._matcher = StopMatcher(stops.strings, keeps_stop=stops.keeps_stop)
        self._min_tokens = stops.min_tokens
        self._num_tokens = 0
        self._offset = begins_at

    def push(self, token_ids: Sequence[int], *, is_last: bool) -> TextRun:
        """Text of a run; `is_last` also gives out everything held back. A stop string ends the run early."""
        parts, offsets = [], []
        for token_id in token_ids:
            self._num_tokens += 1
            offsets.append(self._offset)
            matched = self._match(self._detokenizer.push(token_id))
            parts.append(matched.text)
            if matched.stop is not None:
                return TextRun("".join(parts), offsets, matched.stop)
        if not is_last:
            return TextRun("".join(parts), offsets)
        matched = self._match(self._detokenizer.flush())
        rest = matched.text if matched.stop is not None else matched.text + self._matcher.flush()
        return TextRun("".join(parts) + rest, offsets, matched.stop)

    @property
    def offset(self) -> int:
        """Where the next id begins."""
        return self._offset

    def _match(self, delta: str) -> Matched:
        self._offset += len(delta)
        return self._matcher.push(delta, is_armed=self._num_tokens > self._min_tokens)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
