"""How much fits: whether the weights lie on the device, and how many KV blocks remain beside them.

Knows bytes and devices; reads no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from config.errors import SettingsError
from config.settings import DEFAULT_MEMORY_FRACTION, EngineSettings
from decoding.attention import AttentionShape
from decoding.checkpoint import Checkpoint, ModelShape
from decoding.draft_checkpoint import Checkpoints
from decoding.kv_cache import slot_bytes

_CPU_CACHE_BYTES: Final = 1 << 30
"""What the KV cache takes on a CPU unless told otherwise: memory is shared with everything else there."""

_SPARE_SHARE: Final = 0.05
"""Share of an accelerator's memory that is left free whatever is asked for: graphs and fragments come later."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The context limit and the KV blocks of this start; made once.

    Recorded steps are padded by up to `num_padded` tokens of a row. Where there are such, the cache has one block
    more behind those that are handed out: what padding says it owns.
    """

    max_model_len: int
    block_size: int
    num_blocks: int
    num_padded: int = 0

    @property
    def num_slots(self) -> int:
        """Positions that the cache holds."""
        return (self.num_blocks + (self.num_padded > 0)) * self.block_size

    @property
    def num_positions(self) -> int:
        """Positions that tokens may stand at, padding included."""
        return self.max_model_len + self.num_padded


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """An accelerator's memory in bytes, after the weights were loaded; others may hold some of it or soon will.

    A step takes `activations` for a while.
    """

    free: int
    total: int
    ours: int
    activations: int

    def for_cache(self, fraction: float) -> int:
        """What the cache may take so that this process holds at most `fraction` of all, and some stays free."""
        most = min(fraction * self.total - self.ours, self.free - _SPARE_SHARE * self.total)
        return int(most - self.activations)


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """The most that all weights take in `dtype`, from transformers' own model on the meta device.

    A tied head counts beside the embedding, as it is held where it cannot be shared.
    """
    from accelerate import init_empty_weights
    from accelerate.utils import compute_module_sizes
    from transformers import LlamaForCausalLM

    # With buffers, tensors are made on the meta device; without, on the host, to be moved from there.
    with init_empty_weights(include_buffers=True):
        model = LlamaForCausalLM(checkpoint.config)
    shape = checkpoint.shape
    tied = shape.vocab_size * shape.model_width * dtype.itemsize if shape.is_head_tied else 0
    return int(compute_module_sizes(model, dtype=dtype)[""]) + tied


def exceeds_device(num_bytes: int, device: torch.device) -> bool:
    """Whether weights of this size leave no room in the memory that is free there."""
    return num_bytes > DEFAULT_MEMORY_FRACTION * _free_bytes(device)


def plan_capacity(
    settings: EngineSettings,
    checkpoints: Checkpoints,
    dtype: torch.dtype,
    device: torch.device,
    *,
    activations: int = 0,
    is_recorded: bool = False,
) -> Capacity:
    """Context and block count from the settings, the checkpoint and free memory. Raises SettingsError.

    A draft model's cache has the same slots, and takes its part of the memory. A step takes `activations` bytes;
    steps that are recorded keep as much for themselves, and are padded by drafts.
    """
    if is_recorded:
        activations *= 2
    slot = sum(_slot_bytes(checkpoint.shape, dtype) for checkpoint in checkpoints.all)
    fraction = settings.memory_fraction or DEFAULT_MEMORY_FRACTION
    affordable = _cache_bytes(device, fraction, activations) // (slot * settings.block_size)
    longest = checkpoints.full.shape.max_positions
    max_model_len = _context(settings, longest, affordable * settings.block_size, device)
    per_context = -(-max_model_len // settings.block_size)
    num_blocks = settings.num_blocks or max(per_context, min(per_context * settings.max_num_seqs, affordable))
    if num_blocks < per_context:
        held = f"num_blocks {num_blocks} hold {num_blocks * settings.block_size} tokens"
        remedy = f"raise num_blocks to {per_context} or lower max_model_len"
        raise SettingsError(f"{held}, less than max_model_len {max_model_len}: {remedy}")
    return Capacity(
        max_model_len=max_model_len,
        block_size=settings.block_size,
        num_blocks=num_blocks,
        num_padded=1 + settings.max_draft_length if is_recorded else 0,
    )


def _slot_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    heads = AttentionShape(shape.num_heads, shape.num_kv_heads, shape.head_width)
    return slot_bytes(num_layers=shape.num_layers, slot_width=heads.slot_width, dtype=dtype)


def _context(settings: EngineSettings, longest: int, affordable_tokens: int, device: torch.device) -> int:
    """The operator's context, which must fit, or the longest that the checkpoint and the memory allow."""
    wanted = settings.max_model_len
    if wanted is None:
        # With a number of blocks the operator has said what memory to use.
        return longest if settings.num_blocks else max(1, min(longest, affordable_tokens))
    if wanted > longest:
        raise SettingsError(f"max_model_len {wanted} exceeds the checkpoint's {longest} positions")
    if device.type != "cpu" and wanted > affordable_tokens and not settings.num_blocks:
        raise SettingsError(
            f"max_model_len {wanted} does not fit: memory is left for {affordable_tokens} tokens"
        )
    return wanted


def _free_bytes(device: torch.device) -> float:
    """Free memory of the device alone: none is touched that another rank has."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    from accelerate.utils import get_max_memory

    return float(get_max_memory().get("cpu", math.inf))


def _cache_bytes(device: torch.device, fraction: float, activations: int) -> int:
    if device.type == "cpu":
        return _CPU_CACHE_BYTES
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    return DeviceMemory(free=free, total=total, ours=ours, activations=activations).for_cache(fraction)
