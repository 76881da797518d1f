"""Where a checkpoint's tensors come from: safetensors files, or a generator of random numbers in their place.

Knows names, shapes and files; knows nothing of what tensors are for.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decoding.checkpoint import CheckpointError
from decoding.sharding import Part

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


class Tensors(Protocol):
    """Where tensors come from, by name."""

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Write one tensor, or this part of it, into `out`."""


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
