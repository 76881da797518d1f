"""Triton's kernels, interpreted on a CPU and compiled on CUDA, and which attention a device gets."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from config.errors import SettingsError
from config.setting_types import AttentionKind
from decoding.attention import Attention, AttentionShape, GatherAttention
from decoding.attentions import make_attention
from decoding.kv_cache import KVCache
from tests.test_attention import turns

ROOT = Path(__file__).parent.parent

TYPES = {name: "*bf16" for name in ("qkv", "cache", "out")} | {
    "turns": "*fp32",
    "parts": "*fp32",
    "weights": "*fp32",
    "context_width": "i32",
    "num_parts": "i32",
    "scale": "fp32",
}
"""Of the kernels' arguments that are not addresses of integers."""

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("interpreted", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_kernels_pass_all_checks(interpreted: bool) -> None:
    """In a process of its own: interpreting is chosen before Triton is imported, and other tests import it."""
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("tests/triton_checks.py", "tests/triton_graph_checks.py"),
        ],
        cwd=ROOT,
        env=os.environ
        | {"TRITON_INTERPRET": "1" if interpreted else "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.slow
def test_kernels_compile_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the newest devices we know, in bfloat16: the interpreter takes more than the compiler."""
    import triton

    from decoding import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    heads = {"NUM_HEADS": 6, "HEAD_WIDTH": 64, "HEAD_PAD": 64}
    paging = {"NUM_KV_HEADS": 2, "BLOCK_SIZE": 16}
    parting = {"LEAST_PART": 128, "MOST_PARTS": 16}
    tile = {"TILE_M": 16, "TILE_N": 64}
    for kernel, constants in (
        (kernels.rotate_and_store, heads | paging | {"HEADS": 16}),
        (kernels.attend_tile, heads | paging | parting | tile | {"IS_SPLIT": True}),
        (kernels.attend_tile, heads | paging | parting | tile | {"IS_SPLIT": False}),
        (kernels.join_parts, heads | parting),
    ):
        types = {
            name: "constexpr" if name in constants else TYPES.get(name, "*i32") for name in kernel.arg_names
        }
        source = triton.compiler.ASTSource(kernel, types, constants)
        compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]


def test_a_cpu_gathers_and_has_no_kernels() -> None:
    assert isinstance(_made(AttentionKind.AUTO), GatherAttention)
    assert isinstance(_made(AttentionKind.GATHER), GatherAttention)
    with pytest.raises(SettingsError, match=r"attention triton: .*; pass --attention auto"):
        _made(AttentionKind.TRITON)


def _made(kind: AttentionKind) -> Attention:
    shape = AttentionShape(num_heads=2, num_kv_heads=1, head_width=4)
    cpu = torch.device("cpu")
    cache = KVCache(num_layers=1, num_slots=160, slot_width=shape.slot_width, dtype=torch.float32, device=cpu)
    return make_attention(kind, shape=shape, cache=cache, rotations_TF=turns(4), block_size=16)
