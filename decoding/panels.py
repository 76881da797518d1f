"""Matrices as compiled code reads them: in panels of outputs that lie side by side.

Knows numbers and their dtypes; knows nothing of what a matrix is for.

Shapes: N tokens, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

LANES: Final = 16
"""Numbers that the compiled code takes at once: every width is a multiple of it."""

PANEL: Final = 4 * LANES
"""Outputs of a matrix that lie side by side."""


class PanelLinear:
    """A matrix in panels of 64 outputs, input by input, in the shortest dtype that holds its values.

    bfloat16 goes by pairs of inputs: those of an output lie side by side, and so do the 64 pairs of a panel.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        num_outputs, num_inputs = weight_OI.shape
        self.shape = num_outputs, num_inputs
        padded_OI = F.pad(weight_OI, (0, 0, 0, -num_outputs % PANEL))
        self.panels = _packed(padded_OI.to(_shortest(weight_OI)))

    @property
    def num_computed(self) -> int:
        """Outputs that compiled code computes: those of the matrix, rounded up to whole lanes."""
        return -(-self.shape[0] // LANES) * LANES

    def store_as(self, dtype: torch.dtype) -> None:
        """Hold the same values in a dtype that is no shorter than the present one."""
        if dtype != self.panels.dtype:
            self.panels = _packed(self._padded_OI().to(dtype))

    def __call__(self, x_NI: Tensor, /) -> Tensor:
        """Apply the matrix, slowly: compiled code reads the panels itself."""
        return x_NI @ self._padded_OI()[: self.shape[0]].to(x_NI.dtype).t()

    def _padded_OI(self) -> Tensor:
        together = _together(self.panels.dtype)
        parts = self.panels.view(len(self.panels), -1, PANEL, together)
        return parts.permute(0, 2, 1, 3).reshape(-1, self.shape[1])


def _packed(padded_OI: Tensor) -> Tensor:
    """Panels [O / 64, I · 64] of whole panels' outputs."""
    num_outputs, num_inputs = padded_OI.shape
    together = _together(padded_OI.dtype)
    parts = padded_OI.view(num_outputs // PANEL, PANEL, num_inputs // together, together)
    return parts.permute(0, 2, 1, 3).reshape(num_outputs // PANEL, -1).contiguous()


def _together(dtype: torch.dtype) -> int:
    """Inputs that lie side by side, as `Products` of compiled_multiply.h takes them."""
    return 2 if dtype == torch.bfloat16 else 1


def _shortest(weight_OI: Tensor) -> torch.dtype:
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight_OI.to(dtype).to(weight_OI.dtype), weight_OI):
            return dtype
    return torch.float32
