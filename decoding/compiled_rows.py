"""What compiled code is told of rows and their drafts: arrays, and structures that say where these lie.

Knows arrays and addresses; knows nothing of what is computed with them. Each object keeps the arrays that its
structure points to: it must live until the call returns.

Shapes: B rows, T cache positions, M drafts of all rows, G grades.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from decoding import compiled_structs as structs
from decoding.confidence import EDGES, NUM_GRADES
from decoding.logits import Sampling
from decoding.ragged import Ints

_EDGES: Final = np.array(EDGES, dtype=np.float32)


def address(array: NDArray[np.generic]) -> int:
    """Where an array lies, asked in the quickest way."""
    at: int = array.__array_interface__["data"][0]
    return at


class PlacedColumns:
    """How tokens of each row are chosen."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._columns = [each.contiguous() for each in sampling_columns(sampling)]
        self.addresses = [column.data_ptr() for column in self._columns]


class PlacedRows:
    """Rows whose first `num_computed_B` tokens lie in these slots."""

    def __init__(self, slots_BT: Ints, num_computed_B: Ints, columns: PlacedColumns) -> None:
        self._kept = np.ascontiguousarray(slots_BT), np.ascontiguousarray(num_computed_B), columns
        slots_BT, num_computed_B, _ = self._kept
        self.struct = structs.Rows(
            *slots_BT.shape, address(num_computed_B), address(slots_BT), *columns.addresses
        )


class PlacedConfidence:
    """How likely drafts are kept by their grades, of greedy rows and of sampled ones."""

    def __init__(self, chances_2G: NDArray[np.float32]) -> None:
        assert chances_2G.shape == (2, NUM_GRADES)
        self.chances_2G = chances_2G
        self._kept = np.ascontiguousarray(chances_2G, dtype=np.float32)
        self.struct = structs.Confidence(len(EDGES), address(_EDGES), address(self._kept))


UNSTOPPED: Final = PlacedConfidence(np.ones((2, NUM_GRADES), dtype=np.float32))
"""Every draft is sure."""


class MadeDrafts:
    """Rows that draft up to `lengths_B` tokens behind their last ids; room for the drafts, and after the call how
    many there are of each row, `num_made_B`, and their grades, `grades_M`, step after step.
    """

    def __init__(
        self,
        exit_layer: int,
        lengths_B: Ints,
        last_ids_B: Ints,
        ids_M: Ints,
        least_B: NDArray[np.float32] | None = None,
    ) -> None:
        self.exit_layer = exit_layer
        self.num_made_B = np.empty_like(lengths_B)
        self.grades_M = np.empty_like(ids_M)
        least_B = np.zeros(len(lengths_B), dtype=np.float32) if least_B is None else least_B
        self._kept = np.ascontiguousarray(lengths_B), np.ascontiguousarray(last_ids_B), least_B, ids_M
        arrays = (*self._kept, self.grades_M, self.num_made_B)
        self.struct = structs.Drafting(exit_layer, *(address(array) for array in arrays), None)


def sampling_columns(sampling: Sampling) -> tuple[Tensor, ...]:
    """What the compiled choice reads of it."""
    return sampling.temperatures_N, sampling.top_ks_N, sampling.top_ps_N, sampling.min_ps_N, *sampling.keys_2N
