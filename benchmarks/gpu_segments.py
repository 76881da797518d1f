"""Times stretches of a model alone — layers, head, embedding — by number of tokens, and quiets its later layers.

Knows the engine's own decoder and attention; knows nothing of requests or of how drafts are chosen.

Shapes: N tokens, B rows, T cache positions, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_device import Device, Row, gb_per_s
from benchmarks.gpu_shapes import Shape
from config.settings import EngineSettings
from decoding.attention import Attention, Queries, context_classes
from decoding.capacity import Capacity
from decoding.checkpoint import Checkpoint, open_checkpoint
from decoding.model import LlamaDecoder, Weights
from decoding.ragged import Ragged
from decoding.runtime import build_decoder
from decoding.tensor_files import DrawnTensors
from decoding.weights import Placement, load_weights

_BLOCK: Final = 16
_CLOSE_ENOUGH: Final = 0.01
_MOST_PROBES: Final = 12
_LOUDEST: Final = 16.0
_QUIETEST: Final = 1e-4

Known = dict[tuple[str, int, int], float]


def draw_weights(shape: Shape, device: Device, dtype: torch.dtype, drawn: DrawnTensors) -> Weights:
    """The shape's weights on the device."""
    checkpoint = open_checkpoint(str(shape.folder), revision=None)
    placement = Placement(device.torch, dtype, drawn=drawn, shares_tied=device.torch.type != "cpu")
    return load_weights(checkpoint, placement, lambda *_: None)


@dataclass(slots=True)
class Segments:
    """Milliseconds of a model's stretches at one context; each is measured once, when it is first asked for.

    `known` may be shared between models of one shape: times do not depend on what weights say.
    """

    shape: Shape
    device: Device
    weights: Weights
    context: int
    known: Known = field(default_factory=dict)

    def layer_ms(self, num_rows: int, per_row: int) -> float:
        """One layer on so many rows, each with so many tokens behind its context."""
        return self._once(("layer", num_rows, per_row), self._layer_ms)

    def head_ms(self, num_tokens: int) -> float:
        """Final norm and head."""
        return self._once(("head", num_tokens, 1), self._head_ms)

    def embed_ms(self, num_tokens: int) -> float:
        """The embedding."""
        return self._once(("embed", num_tokens, 1), self._embed_ms)

    def plain_ms(self, num_rows: int) -> float:
        """A step that gives each row one token."""
        return self.shape.sizes.num_layers * self.layer_ms(num_rows, 1) + self.head_ms(num_rows)

    def cycle_ms(self, num_rows: int, exit_layer: int, draft_length: int) -> float:
        """Draft and verify: the last draft's early layers run in verification."""
        wide = 1 + draft_length
        early_ms = wide * exit_layer * self.layer_ms(num_rows, 1) + draft_length * self.head_ms(num_rows)
        late_ms = (self.shape.sizes.num_layers - exit_layer) * self.layer_ms(num_rows, wide)
        return early_ms + late_ms + self.head_ms(num_rows * wide)

    def _once(self, key: tuple[str, int, int], measure: Callable[[int, int], float]) -> float:
        if key not in self.known:
            with torch.inference_mode():
                self.known[key] = measure(*key[1:])
        return self.known[key]

    def _layer_ms(self, num_rows: int, per_row: int) -> float:
        decoder, attention = self._decoder(num_rows * _blocks(self.context + per_row))
        queries = _queries(attention, num_rows, per_row, self.context)
        hidden_ND = self._hidden(num_rows * per_row)
        last = decoder.num_layers
        return self.device.time_ms(partial(decoder.run_layers, hidden_ND, 0, last, queries)) / last

    def _head_ms(self, num_tokens: int, _: int) -> float:
        return self.device.time_ms(partial(self._decoder(1)[0].logits, self._hidden(num_tokens)))

    def _embed_ms(self, num_tokens: int, _: int) -> float:
        ids_N = torch.zeros(num_tokens, dtype=torch.int64, device=self.device.torch)
        return self.device.time_ms(partial(self._decoder(1)[0].embed, ids_N))

    def _decoder(self, num_blocks: int) -> tuple[LlamaDecoder, Attention]:
        """The engine's decoder on these weights, with a cache of its own."""
        checkpoint = open_checkpoint(str(self.shape.folder), revision=None)
        return _decoder_of(checkpoint, self.weights, num_blocks)

    def _hidden(self, num_tokens: int) -> Tensor:
        embedding_VD = self.weights.embedding_VD
        return torch.ones(
            num_tokens, embedding_VD.shape[1], dtype=embedding_VD.dtype, device=embedding_VD.device
        )


