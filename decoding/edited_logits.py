"""Applies edits to the logits of many tokens at once, whatever rows they are of and whatever drafts precede them.

Knows rows with edits, and logits; knows nothing of seeds or models. Draft and full model edit alike, each behind
everything that stands before its token, drafts of the same cycle included. Only logits that an edit is about are
read or written: rows without edits pay nothing. Loops over rows gather arrays, and nothing else.

Shapes: N tokens, E of them edited, K drafts before them, V vocabulary, B rows of a step. What each token has
several of comes in pairs, token after token: C of them with ids that rules may forbid, W with bad words, D with
drafts, P with others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.edits import NEVER, Edited
from decoding.ragged import Ints, Ragged

Array = NDArray[np.generic]

_NO_DRAFT: Final = -1

_MOST_PAIRS: Final = 1 << 20
"""Pairs that are gathered at once: long prompts have many ids to penalise, and each takes some hundred bytes."""


@dataclass(frozen=True, slots=True)
class Before:
    """What stands before each of N tokens: the known ids of row `rows_N`, then the first `num_drafts_N` of
    `drafts_NK`, which lie on the device; past them, anything.
    """

    rows_N: Ints
    num_drafts_N: Ints
    drafts_NK: Tensor

    @classmethod
    def step(cls, rows_N: Ints, drafts: Sequence[Tensor], device: torch.device) -> Before:
        """The next draft of these rows; each of `drafts` so far has one of every row, in their order."""
        none = torch.empty((len(rows_N), 0), dtype=torch.int64, device=device)
        drafts_NK = torch.stack(list(drafts), dim=1) if drafts else none
        return cls(rows_N, np.full(len(rows_N), len(drafts)), drafts_NK)


def apply_edits(
    logits_NV: Tensor, edited: Sequence[Edited | None], before: Before, *, most_pairs: int = _MOST_PAIRS
) -> Tensor:
    """Logits with the edits of each token's row applied; a forbidden one has −∞. `edited` are the step's rows.

    Float32 at least; logits that are so already are changed in place. Some `most_pairs` are gathered at once.
    """
    rows = [row for row in edited if row is not None]
    if not rows:
        return logits_NV
    is_edited_B = np.array([row is not None for row in edited])
    indices_E = np.flatnonzero(is_edited_B[before.rows_N])
    rows_E = (is_edited_B.cumsum() - 1)[before.rows_N[indices_E]]
    new_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    num_ids_E = np.array([row.num_ids for row in rows])[rows_E]
    for part in _parts(num_ids_E, most_pairs):
        tokens = _Tokens(
            logits_NV=new_NV,
            rows=rows,
            indices_E=indices_E[part],
            rows_E=rows_E[part],
            num_drafts_E=before.num_drafts_N[indices_E[part]],
            drafts_NK=before.drafts_NK,
        )
        _allow(tokens)
        _forbid(tokens)
        _favour(tokens)
        _penalise(tokens)
    return new_NV


def _parts(num_ids_E: Ints, most_pairs: int) -> list[slice]:
    """Neighbouring tokens that have, but for the first one's ids, no more of them together than `most_pairs`."""
    parts_E = num_ids_E.cumsum() // most_pairs
    cuts = [0, *(np.flatnonzero(np.diff(parts_E)) + 1).tolist(), len(num_ids_E)]
    return [slice(first, last) for first, last in pairwise(cuts)]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pair p is of token `tokens_P[p]` and, of what all rows have, row after row, the `at_P[p]`-th. The first of
    token e is the `firsts_E[e]`-th.
    """

    tokens_P: Ints
    at_P: Ints
    firsts_E: Ints


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The edited tokens: token e is the `indices_E[e]`-th of N, of row `rows_E[e]` of `rows`, which have edits."""

    logits_NV: Tensor
    rows: Sequence[Edited]
    indices_E: Ints
    rows_E: Ints
    num_drafts_E: Ints
    drafts_NK: Tensor

    def pairs(self, arrays: Sequence[Array]) -> _Pairs:
        """Each token with all that its row has, of an array for each row."""
        counts = np.array(list(map(len, arrays)))
        ragged = Ragged.of(counts[self.rows_E])
        starts_E = (np.cumsum(counts) - counts)[self.rows_E]
        return _Pairs(ragged.rows_N, ragged.steps_N + starts_E[ragged.rows_N], ragged.firsts_B)

    def each(self, value: Callable[[Edited], float]) -> NDArray[np.float64]:
        """A number of each token's row: [E]."""
        return np.array(list(map(value, self.rows)), dtype=np.float64)[self.rows_E]

    def send(self, array: Array) -> Tensor:
        """To the device."""
        return torch.from_numpy(array).to(self.logits_NV.device, non_blocking=True)

    def places(self, tokens_P: Ints) -> Tensor:
        """Which of the N tokens these are, on the device."""
        return self.send(self.indices_E[tokens_P])


