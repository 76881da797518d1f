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
    """A matrix in panels of 64 outputs, input by input, in the shortest dtype that holds its values."""

    def __init__(self, weight_OI: Tensor) -> None:
        num_outputs, num_inputs = weight_OI.shape
        self.shape = num_outputs, num_inputs
        padded_OI = F.pad(weight_OI, (0, 0, 0, -num_outputs % PANEL))
        panels = padded_OI.view(-1, PANEL, num_inputs).transpose(1, 2)
        self.panels = panels.to(_shortest(weight_OI)).contiguous()

    @property
    def num_computed(self) -> int:
        """Outputs that compiled code computes: those of the matrix, rounded up to whole lanes."""
        return -(-self.shape[0] // LANES) * LANES

    def __call__(self, x_NI: Tensor, /) -> Tensor:
        """Apply the matrix, slowly: compiled code reads the panels itself."""
        num_outputs, num_inputs = self.shape
        weight_OI = self.panels.to(x_NI.dtype).transpose(1, 2).reshape(-1, num_inputs)
        return x_NI @ weight_OI[:num_outputs].t()


def _shortest(weight_OI: Tensor) -> torch.dtype:
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight_OI.to(dtype).to(weight_OI.dtype), weight_OI):
            return dtype
    return torch.float32
