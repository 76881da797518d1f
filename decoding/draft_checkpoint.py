"""Finds the checkpoint that drafts for another, and checks that both mean the same by a token id.

Knows files; reads no weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from config.errors import SettingsError
from config.settings import EngineSettings
from decoding.checkpoint import Checkpoint, open_checkpoint
from decoding.sharding import Shard

_TOKENIZER = "tokenizer.json"

_DRAFT_LENGTH: Final = 4
"""As in the published comparisons; the controller measures no separate model."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """What an engine loads: the model it serves, and the one that drafts for it, if there is one."""

    full: Checkpoint
    draft: Checkpoint | None = None

    @classmethod
    def open(cls, settings: EngineSettings) -> Checkpoints:
        """Look at both. Raises CheckpointError, and SettingsError if their tokens differ."""
        full = open_checkpoint(settings.model, revision=settings.revision)
        if settings.draft_model is None:
            return cls(full)
        draft = open_checkpoint(settings.draft_model, revision=None)
        difference = _difference(full, draft)
        if difference:
            remedy = "pass a draft model with the same tokenizer"
            raise SettingsError(f"draft_model {settings.draft_model}: {difference}; {remedy}")
        return cls(full, draft)

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        """The full one first."""
        return (self.full,) if self.draft is None else (self.full, self.draft)

    def on_a_rank(self, shard: Shard) -> Checkpoints:
        """The same with the sizes that layers have on one of several ranks."""
        return Checkpoints(*map(shard.of_checkpoint, self.all))

    def draft_length(self, settings: EngineSettings) -> int | None:
        """What the one that drafts does for requests that leave it open; None where there is none."""
        return None if self.draft is None else min(_DRAFT_LENGTH, settings.max_draft_length)

    @property
    def draft_context(self) -> int:
        """How many positions the one that drafts knows."""
        return sys.maxsize if self.draft is None else self.draft.shape.max_positions


def _difference(full: Checkpoint, draft: Checkpoint) -> str | None:
    """Why ids of one are not ids of the other, as far as can be seen."""
    sizes = draft.shape.vocab_size, full.shape.vocab_size
    if sizes[0] != sizes[1]:
        return f"its vocabulary has {sizes[0]} tokens, that of the model {sizes[1]}"
    files = draft.folder / _TOKENIZER, full.folder / _TOKENIZER
    if not all(file.is_file() for file in files):
        return None
    own, wanted = map(_vocabulary, files)
    if own == wanted:
        return None
    token = min((own.items() ^ wanted.items()), key=lambda item: item[1])[0]
    return f"its token {token!r} has id {own.get(token)}, in the model {wanted.get(token)}"


def _vocabulary(file: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