def _allow(tokens: _Tokens) -> None:
    allowed = [row.editor.allowed_A for row in tokens.rows]
    pairs = tokens.pairs(allowed)
    if not len(pairs.at_P):
        return
    places = tokens.places(pairs.tokens_P), tokens.send(np.concatenate(allowed)[pairs.at_P])
    left_P = tokens.logits_NV[places]
    tokens.logits_NV.index_fill_(0, tokens.places(np.unique(pairs.tokens_P)), -torch.inf)
    tokens.logits_NV[places] = left_P


def _forbid(tokens: _Tokens) -> None:
    """Forbid what words would end on and stop tokens that wait.

    A rule that would forbid whatever the ones before it left is not applied: some token must stand. So those
    stand that are forbidden last, if all are.
    """
    editors = [row.editor for row in tokens.rows]
    pairs = tokens.pairs([editor.ruled_C for editor in editors])
    if not len(pairs.at_P):
        return
    ranks_C = tokens.send(_ranks_but_of_words(tokens, pairs))
    _rank_words(tokens, pairs, ranks_C)
    vocab_size = tokens.logits_NV.shape[1]
    is_some_left_E = tokens.each(lambda row: row.editor.never_forbids_all(vocab_size)) > 0
    tokens_C = tokens.send(pairs.tokens_P)
    highest_E = tokens.send(np.where(is_some_left_E, NEVER, 0))
    highest_E.scatter_reduce_(0, tokens_C, ranks_C, "amax")
    ids_C = np.concatenate([editor.ruled_C for editor in editors])[pairs.at_P]
    places = tokens.places(pairs.tokens_P), tokens.send(ids_C)
    is_forbidden_C = ranks_C < highest_E[tokens_C]
    tokens.logits_NV[places] = tokens.logits_NV[places].masked_fill(is_forbidden_C, -torch.inf)


def _ranks_but_of_words(tokens: _Tokens, pairs: _Pairs) -> Ints:
    """The rank of the first rule that forbids each id, bad words left out."""
    editors = [row.editor for row in tokens.rows]
    num_new_E = tokens.each(lambda row: row.known.num_new) + tokens.num_drafts_E
    waits_E = num_new_E < tokens.each(lambda row: row.editor.asked.min_tokens)
    is_stop_C = np.concatenate([editor.is_stop_C for editor in editors])[pairs.at_P]
    stop_ranks_E = np.where(waits_E, tokens.each(lambda row: row.editor.stop_rank), NEVER).astype(np.int64)
    ranks_C = np.concatenate([editor.ranks_C for editor in editors])[pairs.at_P]
    return np.where(is_stop_C, np.minimum(ranks_C, stop_ranks_E[pairs.tokens_P]), ranks_C)


def _rank_words(tokens: _Tokens, pairs: _Pairs, ranks_C: Tensor) -> None:
    """Lower the rank of ids that would complete a bad word to that of the word."""
    ends = [row.editor.bad_words.ends_W for row in tokens.rows]
    words = tokens.pairs(ends)
    if not len(words.at_P):
        return
    ends_W = np.concatenate(ends)[words.at_P] + pairs.firsts_E[words.tokens_P]
    own_ranks_W = 1 + np.arange(len(words.at_P)) - words.firsts_E[words.tokens_P]
    is_begun_W = _num_missing(tokens, words) == 0
    ranks_W = torch.where(is_begun_W, tokens.send(own_ranks_W), NEVER)
    ranks_C.scatter_reduce_(0, tokens.send(ends_W), ranks_W, "amin")


