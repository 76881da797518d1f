"""Edits of logits: what requests allow, forbid, favour and penalise, and what of a text they depend on.

Knows ids; knows nothing of logits or drafts, and runs on the host. `decoding.edited_logits` applies them.

Shapes: A ids asked for by name, C ids that rules may forbid, W bad words, P ids of all words but their last, T
distinct ids of a text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from decoding.messages import LogitEdits
from decoding.ragged import Ints

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NEVER: Final = 2**31 - 1
"""The rank of no rule."""
_NOWHERE: Final = -1
"""The id of no token: what stands before the first."""


@dataclass(frozen=True, slots=True)
class BadWords:
    """Word w ends on the `ends_W[w]`-th of the ids that rules may forbid, if the word's others stand right before:
    `ids_P` of words `words_P`, each `back_P` ids before the token that is chosen, `farthest` at most.
    """

    ends_W: Ints
    words_P: Ints
    back_P: Ints
    ids_P: Ints
    farthest: int

    @classmethod
    def of(cls, words: Sequence[Sequence[int]], ruled_C: Ints) -> BadWords:
        """These words; all their last ids are among `ruled_C`, which ascend."""
        before = [
            (index, back, token_id)
            for index, word in enumerate(words)
            for back, token_id in enumerate(reversed(word[:-1]), start=1)
        ]
        words_P, back_P, ids_P = np.array(before, dtype=np.int64).reshape(-1, 3).T.copy()
        ends_W = np.searchsorted(ruled_C, _ids(word[-1] for word in words))
        return cls(ends_W, words_P, back_P, ids_P, farthest=int(back_P.max(initial=0)))


@dataclass(frozen=True, slots=True)
class Editor:
    """The edits of one sequence. `allowed_A` is empty where all ids are.

    Rules that forbid have ranks: at 0 all ids but the allowed are forbidden, then come bad words, then stop tokens
    that wait. `ruled_C` are the ids that words end on and the stop tokens that `is_stop_C` tells; `ranks_C` is 0
    for those that are not allowed.
    """

    asked: LogitEdits
    num_prompt_tokens: int
    allowed_A: Ints
    ruled_C: Ints
    ranks_C: Ints
    is_stop_C: Bools
    bad_words: BadWords
    biased_A: Ints
    biases_A: Floats

    @classmethod
    def of(cls, asked: LogitEdits, *, num_prompt_tokens: int, stop_token_ids: Sequence[int]) -> Editor:
        """Prepare the edits that a request asked for; `stop_token_ids` wait for its `min_tokens`."""
        allowed_A, stops = _ids(asked.allowed_token_ids), stop_token_ids if asked.min_tokens else ()
        ruled_C = np.unique(_ids(chain((word[-1] for word in asked.bad_words), stops)))
        is_outside_C = ~np.isin(ruled_C, allowed_A) & bool(len(allowed_A))
        return cls(
            asked=asked,
            num_prompt_tokens=num_prompt_tokens,
            allowed_A=allowed_A,
            ruled_C=ruled_C,
            ranks_C=np.where(is_outside_C, 0, NEVER),
            is_stop_C=np.isin(ruled_C, _ids(stops)),
            bad_words=BadWords.of(asked.bad_words, ruled_C),
            biased_A=_ids(asked.logit_bias),
            biases_A=np.array([*asked.logit_bias.values()], dtype=np.float64),
        )

    @property
    def penalises(self) -> bool:
        """Whether it matters which ids a text has."""
        asked = self.asked
        return asked.repetition_penalty != 1 or bool(asked.frequency_penalty or asked.presence_penalty)

    @property
    def stop_rank(self) -> int:
        """The rank of the rule that stop tokens wait."""
        return len(self.bad_words.ends_W) + 1

    def never_forbids_all(self, vocab_size: int) -> bool:
        """Whether some id is left whatever stands before."""
        num_allowed = len(np.unique(self.allowed_A)) or vocab_size
        return int((self.ranks_C > 0).sum()) < num_allowed


class Tally:
    """The distinct ids that a sequence's text is penalised for, and how often each came after the prompt.

    The prompt's count for nothing but repetition.
    """

    def __init__(self, asked: LogitEdits, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> None:
        counted = dict.fromkeys(prompt_ids if asked.repetition_penalty != 1 else ())
        self._ids = array("q", counted)
        self._counts = array("q", bytes(8 * len(counted)))
        self._places = {token_id: place for place, token_id in enumerate(counted)}
        for token_id in new_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """A new token came."""
        place = self._places.setdefault(token_id, len(self._ids))
        if place == len(self._ids):
            self._ids.append(token_id)
            self._counts.append(0)
        self._counts[place] += 1

    def taken(self) -> tuple[Ints, Ints]:
        """The ids and their counts as they are now: copies."""
        return np.array(self._ids, dtype=np.int64), np.array(self._counts, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Known:
    """What edits depend on of a text's known ids: how many are new, those it is penalised for with their counts,
    and the latest ones, as many as stand before the last of its longest bad word, −1 where there is none.
    """

    num_new: int
    ids_T: Ints
    counts_T: Ints
    latest: Ints


@dataclass(frozen=True, slots=True)
class Edited:
    """A row of a step whose logits are edited, and what is known of its text: prompt and committed ids."""

    editor: Editor
    known: Known

    @classmethod
    def of(cls, editor: Editor, token_ids: Sequence[int], tally: Tally | None) -> Edited:
        """A sequence's row. There is a tally where there are penalties."""
        ids_T, counts_T = (_NONE, _NONE) if tally is None else tally.taken()
        latest = _latest(token_ids, editor.bad_words.farthest) if editor.bad_words.farthest else _NONE
        return cls(editor, Known(len(token_ids) - editor.num_prompt_tokens, ids_T, counts_T, latest))

    @property
    def num_ids(self) -> int:
        """How many ids are looked at for each of its tokens."""
        editor = self.editor
        named = len(editor.allowed_A) + len(editor.ruled_C) + len(editor.biased_A)
        return named + len(editor.bad_words.ids_P) + len(self.known.ids_T)


def _latest(token_ids: Sequence[int], most: int) -> Ints:
    own = token_ids[-most:]
    return _ids([*[_NOWHERE] * (most - len(own)), *own])


def _ids(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


_NONE: Final = _ids(())
