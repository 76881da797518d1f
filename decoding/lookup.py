"""Drafts by looking up: what followed the last time the sequence's newest tokens stood in it.

Knows the ids of one sequence; knows no model. Free of layers, and strong where an answer copies its prompt.

Shapes: P pairs of neighbouring ids, M of them that match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

LONGEST_MATCH: Final = 5
"""Runs of two to this many ids are looked up, longest first; a single id says too little about what follows."""

_RECENT: Final = 1024
"""So far back is looked first: what repeats itself is found there, and the whole need not be read."""

_BEFORE_P: Final = np.full(LONGEST_MATCH - 2, -1, dtype=np.int64)
"""Stands before the first pair and is like none: no match begins before the sequence does."""


class NgramSearch:
    """Searches a sequence for what it now ends with. It is read anew each time: a long prompt, too, takes no more
    than microseconds, where an index of its runs would first have to be built.

    Ids are kept as pairs of neighbours, each one number: a run of five is four pairs in a row.
    """

    def __init__(self) -> None:
        self._pairs_P = _BEFORE_P
        self._num_ids = 0
        self._found = 0, 0, 0

    def num_matched(self, token_ids: Sequence[int]) -> int:
        """How many of the newest ids stood in the sequence before, side by side: 2 … LONGEST_MATCH, or 0.

        `token_ids` are those of the calls before and whatever has come since.
        """
        return self._match(token_ids)[0]

    def propose(self, token_ids: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to `count` ids that followed the longest run which the sequence now ends with; none if it is new.

        A match that reaches the end is read on in what it proposes, so a repetition is carried on.
        """
        num_ids, end = len(token_ids), self._match(token_ids)[1]
        return tuple(token_ids[end + offset % (num_ids - end)] for offset in range(count)) if end else ()

    def _match(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """How many ids match, and how many come up to the end of the latest such match; 0 and 0 if none do."""
        if self._found[0] != len(token_ids):
            self._catch_up(token_ids)
            num_pairs, end = self._latest()
            self._found = len(token_ids), num_pairs + (num_pairs > 0), end
        return self._found[1:]

    def _catch_up(self, token_ids: Sequence[int]) -> None:
        """Add the pairs that newer ids end."""
        first, num_ids = max(self._num_ids, 1), len(token_ids)
        if num_ids <= first:
            return
        self._num_ids = num_ids
        start, end = _place(first), _place(num_ids)
        if end > len(self._pairs_P):
            # Twice the room, so that growing by a token at a time copies little.
            self._pairs_P = np.concatenate((self._pairs_P[:start], np.empty(2 * end - start, np.int64)))
        ids = np.array(token_ids[first - 1 :], dtype=np.int64)
        self._pairs_P[start:end] = ids[:-1] << 32 | ids[1:]

    def _latest(self) -> tuple[int, int]:
        """How many pairs match, and how many ids come up to the end of the latest of the longest matches."""
        oldest, newest = _place(1), _place(self._num_ids) - 1
        recent = max(oldest, newest - _RECENT)
        num_pairs, latest = self._longest(recent, newest)
        if num_pairs < LONGEST_MATCH - 1 and recent > oldest:
            num_pairs, latest = self._longest(oldest, newest)
        return num_pairs, latest - oldest + 2 if num_pairs else 0

    def _longest(self, start: int, newest: int) -> tuple[int, int]:
        """How many pairs the longest match of those from `start` on has, and where the latest such match ends."""
        pairs_P = self._pairs_P
        num_pairs, latest = 0, 0
        ends_M = (pairs_P[start:newest] == pairs_P[newest]).nonzero()[0] + start
        while len(ends_M):
            num_pairs, latest = num_pairs + 1, int(ends_M[-1])
            if num_pairs == LONGEST_MATCH - 1:
                break
            ends_M = ends_M[pairs_P[ends_M - num_pairs] == pairs_P[newest - num_pairs]]
        return num_pairs, latest


def _place(index: int) -> int:
    """Where the pair stands that the id of this index ends."""
    return len(_BEFORE_P) + index - 1