def _decoder_of(checkpoint: Checkpoint, weights: Weights, num_blocks: int) -> tuple[LlamaDecoder, Attention]:
    longest = min(checkpoint.shape.max_positions, num_blocks * _BLOCK)
    settings = EngineSettings(model=str(checkpoint.folder))
    return build_decoder(settings, checkpoint, Capacity(longest, _BLOCK, num_blocks), weights)


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // _BLOCK)


def _queries(attention: Attention, num_rows: int, per_row: int, context: int) -> Queries:
    """So many tokens of each row behind its context; rows lie one after another in the cache."""
    slots = _blocks(context + per_row) * _BLOCK
    starts_B = np.full(num_rows, context, dtype=np.int64)
    arrangement = attention.arrange(
        Ragged.of(np.full(num_rows, per_row, dtype=np.int64)), context_classes(starts_B + per_row)
    )
    return attention.queries(arrangement, np.arange(num_rows * slots).reshape(num_rows, slots), starts_B)


def measure_layers(segments: Segments, token_counts: tuple[int, ...]) -> Iterator[Row]:
    """Layer, head and embedding by number of tokens, each of a row of its own."""
    shape, itemsize = segments.shape, segments.weights.embedding_VD.dtype.itemsize
    for num_tokens in token_counts:
        layer_ms, head_ms = segments.layer_ms(num_tokens, 1), segments.head_ms(num_tokens)
        yield {
            "shape": shape.name,
            "tokens": num_tokens,
            "context": segments.context,
            "layer_ms": round(layer_ms, 5),
            "head_ms": round(head_ms, 5),
            "embed_ms": round(segments.embed_ms(num_tokens), 5),
            "layer_GB_per_s": round(gb_per_s(shape.layer_bytes * itemsize, layer_ms), 1),
            "head_GB_per_s": round(gb_per_s(shape.head_bytes * itemsize, head_ms), 1),
            "layer_TFLOP_per_s": round(2 * shape.layer_bytes * num_tokens / layer_ms / 1e9, 2),
        }


@torch.inference_mode()
def agreement(shape: Shape, weights: Weights, exit_layer: int, *, num_tokens: int) -> float:
    """Share of random tokens after which an exit's most probable next token is the last layer's."""
    checkpoint = open_checkpoint(str(shape.folder), revision=None)
    decoder, attention = _decoder_of(checkpoint, weights, _blocks(num_tokens))
    ids = np.random.default_rng(0).integers(shape.sizes.vocab_size, size=num_tokens)
    queries = _queries(attention, 1, num_tokens, 0)
    early_ND = decoder.run_layers(
        decoder.embed(torch.from_numpy(ids).to(decoder.device)), 0, exit_layer, queries
    )
    late_ND = decoder.run_layers(early_ND, exit_layer, decoder.num_layers, queries)
    agrees_N = decoder.logits(early_ND).argmax(-1) == decoder.logits(late_ND).argmax(-1)
    return float(agrees_N.float().mean())


def calibrate(
    shape: Shape, device: Device, dtype: torch.dtype, *, acceptance: float, num_tokens: int
) -> tuple[float, float]:
    """The scale of later layers at which the shape's first exit layer agrees with the last one this often, and
    how often it then does; by bisection of the scale's logarithm.
    """
    exit_layer = shape.exit_layers[0]
    low, high = math.log(_QUIETEST), math.log(_LOUDEST)
    nearest = (0.0, 1.0)
    for _ in range(_MOST_PROBES):
        middle = (low + high) / 2
        drawn = DrawnTensors(late_from=exit_layer, late_scale=math.exp(middle))
        found = agreement(shape, draw_weights(shape, device, dtype, drawn), exit_layer, num_tokens=num_tokens)
        if abs(found - acceptance) < abs(nearest[1] - acceptance):
            nearest = (math.exp(middle), found)
        if abs(found - acceptance) <= _CLOSE_ENOUGH:
            break
        low, high = (middle, high) if found > acceptance else (low, middle)
    return nearest
