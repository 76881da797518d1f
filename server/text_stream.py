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
    depend on how the text was divided.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        assert all(stop_strings), "an empty stop string matches everywhere"
        self._stops = tuple(stop_strings)
        self._held = ""

    def push(self, delta: str) -> Matched:
        """Text that can go out now; after a match, nothing may be pushed."""
        text = self._held + delta
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, negative_length, stop = min(found)
            return Matched(text[: end + negative_length], stop)
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return Matched(text[: len(text) - num_held])

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class TextRun:
    """What a run of ids became: text to send, ids that count as delivered, the stop string met if any."""

    text: str
    num_tokens: int
    stop: str | None = None


class TextStream:
    """Ids of one choice to the text a client may see."""

    def __init__(self, decode: Decode, *, prompt_ids: Sequence[int], stop_strings: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode, prompt_ids=prompt_ids)
        self._matcher = StopMatcher(stop_strings)

    def push(self, token_ids: Sequence[int], *, is_last: bool) -> TextRun:
        """Text of a run; `is_last` also gives out everything held back. A stop string ends the run early."""
        parts = []
        for count, token_id in enumerate(token_ids, start=1):
            matched = self._matcher.push(self._detokenizer.push(token_id))
            parts.append(matched.text)
            if matched.stop is not None:
                return TextRun("".join(parts), count, matched.stop)
        if not is_last:
            return TextRun("".join(parts), len(token_ids))
        matched = self._matcher.push(self._detokenizer.flush())
        rest = matched.text if matched.stop is not None else matched.text + self._matcher.flush()
        return TextRun("".join(parts) + rest, len(token_ids), matched.stop)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
