"""Layers compiled for the CPU that they run on: a stretch of them in one call, without operators in between.

Knows how compiled code is called and given its matrices; knows nothing of rows or drafts.

Shapes: N tokens, D model width, V vocabulary, O outputs, I inputs, T cache positions, F head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from config.caches import cache_folder
from decoding import compiled_structs as structs
from decoding.attention import Arrangement, AttentionShape, Queries
from decoding.compiled_draft_head import CompiledDraftHead, num_drafted_tokens
from decoding.compiled_library import build
from decoding.compiled_rows import (
    UNSTOPPED,
    MadeDrafts,
    PlacedColumns,
    PlacedConfidence,
    PlacedRows,
    address,
    sampling_columns,
)
from decoding.kv_cache import KVCache
from decoding.logits import Sampling
from decoding.model import LlamaDecoder, RmsNorm, Weights
from decoding.panels import PanelLinear
from decoding.ragged import Ints, Ragged

CACHED: Final = (torch.float32, torch.bfloat16)
HEAD_WIDTHS: Final = (16, 32, 64, 80, 96, 128)
"""What it is made for."""

_STORED: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _Placed(Queries):
    """Which tokens stand where; the arrays live as long as this does."""

    tokens: structs.Tokens
    arrays: tuple[Ints, ...]


class SlotAttention:
    """Says where each token's context lies. Attends nothing itself: compiled layers do."""

    def __init__(self, cache: KVCache, rotations_TF: Tensor) -> None:
        self.cache = cache
        self.rotations_TF = rotations_TF

    def arrange(self, tokens: Ragged, classes_B: Ints) -> Arrangement:
        """Nothing is padded, whatever the rows."""
        return Arrangement(tokens)

    def queries(self, arrangement: Arrangement, slots_BT: Ints, starts_B: Ints) -> Queries:
        """Say which tokens stand where; compiled code looks up the rest."""
        tokens = arrangement.tokens
        arrays = tokens.rows_N, tokens.steps_N, np.ascontiguousarray(starts_B), np.ascontiguousarray(slots_BT)
        places = (array.ctypes.data for array in arrays)
        placed = structs.Tokens(len(tokens.rows_N), slots_BT.shape[1], *places, self.rotations_TF.data_ptr())
        return _Placed(placed, arrays)

    def attend(self, layer: int, qkv_NW: Tensor, queries: Queries) -> Tensor:
        """Never asked for."""
        raise NotImplementedError