def _num_missing(tokens: _Tokens, words: _Pairs) -> Tensor:
    """How many of the ids before each word's last do not stand where they should: [W]."""
    spelled = [row.editor.bad_words for row in tokens.rows]
    pairs = tokens.pairs([words.ids_P for words in spelled])
    ids_P, back_P, words_P = (
        np.concatenate(columns)[pairs.at_P]
        for columns in zip(*((words.ids_P, words.back_P, words.words_P) for words in spelled), strict=True)
    )
    words_P = words_P + words.firsts_E[pairs.tokens_P]
    latest = [row.known.latest for row in tokens.rows]
    ends_E = np.cumsum(list(map(len, latest)))[tokens.rows_E]
    # So many ids before the first draft; not above 0 for a draft.
    known_back_P = back_P - tokens.num_drafts_E[pairs.tokens_P]
    known, drafted = np.flatnonzero(known_back_P > 0), np.flatnonzero(known_back_P <= 0)
    found = np.concatenate(latest)[ends_E[pairs.tokens_P[known]] - known_back_P[known]]
    missing = words_P[known][found != ids_P[known]]
    num_missing_W = tokens.send(np.bincount(missing, minlength=len(words.at_P)))
    drafts = tokens.drafts_NK[tokens.places(pairs.tokens_P[drafted]), tokens.send(-known_back_P[drafted])]
    is_other = drafts != tokens.send(ids_P[drafted])
    return num_missing_W.index_add_(0, tokens.send(words_P[drafted]), is_other.long())


def _favour(tokens: _Tokens) -> None:
    editors = [row.editor for row in tokens.rows]
    pairs = tokens.pairs([editor.biased_A for editor in editors])
    if not len(pairs.at_P):
        return
    ids_P, biases_P = (
        tokens.send(np.concatenate(columns)[pairs.at_P])
        for columns in zip(*((editor.biased_A, editor.biases_A) for editor in editors), strict=True)
    )
    tokens.logits_NV[tokens.places(pairs.tokens_P), ids_P] += biases_P.to(tokens.logits_NV.dtype)


def _penalise(tokens: _Tokens) -> None:
    """Penalise ids that came, drafts among them: each pair of a token and an id is computed whole, once.

    Pairs are those of drafts first, then those of known ids.
    """
    is_penalised_E = tokens.each(lambda row: row.editor.penalises) > 0
    drafts = Ragged.of(np.where(is_penalised_E, tokens.num_drafts_E, 0))
    known_ids = [row.known.ids_T for row in tokens.rows]
    known = tokens.pairs(known_ids)
    tokens_P, num_drafts = np.concatenate((drafts.rows_N, known.tokens_P)), len(drafts.rows_N)
    if not len(tokens_P):
        return
    counts_P = np.zeros(len(tokens_P), dtype=np.int64)
    np.concatenate([row.known.counts_T for row in tokens.rows]).take(known.at_P, out=counts_P[num_drafts:])
    rows_P, counts_on_device_P = tokens.places(tokens_P), tokens.send(counts_P)
    ids_P = tokens.send(np.concatenate(known_ids)[known.at_P])
    if num_drafts:
        ids_D = tokens.drafts_NK[rows_P[:num_drafts], tokens.send(drafts.steps_N)]
        ids_P = torch.cat((ids_D, ids_P))
        counts_on_device_P += _num_drafted(tokens, tokens_P, ids_P)
    new_P = _penalised(tokens, tokens_P, tokens.logits_NV[rows_P, ids_P], counts_on_device_P)
    # Known ids come last: counts of a draft that is one of them are of drafts alone.
    for part in (slice(num_drafts), slice(num_drafts, None)):
        tokens.logits_NV[rows_P[part], ids_P[part]] = new_P[part]


def _num_drafted(tokens: _Tokens, tokens_P: Ints, ids_P: Tensor) -> Tensor:
    """How many of the drafts before a token are the pair's id."""
    is_own_EK = np.arange(tokens.drafts_NK.shape[1]) < tokens.num_drafts_E[:, None]
    drafts_EK = tokens.drafts_NK[tokens.send(tokens.indices_E)]
    drafts_EK = drafts_EK.masked_fill_(tokens.send(~is_own_EK), _NO_DRAFT)
    places_P, counts_P = tokens.send(tokens_P), torch.zeros_like(ids_P)
    # A loop over drafts: a long prompt has too many ids to hold each beside every draft.
    for drafts_E in drafts_EK.unbind(1):
        counts_P += drafts_E[places_P] == ids_P
    return counts_P


def _penalised(tokens: _Tokens, tokens_P: Ints, logits_P: Tensor, counts_P: Tensor) -> Tensor:
    """Logits of ids that stand before, new ones among them so often."""
    each = tokens.each
    penalties_3E = np.stack(
        (
            each(lambda row: row.editor.asked.repetition_penalty),
            each(lambda row: row.editor.asked.frequency_penalty),
            each(lambda row: row.editor.asked.presence_penalty),
        )
    )
    factors_P, per_token_P, once_P = tokens.send(penalties_3E[:, tokens_P]).to(logits_P.dtype)
    new_P = torch.where(logits_P > 0, logits_P / factors_P, logits_P * factors_P)
    new_P -= per_token_P * counts_P
    new_P -= once_P * (counts_P > 0)
    return new_P
