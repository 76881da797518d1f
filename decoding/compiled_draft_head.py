"""A head for drafts alone, as compiled code has it: the matrix columns of the tokens seen lately.

Knows how many tokens there are and where they stand at first; compiled code knows who comes and who goes. What it
leaves out can only cost drafts, never change a token: the full model chooses with the whole head.

Shapes: V vocabulary, R tokens of the head.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from torch import Tensor

from decoding import compiled_structs as structs
from decoding.compiled_rows import address
from decoding.panels import PANEL

_SHARE: Final = 8
_FEWEST, _MOST = 1024, 8192
"""Unless asked otherwise drafts are among an eighth of the vocabulary, within these bounds: rarely is a token
wanting that was not among the last thousand different ones.
"""


class CompiledDraftHead:
    """At first of the tokens of the lowest ids, the first merges of most vocabularies; whenever another is seen it
    takes the place of the one not seen for longest.
    """

    def __init__(self, panels: Tensor, num_tokens: int, vocab_size: int) -> None:
        self._panels = panels[: num_tokens // PANEL].clone()
        places_R = np.arange(num_tokens, dtype=np.int32)
        places_V = np.full(vocab_size, -1, dtype=np.int32)
        places_V[:num_tokens] = places_R
        # Behind the last place stands where both ends meet: the lowest ids are taken to be seen last.
        older = np.roll(np.arange(num_tokens + 1, dtype=np.int32), -1)
        newer = np.roll(np.arange(num_tokens + 1, dtype=np.int32), 1)
        self._arrays = self._ids_R, *_ = places_R.copy(), places_V, older, newer
        self.struct = structs.DraftHead(num_tokens, self._panels.data_ptr(), *map(address, self._arrays))

    @property
    def token_ids(self) -> frozenset[int]:
        """The R tokens."""
        return frozenset(self._ids_R.tolist())


def num_drafted_tokens(asked: int | None, vocab_size: int) -> int | None:
    """How many tokens drafts are among, in whole panels; None for all."""
    wanted = asked or min(max(vocab_size // _SHARE, _FEWEST), _MOST)
    whole = -(-wanted // PANEL) * PANEL
    return whole if whole < vocab_size else None
