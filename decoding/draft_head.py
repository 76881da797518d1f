"""A head for drafts alone: the rows of the model's head that stand for the tokens seen lately.

Knows token ids and one matrix; knows nothing of rows of a batch or of which drafts will stand. What it leaves out
can only cost drafts, never change a token: the full model chooses with the whole head.

Shapes: N tokens seen, P rows drafting, R tokens that drafts may be, D model width, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from config.settings import EngineSettings
from decoding.coupling import choose
from decoding.logits import Sampling
from decoding.model import Weights
from decoding.ragged import Ints


def make_draft_head(settings: EngineSettings, weights: Weights) -> DraftHead | None:
    """The one asked for; None if none is, or one of all tokens. `weights` show their head."""
    num_tokens, rows_VD = settings.draft_vocab_size, weights.head_rows_VD
    if num_tokens is None or rows_VD is None or num_tokens >= len(rows_VD):
        return None
    return DraftHead(rows_VD, num_tokens)


class DraftHead:
    """Chooses among R of V tokens: at first those of the lowest ids, the first merges of most vocabularies; then a
    token that is seen takes the place of the one not seen for longest.

    `rows_VD` are all rows of the model's head, on its device; R of them are copied. Its own tensors never move.
    """

    def __init__(self, rows_VD: Tensor, num_tokens: int) -> None:
        vocab_size = len(rows_VD)
        assert 0 < num_tokens <= vocab_size
        self._all_rows_VD = rows_VD
        self._rows_RD = rows_VD[:num_tokens].clone(memory_format=torch.contiguous_format)
        self._ids_R = torch.arange(num_tokens, device=rows_VD.device)
        # The same on the host, and where each token has its place: −1 is nowhere.
        self._held_R: Ints = np.arange(num_tokens)
        self._place_V: Ints = np.full(vocab_size, -1)
        self._place_V[:num_tokens] = self._held_R
        # The last of the lowest ids are the first to go.
        self._seen_at_R: Ints = -np.arange(num_tokens)
        self._num_seen = 0

    @property
    def token_ids(self) -> frozenset[int]:
        """The R tokens."""
        return frozenset(self._held_R.tolist())

    def see(self, ids_N: Ints) -> None:
        """These tokens came: from now on drafts may be these. Of more than R it keeps some."""
        self._num_seen += 1
        ids = np.unique(ids_N)
        places = self._place_V[ids]
        self._seen_at_R[places[places >= 0]] = self._num_seen
        missing = ids[places < 0][: len(self._held_R)]
        if len(missing):
            self._take_in(missing)

    def choose(self, normed_PD: Tensor, sampling: Sampling, positions_P: Tensor) -> Tensor:
        """As `coupling.choose`, from final-normed hidden states, among the R tokens: int64 [P]."""
        logits_PR = torch.mm(normed_PD, self._rows_RD.t())
        if not sampling.any_sampled:
            return self._ids_R[logits_PR.argmax(-1)]
        # Noise and filters act by a token's id: each logit back in its place, all others forbidden.
        logits_PV = logits_PR.new_full((len(logits_PR), len(self._place_V)), -torch.inf)
        logits_PV[:, self._ids_R] = logits_PR
        return choose(logits_PV, sampling, positions_P)

    def _take_in(self, ids: Ints) -> None:
        """Give these the places that were not seen for longest."""
        places = np.argpartition(self._seen_at_R, len(ids) - 1)[: len(ids)]
        self._place_V[self._held_R[places]] = -1
        self._place_V[ids] = places
        self._held_R[places] = ids
        self._seen_at_R[places] = self._num_seen
        device = self._rows_RD.device
        on_device, places_on_device = (torch.from_numpy(each).to(device) for each in (ids, places))
        self._rows_RD[places_on_device] = self._all_rows_VD[on_device]
        self._ids_R[places_on_device] = on_device
