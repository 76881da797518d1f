"""How much of a long prompt a step takes while others decode: their next tokens should not wait much longer.

Knows seconds and numbers of tokens; knows no sequences. No output depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_STRETCH: Final = 1.25
"""Prompts' part of a step may take so many times what the step takes without it, where no more rows wait for their
first token than for their next."""

_LEAST_TOKENS: Final = 16
"""A prompt always comes on by so many tokens. Parts as short as this say little of what longer ones cost."""

_PACE: Final = 0.2
"""Share of a step's surprise that is believed."""

_MOST_SURPRISING: Final = 2.0
"""One step that took longer than this many times the expected was held up by something else."""


class PromptPacer:
    """Learns what steps and prompt tokens take. Unknown, a prompt is not held back."""

    def __init__(self) -> None:
        self._step_s: float | None = None
        self._token_s: float | None = None

    def observe(self, fed: Sequence[int], seconds: float) -> None:
        """Learn from a step whose rows were fed so many tokens each; those that decode are fed one."""
        prompt_parts = [num_tokens for num_tokens in fed if num_tokens > 1]
        if not prompt_parts:
            self._step_s = _moved(self._step_s, seconds)
        elif sum(prompt_parts) > _LEAST_TOKENS:
            beside = self._step_s if self._step_s and len(prompt_parts) < len(fed) else 0.0
            self._token_s = _moved(self._token_s, max(0.0, seconds - beside) / sum(prompt_parts))

    def num_prompt_tokens(self, *, num_decoding: int, num_beginning: int, most: int) -> int:
        """How many tokens of prompts, `most` or less, may join a step of rows that decode, while others begin."""
        if not num_decoding or not self._step_s or not self._token_s:
            return most
        stretch = _STRETCH * max(1.0, num_beginning / num_decoding)
        return min(most, max(_LEAST_TOKENS, int(stretch * self._step_s / self._token_s)))


def _moved(known: float | None, seen: float) -> float:
    if known is None:
        return seen
    return known + _PACE * (min(seen, _MOST_SURPRISING * known) - known)
