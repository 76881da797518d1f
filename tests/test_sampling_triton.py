"""The choice and keep rules off the CPU: Triton's kernels, interpreted or on CUDA; and that no host waits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decoding.acceptance import num_kept
from decoding.coupling import choose
from decoding.kernel_devices import takes_kernels
from decoding.logits import Sampling, process
from decoding.messages import SamplingParams
from tests.test_attention_triton import ROOT, needs_triton

META = torch.device("meta")
"""A device without values: what must look at one fails there. It takes the path of every device but a CPU."""

BATCHES = {
    "greedy": [SamplingParams(temperature=0.0)] * 2,
    "sampled": [SamplingParams(temperature=0.7)] * 2,
    "mixed": [SamplingParams(temperature=0.0), SamplingParams()],
    "top-k": [SamplingParams(top_k=3)] * 2,
    "all filters": [
        SamplingParams(top_k=3, top_p=0.9),
        SamplingParams(temperature=0.0, min_p=0.1, top_p=0.5),
    ],
    "min-p": [SamplingParams(min_p=0.1)] * 2,
}

TYPES = {
    "best_scores": "*fp32",
    "best_ids": "*i32",
    "rows": "*bf16",
    "peaks": "*bf16",
    "temperatures": "*fp64",
    "top_ps": "*fp64",
    "keys": "*i32",
    "scores": "*fp32",
} | dict.fromkeys(("positions", "top_ks", "chosen", "kept", "drafts", "choices", "draft_lengths"), "*i64")
"""Of the kernels' arguments that are no numbers."""


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a host wait: reading a value, a shape that depends on values, a copy across devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs: Mapping[str, object] | None = None):
        name = func.name().removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        picks = [each for each in tree_leaves(args[1:]) if isinstance(each, Tensor)]
        assert not (name.startswith("index") and any(each.dtype == torch.bool for each in picks)), name
        reads = (
            "_local_scalar_dense",
            "item",
            "is_nonzero",
            "nonzero",
            "equal",
            "masked_select",
            "_unique",
            "unique",
        )
        assert not name.startswith(reads), name
        result = func(*args, **(kwargs or {}))
        tensors = given + [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # A number that was made a tensor is no copy.
        assert len({each.device for each in tensors if each.dim()}) <= 1, f"{name} copies across"
        return result


def columns(params: list[SamplingParams]) -> tuple[Tensor, Sampling, Tensor]:
    """Logits, parameters and positions without values."""
    sampling = Sampling.of(params, list(range(len(params))), META)
    positions_N = torch.empty(len(params), dtype=torch.int64, device=META)
    return torch.empty(len(params), 700, device=META), sampling, positions_N


@pytest.mark.parametrize("batch", BATCHES)
def test_choosing_needs_no_value_on_the_host(batch: str) -> None:
    logits_NV, sampling, positions_N = columns(BATCHES[batch])
    with NoWaiting():
        assert process(logits_NV, sampling).shape == (2, 700)
        assert choose(logits_NV, sampling, positions_N).shape == (2,)
        assert choose(logits_NV[:1], sampling.first(1), positions_N[:1]).shape == (1,)
        assert choose(logits_NV[positions_N], sampling.take(positions_N), positions_N).shape == (2,)


def test_keeping_needs_no_value_on_the_host() -> None:
    tables = [torch.empty(3, width, dtype=torch.int64, device=META) for width in (4, 5)]
    with NoWaiting():
        assert num_kept(*tables, torch.empty(3, dtype=torch.int64, device=META)).shape == (3,)


WAITS: dict[str, Callable[[Tensor], object]] = {
    "a value": lambda x: x.sum().item(),
    "a truth": lambda x: bool((x > 0).any()),
    "places": lambda x: (x > 0).nonzero(),
    "a selection": lambda x: x[x > 0],
    "a copy": lambda x: x.to(META),
}


@pytest.mark.parametrize("how", WAITS)
def test_whatever_waits_is_noticed(how: str) -> None:
    """The control of the tests above, on a CPU, where all of this works."""
    with pytest.raises(AssertionError), NoWaiting():
        WAITS[how](torch.ones(3))


def test_a_device_without_values_gives_no_list() -> None:
    """Which no dispatch mode sees."""
    with pytest.raises(NotImplementedError):
        torch.ones(3, device=META).tolist()


def test_a_cpu_has_no_kernels() -> None:
    assert not takes_kernels(torch.ones(1))
    assert not takes_kernels(torch.ones(1, device=META))


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("interpreted", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_kernels_pass_all_checks(interpreted: bool) -> None:
    """In a process of its own: interpreting is chosen before Triton is imported, and other tests import it."""
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sampling_checks.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.slow
def test_kernels_compile_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the newest devices we know: the interpreter takes more than the compiler."""
    import triton

    from decoding import sampling_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    part = {"PART": 4096, "WIDTH": 1024}
    for kernel, constants, types in (
        (kernels.choose_in_part, part | {"IS_PROCESSED": False}, {}),
        (kernels.choose_in_part, part | {"IS_PROCESSED": True}, {"rows": "*fp32", "peaks": "*fp32"}),
        (kernels.choose_among_parts, {"PARTS": 32}, {}),
        (kernels.truncate, {"WIDTH": 4096}, {}),
        (kernels.keep, {"DRAFTS": 64}, {}),
    ):
        signature = {
            name: "constexpr" if name in constants else (TYPES | types).get(name, "i32")
            for name in kernel.arg_names
        }
        compiled = triton.compile(
            triton.compiler.ASTSource(kernel, signature, constants),
            target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
            options={"enable_fp_fusion": False},
        )
        assert compiled.asm["cubin"]
        # The noise's bits are the same on every device: nothing is fused, rounded down or approximated.
        if kernel is kernels.choose_in_part:
            inexact = ("fma.", "lg2", ".ftz", ".approx", "div.full")
            assert not [name for name in inexact if name in compiled.asm["ptx"]]
