"""Which part of a model each of several ranks holds: heads, columns of the MLP, rows of the head.

Knows sizes and ranks; knows nothing of how ranks talk. Megatron's cut (arXiv 1909.08053): a layer's first matrices
give each rank outputs of its own, the second ones take those in, and what they come to is added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from config.errors import SettingsError
from config.setting_types import Loader
from config.settings import EngineSettings
from decoding.checkpoint import Checkpoint, ModelShape


class Cut(Enum):
    """What a rank holds of a matrix, and what becomes of its outputs."""

    OUTPUTS = "its share of the outputs, which it goes on with"
    JOINED = "its share of the outputs, which all ranks get whole"
    INPUTS = "its share of the inputs: outputs are added up"


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring rows and columns of a matrix of this shape."""

    shape: tuple[int, int]
    rows: slice
    columns: slice

    @property
    def index(self) -> tuple[slice, slice]:
        """What picks it out of the matrix."""
        return self.rows, self.columns

    @property
    def num_own_rows(self) -> int:
        """How many rows it has."""
        return len(range(*self.rows.indices(self.shape[0])))

    @property
    def num_own_columns(self) -> int:
        """How many columns it has."""
        return len(range(*self.columns.indices(self.shape[1])))


@dataclass(frozen=True, slots=True)
class Shard:
    """The `rank`-th of `size` equal shares."""

    rank: int = 0
    size: int = 1

    def share(self, length: int) -> slice:
        """This share of so many, in order."""
        own = length // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def part(self, cut: Cut, num_rows: int, num_columns: int) -> Part:
        """What is held of a matrix [outputs, inputs]."""
        if cut is Cut.INPUTS:
            return Part((num_rows, num_columns), slice(num_rows), self.share(num_columns))
        return Part((num_rows, num_columns), self.share(num_rows), slice(num_columns))

    def of(self, shape: ModelShape) -> ModelShape:
        """The sizes that layers have on one rank. Embedding, norms and what goes between layers stay whole."""
        return replace(
            shape,
            num_heads=shape.num_heads // self.size,
            num_kv_heads=shape.num_kv_heads // self.size,
            mlp_width=shape.mlp_width // self.size,
        )

    def of_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same with the sizes that its layers have on one rank."""
        return replace(checkpoint, shape=self.of(checkpoint.shape))


WHOLE: Final = Shard()


def check_shards(settings: EngineSettings, checkpoints: Sequence[Checkpoint], shard: Shard) -> None:
    """Refuse what cannot be cut into equal shares, or is not done with shares. Raises SettingsError."""
    size = settings.tensor_parallel_size
    if size == 1:
        return
    named = f"tensor_parallel_size {size}"
    barred = {
        "compile_layers": settings.compile_layers is True,
        f"loader {Loader.ACCELERATE}": settings.loader is Loader.ACCELERATE,
        "draft_vocab_size": settings.draft_vocab_size is not None,
    }
    for what, is_set in barred.items():
        if is_set:
            raise SettingsError(f"{named}: {what} works on one device alone; leave one of the two out")
    if ":" in settings.device:
        remedy = "pass --device cuda, and CUDA_VISIBLE_DEVICES to choose which"
        raise SettingsError(f"{named}: device {settings.device} is one device; {remedy}")
    for checkpoint in checkpoints:
        _check_sizes(named, size, checkpoint)
    if size != shard.size:
        raise SettingsError(f"{named}: here a model runs in one process; `layerskip serve` starts several")


def _check_sizes(named: str, size: int, checkpoint: Checkpoint) -> None:
    shape = checkpoint.shape
    counts = {
        "attention heads": shape.num_heads,
        "key/value heads": shape.num_kv_heads,
        "columns of the MLP": shape.mlp_width,
        "tokens of the vocabulary": shape.vocab_size,
    }
    for what, count in counts.items():
        if count % size:
            fitting = [n for n in range(2, size) if not any(each % n for each in counts.values())]
            remedy = f"pass {' or '.join(map(str, fitting))}, or 1" if fitting else "pass 1"
            raise SettingsError(
                f"{named}: {checkpoint.folder} has {count} {what}, which it does not divide; {remedy}"
            )