class CompiledDecoder(LlamaDecoder):
    """Runs layers first … last − 1 in one call, on one thread; all sums are float32.

    A token's results do not depend on the tokens beside it.
    """

    def __init__(
        self,
        weights: Weights,
        attention: SlotAttention,
        shape: AttentionShape,
        library: ctypes.CDLL,
        *,
        draft_vocab_size: int | None = None,
    ) -> None:
        super().__init__(weights, attention)
        self._library = library
        matrices = [
            m for layer in weights.layers for m in (layer.qkv, layer.attention_out, layer.gate_up, layer.down)
        ]
        linears = [_panels(each) for each in (*matrices, weights.head)]
        dtypes = {linear.panels.dtype for linear in linears}
        stored = dtypes.pop() if len(dtypes) == 1 else torch.float32
        for linear in linears:
            linear.store_as(stored)
        self._norms_D = [
            _norm(each) for layer in weights.layers for each in (layer.attention_norm, layer.mlp_norm)
        ]
        self._final_norm_D = _norm(weights.final_norm)
        self._head = linears[-1]
        self._layers = _layers(linears[:-1], self._norms_D, attention.cache)
        self._model = structs.Model(
            weights.embedding_VD.shape[1],
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_width,
            linears[3].shape[1],
            len(weights.layers),
            weights.final_norm.eps,
            _stored_code(stored, weights.embedding_VD.dtype, library),
            CACHED.index(attention.cache.layer(0).dtype),
            self._layers,
        )
        self._ends = structs.Ends(
            self._head.shape[0],
            self._head.num_computed,
            weights.embedding_VD.data_ptr(),
            attention.rotations_TF.data_ptr(),
            self._final_norm_D.data_ptr(),
            self._head.panels.data_ptr(),
        )
        num_drafted = num_drafted_tokens(draft_vocab_size, self._head.shape[0])
        self.draft_head: CompiledDraftHead | None = None
        if num_drafted is not None:
            self.draft_head = CompiledDraftHead(self._head.panels, num_drafted, self._head.shape[0])
            self._ends.drafts = ctypes.pointer(self.draft_head.struct)

    def draft(
        self,
        exit_layer: int,
        lengths_B: Ints,
        last_ids_B: Tensor,
        slots_BT: Ints,
        num_computed_B: Ints,
        sampling: Sampling,
    ) -> tuple[Tensor, Tensor]:
        """Ids [M] and exit hiddens [M, D] of all drafts, step after step: what the steps give one by one."""
        num_drafts, width = int(lengths_B.sum()), self._weights.embedding_VD.shape[1]
        ids_M, exits_MD = torch.empty(num_drafts, dtype=torch.int64), torch.empty(num_drafts, width)
        rows = PlacedRows(slots_BT, num_computed_B, PlacedColumns(sampling))
        made = MadeDrafts(exit_layer, lengths_B, last_ids_B.numpy(), ids_M.numpy())
        made.struct.exits = exits_MD.data_ptr()
        self._library.draft_tokens(
            ctypes.byref(self._model),
            ctypes.byref(self._ends),
            ctypes.byref(rows.struct),
            ctypes.byref(UNSTOPPED.struct),
            ctypes.byref(made.struct),
        )
        self.num_layer_calls += exit_layer * int(lengths_B.max())
        return ids_M, exits_MD

    @property
    def see(self) -> Callable[[Ints], None] | None:
        """From now on drafts may be these tokens; None where they may be any."""
        return None if self.draft_head is None else self._see

    def _see(self, ids_N: Ints) -> None:
        self._library.see_tokens(
            ctypes.byref(self._model),
            ctypes.byref(self._ends),
            ctypes.c_void_p(address(ids_N)),
            ctypes.c_int64(len(ids_N)),
        )

    def run_step(
        self, rows: PlacedRows, confidence: PlacedConfidence, made: MadeDrafts, step: structs.Step
    ) -> None:
        """Draft, verify and keep: all of a step in one call. `step` says what is fed, and where tokens are put."""
        self._library.run_step(
            ctypes.byref(self._model),
            ctypes.byref(self._ends),
            ctypes.byref(rows.struct),
            ctypes.byref(confidence.struct),
            ctypes.byref(made.struct),
            ctypes.byref(step),
        )
        self.num_layer_calls += made.exit_layer * max(made.num_made_B.tolist()) + self.num_layers

    def embed(self, ids_N: Tensor) -> Tensor:
        """Hidden states [N, D] before any layer; between calls they stay what they are within one, float32."""
        return super().embed(ids_N).float()

    def run_layers(self, hidden_ND: Tensor, first: int, last: int, queries: Queries) -> Tensor:
        """Residual stream after layers first … last − 1; `hidden_ND` is what enters `first`, and is kept."""
        assert isinstance(queries, _Placed)
        out_ND = hidden_ND.clone(memory_format=torch.contiguous_format)
        self._library.run_layers(
            ctypes.byref(self._model),
            ctypes.c_int64(first),
            ctypes.c_int64(last),
            ctypes.c_void_p(out_ND.data_ptr()),
            ctypes.byref(queries.tokens),
        )
        self.num_layer_calls += last - first
        return out_ND

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of hidden states after any layer: the final norm, then the one head of the model."""
        entering_ND = hidden_ND.contiguous()
        logits_NV = torch.empty(len(hidden_ND), self._head.num_computed)
        self._library.head_logits(
            ctypes.byref(self._model),
            ctypes.c_void_p(self._final_norm_D.data_ptr()),
            ctypes.c_void_p(self._head.panels.data_ptr()),
            ctypes.c_int64(self._head.num_computed),
            ctypes.c_void_p(entering_ND.data_ptr()),
            ctypes.c_int64(len(hidden_ND)),
            ctypes.c_void_p(logits_NV.data_ptr()),
        )
        return logits_NV[:, : self._head.shape[0]]

    def choose(self, logits_NV: Tensor, sampling: Sampling, positions_N: Tensor) -> Tensor:
        """The token that stands at each position by the choice rule, int64 [N]."""
        columns = list(sampling_columns(sampling))
        if not sampling.any_sampled:
            # Columns of a batch without samples are not spread over its choices: they say the same of all.
            columns = [column.new_zeros(len(logits_NV)) for column in columns]
        chosen_N = torch.empty(len(logits_NV), dtype=torch.int64)
        assert logits_NV.dtype == torch.float32
        assert logits_NV.stride(1) == 1
        # Kept until the call returns: a column that is not contiguous is copied.
        columns = [column.contiguous() for column in (*columns, positions_N)]
        self._library.choose_tokens(
            ctypes.c_void_p(logits_NV.data_ptr()),
            None,
            ctypes.c_int64(len(logits_NV)),
            ctypes.c_int64(logits_NV.shape[1]),
            ctypes.c_int64(logits_NV.stride(0)),
            *(ctypes.c_void_p(column.data_ptr()) for column in columns),
            ctypes.c_void_p(chosen_N.data_ptr()),
            None,
        )
        return chosen_N


def make_compiled(
    weights: Weights,
    shape: AttentionShape,
    cache: KVCache,
    rotations_TF: Tensor,
    *,
    draft_vocab_size: int | None = None,
) -> tuple[CompiledDecoder, SlotAttention]:
    """A decoder of weights that are PanelLinear, over this cache, which drafts among so many tokens. Raises
    SettingsError.
    """
    attention, library = SlotAttention(cache, rotations_TF), build(cache_folder())
    decoder = CompiledDecoder(weights, attention, shape, library, draft_vocab_size=draft_vocab_size)
    return decoder, attention


def _stored_code(stored: torch.dtype, computed: torch.dtype, library: ctypes.CDLL) -> int:
    """How products go: where weights and activations are bfloat16, as such if the CPU can."""
    if stored == computed == torch.bfloat16 and library.has_bfloat16_products():
        return len(_STORED)
    return _STORED.index(stored)


def _panels(linear: object) -> PanelLinear:
    assert isinstance(linear, PanelLinear)
    return linear


def _norm(norm: RmsNorm) -> Tensor:
    return norm.weight_D.float().contiguous()


def _layers(
    linears: Sequence[PanelLinear], norms_D: Sequence[Tensor], cache: KVCache
) -> ctypes.Array[structs.Layer]:
    """Addresses of four matrices and two norms for each layer."""
    num_layers = len(linears) // 4
    layers = (structs.Layer * num_layers)()
    for index in range(num_layers):
        qkv, out, gate_up, down = (linear.panels.data_ptr() for linear in linears[4 * index : 4 * index + 4])
        attention_norm, mlp_norm = (norm.data_ptr() for norm in norms_D[2 * index : 2 * index + 2])
        cached = cache.layer(index).data_ptr()
        layers[index] = structs.Layer(attention_norm, qkv, out, mlp_norm, gate_up, down, cached)
    return layers
