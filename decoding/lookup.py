"""Drafts by looking up: what followed the last time the sequence's newest tokens stood in it.

Knows the ids of one sequence; knows no model. Free of layers, and strong where an answer copies its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_LONGEST: Final = 5
_SHORTEST: Final = 2
"""Runs of this many ids are looked up, longest first; a single id says too little about what follows."""


class NgramIndex:
    """Where each short run of a sequence's ids last ended, but for the newest run: nothing follows it yet."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, token_ids: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to `count` ids that followed the longest run which the sequence now ends with; none if it is new.

        `token_ids` are those of the calls before and whatever has come since. A match that reaches the end is
        read on in what it proposes, so a repetition is carried on.
        """
        self._catch_up(token_ids)
        for size in range(min(_LONGEST, len(token_ids)), _SHORTEST - 1, -1):
            end = self._ends.get(tuple(token_ids[-size:]))
            if end is not None:
                following = list(token_ids[end:])
                num_known = len(following)
                for offset in range(count):
                    following.append(following[offset])
                return tuple(following[num_known:])
        return ()

    def _catch_up(self, token_ids: Sequence[int]) -> None:
        """Index every run that ends before the newest id."""
        for end in range(max(self._num_indexed, _SHORTEST), len(token_ids)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._ends[tuple(token_ids[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))
