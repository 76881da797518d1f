"""The one seam through which every weight matrix is applied, and the forms a matrix can be stored in.

Knows matrices only. A form is chosen by what is exact on the device, never by a timing.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from typing import Final, Protocol

import torch
from torch import Tensor

_HALF_ROUNDING: Final = 2.0**-25
"""Largest change that float16 makes to a bfloat16 weight: half a step of its subnormals."""

_MATRIX_ROUNDING: Final = 2.0**-22
"""Largest change of a whole matrix, relative to its norm: what float32 products round to anyway."""


class Linear(Protocol):
    """x ↦ x · Wᵀ for rows of x."""

    def __call__(self, x_NI: Tensor, /) -> Tensor:
        """Apply the matrix: [N, O] in the dtype of `x_NI`, which is not changed."""
        ...


class DenseLinear:
    """The matrix as it is. Its longer side is contiguous, which is what streams a small batch fastest."""

    def __init__(self, weight_OI: Tensor) -> None:
        num_outputs, num_inputs = weight_OI.shape
        self._weight_IO = weight_OI.t().contiguous() if num_outputs > num_inputs else weight_OI.t()

    @property
    def weight_OI(self) -> Tensor:
        """A view of the matrix, whichever side is contiguous."""
        return self._weight_IO.t()

    def __call__(self, x_NI: Tensor, /) -> Tensor:
        """Apply the matrix."""
        return torch.mm(x_NI, self._weight_IO)


class HalfStoredLinear:
    """A float32 matrix whose values float16 holds, stored so and multiplied in float32 (x86 CPUs).

    Half the memory traffic, and sums whose order does not depend on the number of rows: one row alone and
    the same row among others give the same bits.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self._packed = torch.fbgemm_pack_gemm_matrix_fp16(weight_OI)
            self._no_bias_O = torch.zeros(weight_OI.shape[0])
            # The first call says that newer releases will drop the operator: `store` looks before it uses it.
            self(torch.zeros(1, weight_OI.shape[1]))

    def __call__(self, x_NI: Tensor, /) -> Tensor:
        """Apply the matrix."""
        return torch.fbgemm_linear_fp16_weight_fp32_activation(x_NI, self._packed, self._no_bias_O)


class OffloadedLinear:
    """A matrix that lies outside the device and is copied there for every use. For models that do not fit."""

    def __init__(self, outside_OI: Tensor, device: torch.device) -> None:
        self._outside_OI = outside_OI
        self._device = device

    def __call__(self, x_NI: Tensor, /) -> Tensor:
        """Apply the matrix."""
        return torch.mm(x_NI, self._outside_OI.to(self._device).t())


def store(weight_OI: Tensor) -> Linear:
    """The best exact form for this matrix on its device; the caller gives `weight_OI` up."""
    if weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and _fits_half(weight_OI):
        return HalfStoredLinear(weight_OI)
    return DenseLinear(weight_OI)


def _fits_half(weight_OI: Tensor) -> bool:
    available = hasattr(torch, "fbgemm_pack_gemm_matrix_fp16") and (
        "fbgemm" in torch.backends.quantized.supported_engines
    )
    if not available:
        return False
    change_OI = weight_OI.half().float().sub_(weight_OI)
    is_small = change_OI.norm() <= _MATRIX_ROUNDING * weight_OI.norm()
    return bool(is_small & (change_OI.abs_().max() <= _HALF_ROUNDING))
