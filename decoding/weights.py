"""Reads a checkpoint's tensors, slice by slice, into the fused matrices that the decoder runs.

Knows tensor names, shapes and devices; knows nothing of requests.

Shapes: D model width, V vocabulary, O outputs, I inputs, H query heads, G key/value heads, F head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from decoding.checkpoint import Checkpoint, ModelShape
from decoding.linear import DenseLinear, Linear, OffloadedLinear, store
from decoding.model import Layer, RmsNorm, Weights
from decoding.parallel_linear import Collectives, put_together
from decoding.sharding import WHOLE, Cut, Shard
from decoding.tensor_files import DrawnTensors, TensorFiles, Tensors

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go: the device and dtype they are used in.

    With an `offload_folder`, matrices are written there by accelerate and mapped into memory for use; once
    everything is loaded the folder may be deleted. If they are `drawn`, no file of weights is read. A model that
    `shows_head` has the head's rows there as they are, too. One that `shares_tied` weights holds no embedding
    beside a tied head, but reads its rows as columns there, which a CPU is slow at. Of one that several ranks run
    only the `shard` is read, and `collectives` put together what the shards come to.
    """

    device: torch.device
    dtype: torch.dtype
    offload_folder: Path | None = None
    drawn: DrawnTensors | None = None
    shows_head: bool = False
    shares_tied: bool = False
    form: Callable[[Tensor], Linear] = store
    shard: Shard = WHOLE
    collectives: Collectives | None = None


def load_weights(checkpoint: Checkpoint, placement: Placement, progress: Progress) -> Weights:
    """Read every tensor once; peak memory beyond the weights is one fused matrix. Raises CheckpointError."""
    shape = checkpoint.shape
    with _reader(checkpoint, placement) as reader:
        layers = []
        for index in range(shape.num_layers):
            layers.append(_read_layer(reader, f"model.layers.{index}", shape))
            progress("weights", (index + 1) / shape.num_layers)
        head = reader.linear([_head_name(shape)], (shape.vocab_size,), shape.model_width, cut=Cut.JOINED)
        embedding_VD = _embedding(reader, shape, head)
        return Weights(
            embedding_VD=embedding_VD,
            layers=tuple(layers),
            final_norm=reader.norm("model.norm.weight", shape),
            head=head,
            head_rows_VD=_head_rows(reader, shape, embedding_VD) if placement.shows_head else None,
        )


def rotations(checkpoint: Checkpoint, num_positions: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """How each pair of a head turns at each position: complex [positions, F/2], scaling of RoPE included.

    Frequencies and angles are float32 whatever `dtype` is, as in transformers: they are part of the model.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = LlamaRotaryEmbedding(checkpoint.config)
    angles = torch.outer(torch.arange(num_positions).float(), rope.inv_freq.float())
    turns = torch.complex(angles.cos(), angles.sin()) * float(rope.attention_scaling)
    return turns.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)


@dataclass(frozen=True, slots=True)
class _Reader:
    tensors: Tensors
    placement: Placement

    def tensor(self, name: str, *shape: int) -> Tensor:
        out = torch.empty(shape, dtype=self.placement.dtype, device=self.placement.device)
        self.tensors.read_into(name, out)
        return out

    def norm(self, name: str, shape: ModelShape) -> RmsNorm:
        return RmsNorm(self.tensor(name, shape.model_width), shape.norm_eps)

    def linear(
        self,
        names: list[str],
        heights: tuple[int, ...],
        width: int,
        *,
        cut: Cut = Cut.OUTPUTS,
        order: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Linear:
        """The named matrices, each of its height, stacked and cut; `order` may reorder the rows of one."""
        where = self.placement
        folder = where.offload_folder
        device = where.device if folder is None else torch.device("cpu")
        parts = [where.shard.part(cut, height, width) for height in heights]
        own_heights = [part.num_own_rows for part in parts]
        fused_OI = torch.empty(sum(own_heights), parts[0].num_own_columns, dtype=where.dtype, device=device)
        for name, part, own in zip(names, parts, torch.split(fused_OI, own_heights), strict=True):
            self.tensors.read_into(name, own, None if where.shard == WHOLE else part)
            if order is not None:
                own.copy_(order(name, own))
        if folder is None:
            return put_together(where.form(fused_OI), cut, where.collectives)
        return _offload(fused_OI, names[0], folder, where.device)


@contextmanager
def _reader(checkpoint: Checkpoint, placement: Placement) -> Iterator[_Reader]:
    with ExitStack() as stack:
        yield _Reader(placement.drawn or TensorFiles(checkpoint.folder, stack), placement)


def _read_layer(reader: _Reader, prefix: str, shape: ModelShape) -> Layer:
    query_height = shape.num_heads * shape.head_width
    kv_height = shape.num_kv_heads * shape.head_width
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

    def order(name: str, part: Tensor) -> Tensor:
        return part if name.endswith("v_proj.weight") else _neighbouring_pairs(part, shape.head_width)

    return Layer(
        attention_norm=reader.norm(f"{prefix}.input_layernorm.weight", shape),
        qkv=reader.linear(
            [f"{attention}.{p}_proj.weight" for p in "qkv"],
            (query_height, kv_height, kv_height),
            shape.model_width,
            order=order,
        ),
        attention_out=reader.linear(
            [f"{attention}.o_proj.weight"], (shape.model_width,), query_height, cut=Cut.INPUTS
        ),
        mlp_norm=reader.norm(f"{prefix}.post_attention_layernorm.weight", shape),
        gate_up=reader.linear(
            [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"], (shape.mlp_width,) * 2, shape.model_width
        ),
        down=reader.linear(
            [f"{mlp}.down_proj.weight"], (shape.model_width,), shape.mlp_width, cut=Cut.INPUTS
        ),
    )


def _neighbouring_pairs(rows_OI: Tensor, head_width: int) -> Tensor:
    """Within each head, put row i + F/2 beside row i, so that the pairs RoPE turns are neighbours."""
    halves = rows_OI.view(-1, 2, head_width // 2, rows_OI.shape[-1])
    return halves.transpose(1, 2).reshape(rows_OI.shape)


def _offload(weight_OI: Tensor, name: str, folder: Path, device: torch.device) -> Linear:
    from accelerate.utils import offload_weight

    offload_weight(weight_OI, name, folder)
    mapped = torch.from_file(
        str(folder / f"{name}.dat"), shared=False, size=weight_OI.numel(), dtype=weight_OI.dtype
    )
    return OffloadedLinear(mapped.view_as(weight_OI), device)


def _embedding(reader: _Reader, shape: ModelShape, head: Linear) -> Tensor:
    """The embedding's rows: the head's own where they may be shared and the head lies there whole and as it is.
    One in another form, to be faster, or outside the device, or on several ranks, is held beside them.
    """
    if shape.is_head_tied and reader.placement.shares_tied and isinstance(head, DenseLinear):
        return head.weight_OI
    return reader.tensor("model.embed_tokens.weight", shape.vocab_size, shape.model_width)


def _head_rows(reader: _Reader, shape: ModelShape, embedding_VD: Tensor) -> Tensor:
    if shape.is_head_tied:
        return embedding_VD
    return reader.tensor(_head_name(shape), shape.vocab_size, shape.model_width)


def _head_name(shape: ModelShape) -> str:
    return "model.embed_tokens.weight" if shape.is_head_tied else "lm_head.weight"
