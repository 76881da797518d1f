"""Edits of logits: what requests allow, forbid, favour and penalise, before temperature and filters.

Knows ids that stand before a token, and logits; knows nothing of seeds, or of which ids were drafted. Draft and
full model edit alike, each behind everything that stands before its token, drafts of the same cycle included.

Shapes: N tokens, V vocabulary, T ids that stand before a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.messages import LogitEdits


@dataclass(frozen=True, slots=True)
class Editor:
    """The edits of one sequence, its ids on the device."""

    asked: LogitEdits
    num_prompt_tokens: int
    allowed: Tensor | None
    bad_words: tuple[Tensor, ...]
    stop: Tensor | None
    biased: Tensor
    biases: Tensor

    @classmethod
    def of(
        cls, asked: LogitEdits, *, num_prompt_tokens: int, stop_token_ids: Sequence[int], device: torch.device
    ) -> Editor:
        """Prepare the edits that a request asked for; `stop_token_ids` wait for its `min_tokens`."""

        def ids(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            asked=asked,
            num_prompt_tokens=num_prompt_tokens,
            allowed=ids(asked.allowed_token_ids) if asked.allowed_token_ids else None,
            bad_words=tuple(map(ids, asked.bad_words)),
            stop=ids(stop_token_ids) if asked.min_tokens and stop_token_ids else None,
            biased=ids(list(asked.logit_bias)),
            biases=torch.tensor(list(asked.logit_bias.values()), dtype=torch.float64, device=device),
        )

    def edit(self, logits_V: Tensor, before_T: Tensor) -> Tensor:
        """New logits of the token that follows `before_T`; a forbidden one has −∞.

        Where a rule would forbid whatever the ones before it left, it is not applied: some token must stand.
        """
        if self.allowed is not None:
            outside_V = torch.ones_like(logits_V, dtype=torch.bool).index_fill_(0, self.allowed, value=False)
            logits_V = _forbid(logits_V, outside_V)
        for word in self.bad_words:
            logits_V = _forbid(logits_V, _completes(word, before_T, logits_V))
        if self.stop is not None and len(before_T) - self.num_prompt_tokens < self.asked.min_tokens:
            is_stop_V = torch.zeros_like(logits_V, dtype=torch.bool).index_fill_(0, self.stop, value=True)
            logits_V = _forbid(logits_V, is_stop_V)
        if len(self.biased):
            logits_V = logits_V.index_add(0, self.biased, self.biases.to(logits_V.dtype))
        return self._penalise(logits_V, before_T)

    def _penalise(self, logits_V: Tensor, before_T: Tensor) -> Tensor:
        asked = self.asked
        if asked.repetition_penalty != 1:
            is_known_V = torch.zeros_like(logits_V, dtype=torch.bool).index_fill_(0, before_T, value=True)
            factor = asked.repetition_penalty
            weaker_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
            logits_V = torch.where(is_known_V, weaker_V, logits_V)
        if asked.frequency_penalty or asked.presence_penalty:
            new_T = before_T[self.num_prompt_tokens :]
            counts_V = torch.zeros_like(logits_V).index_add_(
                0, new_T, torch.ones_like(new_T, dtype=logits_V.dtype)
            )
            logits_V = logits_V - asked.frequency_penalty * counts_V
            logits_V = logits_V - asked.presence_penalty * (counts_V > 0)
        return logits_V


@dataclass(frozen=True, slots=True)
class Edited:
    """A row of a step whose logits are edited, and the ids it is known to have: prompt and committed ones."""

    editor: Editor
    known_T: Tensor

    def edit(self, logits_V: Tensor, drafts: Sequence[Tensor]) -> Tensor:
        """New logits of the token that follows the known ids and these drafts of the cycle, each a scalar."""
        before_T = torch.cat((self.known_T, torch.stack(list(drafts)))) if drafts else self.known_T
        return self.editor.edit(logits_V, before_T)


def apply_edits(
    logits_NV: Tensor, edited: Sequence[Edited | None], drafts_before: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Logits with the edits of each of N tokens applied; `drafts_before[n]` are the drafts that precede token n.

    Rows without edits keep their values. Float32 at least; `logits_NV` is kept.
    """
    if not any(edited):
        return logits_NV
    # A loop over rows: only those that asked for edits, each with ids of its own.
    new_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
    for index, (row, drafts) in enumerate(zip(edited, drafts_before, strict=True)):
        if row is not None:
            new_NV[index] = row.edit(new_NV[index], drafts)
    return new_NV


def _forbid(logits_V: Tensor, forbidden_V: Tensor) -> Tensor:
    kept_V = logits_V.masked_fill(forbidden_V, -torch.inf)
    return torch.where(kept_V.amax() > -torch.inf, kept_V, logits_V)


def _completes(word: Tensor, before_T: Tensor, logits_V: Tensor) -> Tensor:
    """Where the last id of `word` is, if the others stand right before."""
    is_last_V = torch.zeros_like(logits_V, dtype=torch.bool).index_fill_(0, word[-1:], value=True)
    num_others = len(word) - 1
    if num_others > len(before_T):
        return torch.zeros_like(is_last_V)
    return is_last_V & (before_T[len(before_T) - num_others :] == word[:-1]).all()
