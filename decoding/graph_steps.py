"""What is recorded: one token of each row through the early layers, with or without a draft after it, and the
verification of all tokens of a step.

Knows shapes and static tensors; what a step holds is read on the device, so that one recording serves all steps
of its shape. Nothing here may ask the device for a value, or read one on the host.

Shapes: B rows with padding, Q tokens of a row, N = B·Q, K = Q − 1 drafts, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from decoding.acceptance import num_kept
from decoding.attention import Arrangement, context_classes
from decoding.attention_standing import Standing
from decoding.draft_head import DraftHead
from decoding.graph_state import Choosing, Columns, GraphState
from decoding.graphs import Work
from decoding.model import LlamaDecoder
from decoding.ragged import Ragged


@dataclass(frozen=True, slots=True)
class Walk:
    """One token of each of `num_rows` rows through the first `exit_layer` layers; if it is `choosing`, then a
    draft after it.
    """

    exit_layer: int
    num_rows: int
    choosing: Choosing | None


@dataclass(frozen=True, slots=True)
class Verification:
    """All `num_columns` tokens of each of `num_rows` rows through the layers from `exit_layer` on, and choices
    after each.
    """

    exit_layer: int
    num_rows: int
    num_columns: int
    choosing: Choosing


Key = Walk | Verification


class GraphSteps:
    """Makes the work of each shape."""

    def __init__(
        self, model: LlamaDecoder, attention: Standing, state: GraphState, draft_head: DraftHead | None
    ) -> None:
        self._model = model
        self._attention = attention
        self._state = state
        self._draft_head = draft_head

    def work(self, key: Key) -> Work:
        """What to record for this shape. What it needs on the device is there when this returns."""
        if isinstance(key, Walk):
            rows = self._state.first(key.num_rows, key.choosing or Choosing.GREEDY)
            return partial(self._walk, key, rows, self._arranged(key.num_rows, 1))
        rows = self._state.first(key.num_rows, key.choosing)
        return partial(self._verify, key, rows, self._arranged(key.num_rows, key.num_columns))

    def _arranged(self, num_rows: int, num_columns: int) -> Arrangement:
        counts_B = np.full(num_rows, num_columns, dtype=np.int64)
        return self._attention.arrange(Ragged.of(counts_B), context_classes(counts_B))

    def _walk(self, key: Walk, rows: Columns, arrangement: Arrangement) -> None:
        """The token at the column, which then moves on."""
        positions_B = rows.starts_B + rows.column_1
        next_1 = rows.column_1 + 1
        _tell(rows, positions_B, rows.starts_B + torch.minimum(next_1, rows.counts_B))
        queries = self._attention.standing(arrangement, rows.contexts_BX)
        hidden_BD = self._model.embed(rows.ids_BQ.index_select(1, rows.column_1)[:, 0])
        hidden_BD = self._model.run_layers(hidden_BD, 0, key.exit_layer, queries)
        rows.exits_BQD.index_copy_(1, rows.column_1, hidden_BD[:, None])
        if key.choosing is not None:
            drafts_B = self._draft(rows, hidden_BD, positions_B + 1)
            known_B = rows.ids_BQ.index_select(1, next_1)[:, 0]
            ids_B = torch.where(rows.column_1 < rows.made_B, drafts_B, known_B)
            rows.ids_BQ.index_copy_(1, next_1, ids_B[:, None])
        rows.column_1.copy_(next_1)

    def _draft(self, rows: Columns, exits_BD: Tensor, positions_B: Tensor) -> Tensor:
        if self._draft_head is None:
            return self._model.choose(self._model.logits(exits_BD), rows.sampling, positions_B)
        return self._draft_head.choose(self._model.weights.final_norm(exits_BD), rows.sampling, positions_B)

    def _verify(self, key: Verification, rows: Columns, arrangement: Arrangement) -> None:
        model, columns = self._model, key.num_columns
        _tell(rows, rows.starts_B, rows.starts_B + rows.counts_B)
        queries = self._attention.standing(arrangement, rows.contexts_BX)
        ids_BQ = rows.ids_BQ[:, :columns]
        if key.exit_layer:
            hidden_ND = rows.exits_BQD[:, :columns].flatten(0, 1)
        else:
            hidden_ND = model.embed(ids_BQ.reshape(-1))
        hidden_ND = model.run_layers(hidden_ND, key.exit_layer, model.num_layers, queries)
        device = ids_BQ.device
        rows_N = torch.arange(key.num_rows, device=device)[:, None].expand(-1, columns).reshape(-1)
        positions_BQ = rows.starts_B[:, None] + torch.arange(1, columns + 1, device=device)
        chosen_N = model.choose(model.logits(hidden_ND), rows.sampling.take(rows_N), positions_BQ.reshape(-1))
        choices_BQ = chosen_N.view(-1, columns)
        kept_B = num_kept(ids_BQ[:, 1:], choices_BQ, rows.counts_B - 1)
        rows.result_BP[:, 0].copy_(kept_B)
        rows.result_BP[:, 1 : 1 + columns].copy_(choices_BQ)


def _tell(rows: Columns, starts_B: Tensor, lengths_B: Tensor) -> None:
    """Say where queries stand, in the attention's own numbers."""
    rows.contexts_BX[:, 0].copy_(starts_B)
    rows.contexts_BX[:, 1].copy_(lengths_B)
