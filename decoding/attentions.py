"""Chooses the attention that serves a device.

Knows devices and packages; knows nothing of how attention is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config.errors import SettingsError
from config.setting_types import AttentionKind
from decoding.attention import Attention, AttentionShape, GatherAttention
from decoding.attention_standing import StandingAttention
from decoding.kernel_devices import hindrance
from decoding.kv_cache import KVCache


def make_attention(
    kind: AttentionKind,
    *,
    shape: AttentionShape,
    cache: KVCache,
    rotations_TF: Tensor,
    block_size: int,
    stands: bool = False,
) -> Attention:
    """The attention of this kind over the cache, ready to be used. Raises SettingsError.

    Float64 is gathered whatever is asked for: it is the reference. If it `stands`, it is a `Standing`.
    """
    device, dtype = rotations_TF.device, cache.layer(0).dtype
    wants_triton = kind is AttentionKind.TRITON or (kind is AttentionKind.AUTO and device.type == "cuda")
    why_not = hindrance(device) if wants_triton else None
    if kind is AttentionKind.TRITON and why_not:
        raise SettingsError(f"attention triton: {why_not}; pass --attention auto")
    if not wants_triton or why_not or dtype == torch.float64:
        if stands:
            return StandingAttention(
                shape=shape, cache=cache, rotations_TF=rotations_TF, block_size=block_size
            )
        return GatherAttention(shape=shape, cache=cache, rotations_TF=rotations_TF, dtype=dtype)
    from decoding.attention_triton import TritonAttention

    attention = TritonAttention(shape=shape, cache=cache, rotations_TF=rotations_TF, block_size=block_size)
    attention.warm_up()
    return attention
