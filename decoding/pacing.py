"""How much of a long prompt a step takes while others decode: their next tokens should not wait much longer.

Knows seconds and numbers of tokens; knows no sequences. No output depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_STRETCH: Final = 1.0
"""Prompts' part of a step may take so many times what the step takes without it, where no more rows wait for their
first token than for their next."""

_LEAST_TOKENS: Final = 6
"""A prompt always comes on by so many tokens. Shorter parts say little of what longer ones cost."""

_LEAST_S: Final = 1e-6
"""A part that seemed to take no time took some: what is believed to take none would never be held back again."""

_MANY_PARTS: Final = 4
"""A prompt is long that takes more steps than these."""

_PACE: Final = 0.2
"""Share of a step's surprise that is believed."""

_UNLOOKED_STEPS: Final = 64
"""What a step takes without prompts is believed for so many steps with them."""

_MOST_SURPRISING: Final = 2.0
"""One step that took longer than this many times the expected was held up by something else."""


class PromptPacer:
    """Learns what steps and prompt tokens take. Unknown, a prompt is not held back.

    What a step takes without prompts is known by the number of rows that decode, to the next power of two, and
    whether they draft. Where prompts come without end, now and then a step goes without them to look: from steps
    with prompts alone one cannot tell which part is whose.
    """

    def __init__(self) -> None:
        self._step_s: dict[tuple[int, bool], float] = {}
        self._share_drafting: dict[int, float] = {}
        self._num_unlooked: dict[int, int] = {}
        self._token_s: float | None = None

    def observe(self, fed: Sequence[int], seconds: float, *, drafts: bool) -> None:
        """Learn from a step whose rows were fed so many tokens each: those that decode one, with drafts or not."""
        prompt_parts = [num_tokens for num_tokens in fed if num_tokens > 1]
        size = (len(fed) - len(prompt_parts)).bit_length()
        if not prompt_parts:
            self._step_s[size, drafts] = _moved(self._step_s.get((size, drafts)), seconds)
            share = self._share_drafting.get(size, float(drafts))
            self._share_drafting[size] = share + _PACE * (drafts - share)
            self._num_unlooked[size] = 0
            return
        beside_s = self._step_s.get((size, drafts)) if size else 0.0
        if beside_s is not None and sum(prompt_parts) >= _LEAST_TOKENS:
            self._token_s = _moved(self._token_s, max(_LEAST_S, seconds - beside_s) / sum(prompt_parts))

    def num_prompt_tokens(self, *, num_decoding: int, num_beginning: int, most: int) -> int:
        """How many tokens of prompts, `most` or less, may join a step of rows that decode, while others begin."""
        if not num_decoding or not self._token_s or not self._step_s:
            return most
        size = num_decoding.bit_length()
        if self._must_look(size):
            return 0
        mostly_drafts = self._share_drafting.get(size, 0.0) > 0.5
        step_s = self._step_s.get((size, mostly_drafts)) or max(self._step_s.values())
        stretch = _STRETCH * max(1.0, num_beginning / num_decoding)
        return min(most, max(_LEAST_TOKENS, int(stretch * step_s / self._token_s)))

    def _must_look(self, size: int) -> bool:
        """Whether it is time for a step without prompts; it is counted as taken, whatever comes of it."""
        num_unlooked = self._num_unlooked.get(size, _UNLOOKED_STEPS) + 1
        is_due = num_unlooked > _UNLOOKED_STEPS
        self._num_unlooked[size] = 0 if is_due else num_unlooked
        return is_due


def is_long_prompt(num_fed: int, *, num_pending: int, num_uncached: int) -> bool:
    """Whether a step takes part of a prompt that needs many such steps, from its first token that was not cached
    to its last: at its end, too, a part and drafts together would make a step long.
    """
    return num_pending > 1 and num_uncached > _MANY_PARTS * num_fed


def _moved(known: float | None, seen: float) -> float:
    if known is None:
        return seen
    return known + _PACE * (min(seen, _MOST_SURPRISING * known) - known)
