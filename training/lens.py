"""What every layer of a checkpoint would say at every position, computed by the server's own decoder.

Knows ids, layers and probabilities; knows nothing of how they are shown or what is concluded from them.

Shapes: N positions, R = L + 1 rows (row 0 is the embedding, row l is after l layers), K guesses, D model width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from config.errors import StartupError
from config.settings import EngineSettings
from decoding.attention import AttentionShape, GatherAttention
from decoding.checkpoint import Checkpoint, open_checkpoint
from decoding.engine import Engine
from decoding.kv_cache import KVCache
from decoding.messages import Generate, SamplingParams
from decoding.model import LlamaDecoder
from decoding.ragged import Ints, Ragged
from decoding.weights import rotations
from training.token_text import TokenTexts

NUM_GUESSES: Final = 5
"""Tokens kept for each row and position, most probable first."""

_POSITIONS_AT_ONCE: Final = 128
"""Logits of more positions are never held together: a large vocabulary would fill the memory."""


class PromptError(StartupError):
    """The prompt cannot be inspected with this checkpoint."""


@dataclass(frozen=True)
class Reading:
    """What every row says after each position's token. The last row is the model's output.

    `is_raw`: the rows before the last went to the head without the final norm.
    """

    ids_N: Ints
    guesses_RNK: Ints
    probabilities_RNK: NDArray[np.float64]
    is_raw: bool

    @property
    def num_layers(self) -> int:
        """L, the index of the last row."""
        return len(self.guesses_RNK) - 1

    @property
    def num_positions(self) -> int:
        """Tokens inspected."""
        return len(self.ids_N)

    @property
    def top_RN(self) -> Ints:
        """The most probable token of each row at each position."""
        return self.guesses_RNK[:, :, 0]

    @cached_property
    def settled_N(self) -> Ints:
        """Where each position settles: the lowest row from which on every row's top token is the last row's."""
        agrees_RN = self.top_RN == self.top_RN[-1]
        settled: Ints = np.argmin(agrees_RN[::-1], axis=0)
        return np.where(agrees_RN.all(axis=0), 0, len(agrees_RN) - settled)

    @property
    def settled_share_R(self) -> NDArray[np.float64]:
        """Share of positions that have settled by each row; 1 in the last."""
        rows = np.arange(self.num_layers + 1)
        share_R: NDArray[np.float64] = (self.settled_N <= rows[:, None]).mean(axis=1)
        return share_R

    @property
    def mean_settling_layer(self) -> float:
        """Mean over positions of the row they settle at."""
        return float(self.settled_N.mean())


@dataclass(frozen=True, slots=True)
class Inspection:
    """One checkpoint, one prompt: what was generated, and what every row says along prompt and continuation.

    `num_prompt_tokens` of the reading's ids are the prompt's; `generated` are the engine's greedy tokens, of
    which the last was never fed and is in no position. `raw_embedding_N` is the head's top token straight on
    each embedding, without a norm.
    """

    name: str
    is_head_tied: bool
    num_prompt_tokens: int
    generated: tuple[int, ...]
    reading: Reading
    raw_embedding_N: Ints
    texts: TokenTexts


class Lens:
    """An engine to continue prompts with, and its weights over a cache of their own to look inside with."""

    def __init__(self, engine: Engine, checkpoint: Checkpoint) -> None:
        self._engine = engine
        self._checkpoint = checkpoint
        self._tokenizer = Tokenizer.from_str(engine.ready.text.tokenizer_json)
        self._weights = engine.runtime.model.weights
        self._device = engine.runtime.model.device
        self._dtype: torch.dtype = getattr(torch, engine.ready.dtype)

    @classmethod
    def load(cls, settings: EngineSettings) -> Lens:
        """Read a checkpoint. Raises CheckpointError or SettingsError."""
        return cls(Engine.load(settings), open_checkpoint(settings.model, revision=settings.revision))

    def inspect(self, prompt: str, *, name: str, num_new_tokens: int, is_raw: bool) -> Inspection:
        """Continue the prompt greedily by up to `num_new_tokens`, then read all rows. Raises PromptError."""
        prompt_ids = self.encode(prompt, num_new_tokens=num_new_tokens)
        generated = self.continue_greedily(prompt_ids, num_new_tokens)
        ids = [*prompt_ids, *generated[:-1]]
        return Inspection(
            name=name,
            is_head_tied=self._checkpoint.shape.is_head_tied,
            num_prompt_tokens=len(prompt_ids),
            generated=tuple(generated),
            reading=self.read(ids, is_raw=is_raw),
            raw_embedding_N=self._raw_embedding(ids),
            texts=TokenTexts(self._tokenizer),
        )

    def encode(self, prompt: str, *, num_new_tokens: int) -> list[int]:
        """The prompt's ids, at least one, with room for the new tokens. Raises PromptError."""
        try:
            ids: list[int] = self._tokenizer.encode(prompt).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError("the prompt is not valid UTF-8; pass text") from error
        if not ids:
            raise PromptError("the prompt is empty; pass text that has at least one token")
        limit = self._engine.ready.limits.max_model_len
        if len(ids) + num_new_tokens > limit:
            asked = f"{len(ids)} tokens of prompt and {num_new_tokens} new ones"
            raise PromptError(
                f"{asked} exceed the {limit} tokens of {self._engine.ready.model}; shorten them"
            )
        return ids

    def continue_greedily(
        self,
        prompt_ids: Sequence[int],
        num_tokens: int,
        *,
        exit_layer: int | None = None,
        draft_length: int | None = None,
    ) -> list[int]:
        """What the engine generates at temperature 0, up to an end-of-sequence token, that one included.

        Speculation is the checkpoint's own unless chosen; the tokens do not depend on it.
        """
        if not num_tokens:
            return []
        ready = self._engine.ready
        request = Generate(
            sequence_id=0,
            prompt_ids=list(prompt_ids),
            max_new_tokens=num_tokens,
            sampling=SamplingParams(temperature=0.0),
            seed=0,
            stop_token_ids=ready.text.eos_token_ids,
            exit_layer=ready.limits.default_exit_layer if exit_layer is None else exit_layer,
            draft_length=ready.limits.default_draft_length if draft_length is None else draft_length,
        )
        return [token for event in self._engine.generate([request])[0] for token in event.token_ids]

    @torch.inference_mode()
    def read(self, ids: Sequence[int], *, is_raw: bool) -> Reading:
        """What every row says along these ids. See `logits` for `is_raw`."""
        guesses, probabilities = [], []
        for row, hidden_ND in enumerate(self.rows(ids)):
            parts = [
                _top(self.logits(part_ND, row, is_raw=is_raw))
                for part_ND in torch.split(hidden_ND, _POSITIONS_AT_ONCE)
            ]
            guesses.append(np.concatenate([part[0] for part in parts]))
            probabilities.append(np.concatenate([part[1] for part in parts]))
        return Reading(
            ids_N=np.array(ids, dtype=np.int64),
            guesses_RNK=np.stack(guesses),
            probabilities_RNK=np.stack(probabilities),
            is_raw=is_raw,
        )

    @torch.inference_mode()
    def rows(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """The residual stream [N, D] of each row in turn: the embeddings, then after each layer."""
        attention = self._attention(len(ids))
        decoder = LlamaDecoder(self._weights, attention)
        only_row = np.zeros(1, dtype=np.int64)
        arrangement = attention.arrange(Ragged.of(np.array([len(ids)])), only_row)
        queries = attention.queries(arrangement, np.arange(len(ids))[None], only_row)
        hidden_ND = decoder.embed(torch.tensor(ids, device=self._device))
        yield hidden_ND
        for layer in range(decoder.num_layers):
            hidden_ND = decoder.run_layers(hidden_ND, layer, layer + 1, queries)
            yield hidden_ND

    def logits(self, hidden_ND: Tensor, row: int, *, is_raw: bool) -> Tensor:
        """Logits [N, V] of a row's hidden states: final norm, then head, as the server drafts.

        Raw: the head alone, on all rows but the last, whose norm is part of the model. This is what un-embedding
        the hidden states that transformers returns gives, since it returns the last ones normalised.
        """
        skips_norm = is_raw and row < len(self._weights.layers)
        return self._weights.head(hidden_ND if skips_norm else self._weights.final_norm(hidden_ND))

    @torch.inference_mode()
    def _raw_embedding(self, ids: Sequence[int]) -> Ints:
        parts = torch.split(next(self.rows(ids)), _POSITIONS_AT_ONCE)
        return np.concatenate([_top(self.logits(part_ND, 0, is_raw=True))[0][:, 0] for part_ND in parts])

    def _attention(self, num_positions: int) -> GatherAttention:
        sizes = self._checkpoint.shape
        shape = AttentionShape(sizes.num_heads, sizes.num_kv_heads, sizes.head_width)
        cache = KVCache(
            num_layers=sizes.num_layers,
            num_slots=num_positions,
            slot_width=shape.slot_width,
            dtype=self._dtype,
            device=self._device,
        )
        turns_TF = rotations(self._checkpoint, num_positions, self._device, self._dtype)
        return GatherAttention(shape=shape, cache=cache, rotations_TF=turns_TF, dtype=self._dtype)


def _top(logits_NV: Tensor) -> tuple[Ints, NDArray[np.float64]]:
    """Ids and probabilities [N, K] of the best tokens. The first is the argmax, in ties too, as in the server."""
    probabilities_NV = logits_NV.softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    best_N1 = logits_NV.argmax(-1, keepdim=True)
    others_NV = logits_NV.scatter(1, best_N1, -torch.inf)
    others_NK = others_NV.topk(min(NUM_GUESSES, logits_NV.shape[1]) - 1).indices
    guesses_NK = torch.cat((best_N1, others_NK), dim=1)
    return guesses_NK.cpu().numpy(), probabilities_NV.gather(1, guesses_NK).double().cpu().numpy()
