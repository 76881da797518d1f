"""Every stored form of a matrix multiplies as float64 does; a short form is taken only where it is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decoding.linear import DenseLinear, HalfStoredLinear, Linear, OffloadedLinear, store

CPU = torch.device("cpu")
SHAPES = [(7, 5), (64, 64), (200, 48), (48, 200), (1, 9), (33, 1)]

needs_half = pytest.mark.skipif(
    not hasattr(torch, "fbgemm_pack_gemm_matrix_fp16")
    or "fbgemm" not in torch.backends.quantized.supported_engines,
    reason="this build of torch has no float16-weight kernel",
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_bfloat16(weight_OI: Tensor) -> Tensor:
    """What published weights are: float32 values that bfloat16 holds."""
    return weight_OI.bfloat16().float()


def assert_multiplies(linear: Linear, weight_OI: Tensor, x_NI: Tensor) -> None:
    """Equal to the float64 product within the rounding of a float32 sum of I products."""
    expected = x_NI.double() @ weight_OI.double().t()
    magnitude = x_NI.double().abs() @ weight_OI.double().abs().t()
    bound = torch.finfo(x_NI.dtype).eps * x_NI.shape[1] * magnitude
    got = linear(x_NI)
    assert got.dtype == x_NI.dtype
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 70])
def test_a_stored_matrix_multiplies_as_float64_does(shape: tuple[int, int], num_rows: int) -> None:
    for weight_OI in (normal(*shape, seed=1), as_bfloat16(normal(*shape, seed=1))):
        x_NI = normal(num_rows, shape[1], seed=2)
        kept = x_NI.clone()
        assert_multiplies(store(weight_OI.clone()), weight_OI, x_NI)
        assert torch.equal(x_NI, kept)


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6, 1e-8, 1e4])
def test_weights_of_any_magnitude_are_multiplied_exactly(scale: float) -> None:
    """Below 2⁻¹⁴ float16 loses digits with every power of two, and a whole matrix may lie there."""
    for weight_OI in (scale * normal(40, 24, seed=11), as_bfloat16(scale * normal(40, 24, seed=11))):
        assert_multiplies(store(weight_OI.clone()), weight_OI, normal(3, 24, seed=12))


def test_float64_weights_are_multiplied_in_float64() -> None:
    weight_OI, x_NI = normal(20, 30, seed=3, dtype=torch.float64), normal(4, 30, seed=4, dtype=torch.float64)
    linear = store(weight_OI.clone())
    assert isinstance(linear, DenseLinear)
    assert_multiplies(linear, weight_OI, x_NI)


@needs_half
@pytest.mark.parametrize("scale", [1.0, 0.02, 5e-3, 30.0])
def test_bfloat16_weights_are_stored_in_half(scale: float) -> None:
    """Checkpoints are published in bfloat16, so this is what makes a CPU fast."""
    assert isinstance(store(as_bfloat16(scale * normal(40, 24, seed=5))), HalfStoredLinear)


@needs_half
@pytest.mark.parametrize(
    "value",
    [1e-3 * (1 + 2**-20), 1.0 + 2**-12, 1e5, -7e4, torch.inf, torch.nan],
    ids=["eleven bits are too few", "twelfth bit", "too large", "too negative", "infinite", "not a number"],
)
def test_one_weight_that_float16_cannot_hold_keeps_the_matrix_dense(value: float) -> None:
    weight_OI = as_bfloat16(normal(8, 6, seed=6))
    assert isinstance(store(weight_OI.clone()), HalfStoredLinear)
    weight_OI[3, 2] = value
    assert isinstance(store(weight_OI), DenseLinear)


@needs_half
def test_storing_in_half_changes_no_weight_by_more_than_half_a_subnormal_step() -> None:
    """Read back through unit vectors, bfloat16 values down to the smallest."""
    exponents = torch.arange(-40, 4).float()
    weight_OI = as_bfloat16(torch.exp2(exponents)[:, None] * torch.linspace(1, 1.99, 16))
    linear = store(weight_OI.clone())
    assert isinstance(linear, HalfStoredLinear)
    assert (linear(torch.eye(16)).t() - weight_OI).abs().max() <= 2**-25


@needs_half
@pytest.mark.parametrize("shape", [(64, 64), (200, 48), (48, 200), (97, 33)])
def test_a_row_gives_the_same_bits_alone_and_among_others_when_stored_in_half(shape: tuple[int, int]) -> None:
    """This is what makes float32 answers on a CPU independent of the batch."""
    linear = store(as_bfloat16(normal(*shape, seed=7)))
    assert isinstance(linear, HalfStoredLinear)
    x_NI = normal(90, shape[1], seed=8)
    whole = linear(x_NI)
    for first, last in [(0, 1), (41, 42), (89, 90), (3, 6), (10, 43), (0, 89)]:
        assert torch.equal(linear(x_NI[first:last].clone()), whole[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_offloaded_matrix_is_multiplied_from_where_it_lies(dtype: torch.dtype) -> None:
    weight_OI = normal(12, 10, seed=9, dtype=dtype)
    assert_multiplies(OffloadedLinear(weight_OI, CPU), weight_OI, normal(3, 10, seed=10, dtype=dtype))
