"""Reads a checkpoint's tensors, slice by slice, into the fused matrices that the decoder runs.

Knows tensor names, shapes and devices; knows nothing of requests.

Shapes: D model width, V vocabulary, O outputs, I inputs, H query heads, G key/value heads, F head width.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decoding.checkpoint import Checkpoint, CheckpointError, ModelShape
from decoding.linear import Linear, OffloadedLinear, store
from decoding.model import Layer, RmsNorm, Weights
from decoding.parallel_linear import Collectives, put_together
from decoding.sharding import WHOLE, Cut, Part, Shard

Progress = Callable[[str, float], None]

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"


_FLOATING: Final = ("F64", "F32", "F16", "BF16")
_UNTRAINED_STD: Final = 0.02
_ADDING_MATRIX: Final = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.o_proj|mlp\.down_proj)\.weight")
"""Only these two of a layer write to the residual stream."""


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class _Slices(Protocol):
    def get_dtype(self) -> str: ...
    def get_shape(self) -> list[int]: ...
    def __getitem__(self, key: slice | tuple[slice, ...]) -> Tensor: ...


class _OpenFile(Protocol):
    """What is used of safetensors' untyped file handle."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slices: ...


class TensorFiles:
    """The safetensors files of one checkpoint, opened lazily; tensors are found by name."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._opened: dict[Path, _OpenFile] = {}
        self._file_of = _file_of_tensors(folder, self._open)

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Copy one tensor, or this part of it, into `out`, converting dtype and device. Raises CheckpointError."""
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(f"{self._folder}: tensor {name} is in none of the safetensors files")
        path = self._folder / file_name
        try:
            stored = self._open(path).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error
        found, expected = list(stored.get_shape()), list(part.shape if part else out.shape)
        if found != expected:
            raise CheckpointError(f"{path}: tensor {name} has shape {found}, config.json asks for {expected}")
        if stored.get_dtype() not in _FLOATING:
            remedy = "pass a checkpoint that is not quantised"
            raise CheckpointError(f"{path}: tensor {name} holds {stored.get_dtype()}, not floats; {remedy}")
        # No more than these bytes are read of the file.
        out.copy_(stored[part.index] if part else stored[:])

    def _open(self, path: Path) -> _OpenFile:
        if path in self._opened:
            return self._opened[path]
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but {_INDEX} names it")
        try:
            self._opened[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            return self._opened[path]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


class DrawnTensors:
    """Tensors drawn at random where others are read: a model of a checkpoint's sizes, for measuring speed alone.

    A tensor depends on its name and its shape; matrices are drawn as models are before training. What layers from
    `late_from` on add to the residual stream is scaled by `late_scale`: near 0, early exits agree with the last.
    """

    def __init__(self, *, late_from: int = 0, late_scale: float = 1.0) -> None:
        self._late_from = late_from
        self._late_scale = late_scale

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Draw one tensor into `out`, or this part of it: the same numbers as the whole has there."""
        if part is not None:
            whole = out.new_empty(part.shape)
            self.read_into(name, whole)
            out.copy_(whole[part.index])
        elif out.dim() == 1:
            out.fill_(1)
        else:
            generator = torch.Generator(out.device).manual_seed(zlib.crc32(name.encode()))
            out.normal_(0, _UNTRAINED_STD * self._scale(name), generator=generator)

    def _scale(self, name: str) -> float:
        adds = _ADDING_MATRIX.fullmatch(name)
        return self._late_scale if adds and int(adds[1]) >= self._late_from else 1.0


class _Tensors(Protocol):
    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None: ...


def _file_of_tensors(folder: Path, open_file: Callable[[Path], _OpenFile]) -> dict[str, str]:
    if (folder / _INDEX).is_file():
        return _read_index(folder / _INDEX)
    if (folder / _SINGLE).is_file():
        return dict.fromkeys(open_file(folder / _SINGLE).keys(), _SINGLE)
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    found = f"only pickle files ({', '.join(pickled)}), which can run code" if pickled else "no weights"
    raise CheckpointError(f"{folder}: {found}; convert the checkpoint to {_SINGLE}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: not an index of safetensors files: {error}") from error


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go: the device and dtype they are used in.

    With an `offload_folder`, matrices are written there by accelerate and mapped into memory for use; once
    everything is loaded the folder may be deleted. If they are `drawn`, no file of weights is read. A model that
    `shows_head` has the head's rows there as they are, too. Of one that several ranks run only the `shard` is
    read, and `collectives` put together what the shards come to.
    """

    device: torch.device
    dtype: torch.dtype
    offload_folder: Path | None = None
    drawn: DrawnTensors | None = None
    shows_head: bool = False
    form: Callable[[Tensor], Linear] = store
    shard: Shard = WHOLE
    collectives: Collectives | None = None


def load_weights(checkpoint: Checkpoint, placement: Placement, progress: Progress) -> Weights:
    """Read every tensor once; peak memory beyond the weights is one fused matrix. Raises CheckpointError."""
    shape = checkpoint.shape
    with _reader(checkpoint, placement) as reader:
        embedding_VD = reader.tensor("model.embed_tokens.weight", shape.vocab_size, shape.model_width)
        layers = []
        for index in range(shape.num_layers):
            layers.append(_read_layer(reader, f"model.layers.{index}", shape))
            progress("weights", (index + 1) / shape.num_layers)
        return Weights(
            embedding_VD=embedding_VD,
            layers=tuple(layers),
            final_norm=reader.norm("model.norm.weight", shape),
            head=reader.linear([_head_name(shape)], (shape.vocab_size,), shape.model_width, cut=Cut.JOINED),
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
    tensors: _Tensors
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


def _head_rows(reader: _Reader, shape: ModelShape, embedding_VD: Tensor) -> Tensor:
    if shape.is_head_tied:
        return embedding_VD
    return reader.tensor(_head_name(shape), shape.vocab_size, shape.model_width)


def _head_name(shape: ModelShape) -> str:
    return "model.embed_tokens.weight" if shape.is_head_tied else "lm_head.weight"
