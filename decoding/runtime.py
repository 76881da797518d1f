"""Puts models on a device: their weights, the caches beside them, and the cycle that runs plans with both.

Knows settings and checkpoints; knows nothing of requests.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from config.errors import SettingsError
from config.setting_types import Loader, LoadFormat
from config.settings import EngineSettings, default_num_threads
from decoding.attention import Attention, AttentionShape
from decoding.attentions import make_attention
from decoding.capacity import Capacity, exceeds_device, plan_capacity, weight_bytes
from decoding.checkpoint import Checkpoint
from decoding.compiled import CompiledDecoder, make_compiled
from decoding.compiled_cycle import CompiledCycle
from decoding.compiling import compiles_layers
from decoding.coupling import warm_up as warm_up_choices
from decoding.cycle import Cycle
from decoding.devices import pick_device, pick_dtype
from decoding.draft_checkpoint import Checkpoints
from decoding.draft_head import make_draft_head
from decoding.draft_model import DraftModel
from decoding.graph_state import graph_sizes
from decoding.graphed_cycle import GraphedCycle
from decoding.graphs import Recorder, cuda_recorder
from decoding.kv_cache import KVCache
from decoding.memory_profile import activation_bytes
from decoding.memory_shortage import needing_memory
from decoding.model import LlamaDecoder, Weights
from decoding.panels import PanelLinear
from decoding.parallel import Ranks, rank_device, rank_threads
from decoding.sharding import Shard
from decoding.stepping import Runner
from decoding.tensor_files import DrawnTensors
from decoding.weights import Placement, Progress, load_weights, rotations


@dataclass(frozen=True, slots=True)
class Runtime:
    """What runs plans on a device: the model, its cycle, and a separate draft model if there is one."""

    model: LlamaDecoder
    cycle: Runner
    draft_model: LlamaDecoder | None = None

    @property
    def can_stop(self) -> bool:
        """Whether rows may stop drafting where they are unsure."""
        return isinstance(self.cycle, CompiledCycle)

    @property
    def is_compiled(self) -> bool:
        """Whether layers run as code compiled for the CPU."""
        return isinstance(self.model, CompiledDecoder)


def place(settings: EngineSettings, checkpoint: Checkpoint, shard: Shard) -> Placement:
    """Where this rank's weights go; lets it have its share of the CPU's threads. Raises SettingsError."""
    torch.set_num_threads(rank_threads(settings.num_threads or default_num_threads(), shard))
    device = rank_device(pick_device(settings.device), shard)
    return Placement(
        device=device,
        dtype=pick_dtype(settings.dtype, checkpoint.shape.stored_dtype, device),
        drawn=_drawn(settings),
        shows_head=settings.draft_vocab_size is not None,
        shares_tied=device.type != "cpu",
        shard=shard,
    )


def build_runtime(
    settings: EngineSettings,
    checkpoints: Checkpoints,
    placement: Placement,
    ranks: Ranks,
    progress: Progress,
    recorder: Recorder | None = None,
) -> tuple[Runtime, Capacity]:
    """The models on their device, their caches beside them, and what a cache holds. All ranks do the same here,
    so that none waits for another that is elsewhere.
    """
    device, dtype = placement.device, placement.dtype
    offloads = _offloads(settings, checkpoints, placement)
    if offloads and settings.draft_vocab_size:
        raise SettingsError(
            "draft_vocab_size: weights that are offloaded have no head of their own for drafts"
        )
    shapes = [checkpoint.shape for checkpoint in checkpoints.all]
    if compiles_layers(
        settings,
        shapes,
        placement,
        progress,
        num_bytes=_weight_bytes(checkpoints, placement),
        offloads=offloads,
    ):
        # Compiled code has a head of its own for drafts.
        placement = replace(placement, form=PanelLinear, shows_head=False)
    with needing_memory(
        "while the weights were loaded",
        remedy="pass a smaller model, a dtype of fewer bytes, or loader accelerate, which leaves them on disk",
    ):
        weights = [
            _load(checkpoint, placement, progress, offloads=offloads) for checkpoint in checkpoints.all
        ]
    # From here on they wait for one another.
    ranks.least()
    checkpoints = checkpoints.on_a_rank(placement.shard)
    with needing_memory(
        "while the largest step was tried", remedy="lower max_num_batched_tokens or max_num_seqs"
    ):
        activations = activation_bytes(
            settings, lambda capacity: build_decoder(settings, checkpoints.full, capacity, weights[0]), device
        )
    recorder = recorder or (None if offloads else cuda_recorder(settings, device, dtype))
    capacity = ranks.least_capacity(
        plan_capacity(
            settings, checkpoints, dtype, device, activations=activations, is_recorded=recorder is not None
        )
    )
    with needing_memory("for the KV cache", remedy=f"lower {_bound_of_cache(settings, device)}"):
        (model, attention), *others = [
            # A separate draft model drafts with its whole head.
            build_decoder(
                settings, checkpoint, capacity, of_checkpoint, drafts_early=of_checkpoint is weights[0]
            )
            for checkpoint, of_checkpoint in zip(checkpoints.all, weights, strict=True)
        ]
    draft_model = DraftModel(*others[0]) if others else None
    warm_up_choices(model.weights.embedding_VD)
    draft_head = make_draft_head(settings, weights[0])
    by_parts = Cycle(
        model,
        attention,
        block_size=capacity.block_size,
        clock=time.perf_counter,
        draft_model=draft_model,
        draft_head=draft_head,
    )
    cycle: Runner = by_parts
    if isinstance(model, CompiledDecoder) and draft_head is None and draft_model is None:
        cycle = CompiledCycle(by_parts, model)
    if recorder is not None:
        cycle = GraphedCycle.of(by_parts, model, recorder, graph_sizes(settings, capacity), draft_head)
    return Runtime(model, ranks.together(cycle, device), draft_model.model if draft_model else None), capacity


def build_decoder(
    settings: EngineSettings,
    checkpoint: Checkpoint,
    capacity: Capacity,
    weights: Weights,
    *,
    drafts_early: bool = False,
) -> tuple[LlamaDecoder, Attention]:
    """A model of these weights, with a cache of its own."""
    sizes = checkpoint.shape
    device, dtype = weights.embedding_VD.device, weights.embedding_VD.dtype
    shape = AttentionShape(sizes.num_heads, sizes.num_kv_heads, sizes.head_width)
    cache = KVCache(
        num_layers=len(weights.layers),
        num_slots=capacity.num_slots,
        slot_width=shape.slot_width,
        dtype=dtype,
        device=device,
    )
    turns_TF = rotations(checkpoint, capacity.num_positions, device, dtype)
    if isinstance(weights.head, PanelLinear):
        num_drafted = settings.draft_vocab_size if drafts_early else sizes.vocab_size
        return make_compiled(weights, shape, cache, turns_TF, draft_vocab_size=num_drafted)
    attention = make_attention(
        settings.attention,
        shape=shape,
        cache=cache,
        rotations_TF=turns_TF,
        block_size=capacity.block_size,
        stands=capacity.num_padded > 0,
    )
    return LlamaDecoder(weights, attention), attention


def _load(checkpoint: Checkpoint, placement: Placement, progress: Progress, *, offloads: bool) -> Weights:
    with tempfile.TemporaryDirectory(prefix="layerskip-offload-") as folder:
        return load_weights(
            checkpoint, replace(placement, offload_folder=Path(folder) if offloads else None), progress
        )


def _weight_bytes(checkpoints: Checkpoints, placement: Placement) -> int:
    return sum(weight_bytes(checkpoint, placement.dtype) for checkpoint in checkpoints.all)


def _offloads(settings: EngineSettings, checkpoints: Checkpoints, placement: Placement) -> bool:
    """Whether weights lie elsewhere. Raises SettingsError where shares of them would have to."""
    shard, device = placement.shard, placement.device
    num_bytes = _weight_bytes(checkpoints, placement)
    # On a CPU the ranks share one memory.
    num_own_bytes = num_bytes if device.type == "cpu" else num_bytes // shard.size
    is_too_large = exceeds_device(num_own_bytes, device)
    if is_too_large and shard.size > 1:
        remedy = "raise it, or pass a smaller checkpoint"
        raise SettingsError(
            f"tensor_parallel_size {shard.size}: not even a share of the weights fits {device}; {remedy}"
        )
    return settings.loader is Loader.ACCELERATE or is_too_large


def _bound_of_cache(settings: EngineSettings, device: torch.device) -> str:
    """The setting that says how large the cache is here."""
    if settings.num_blocks is not None:
        return "num_blocks"
    return "max_model_len" if device.type == "cpu" else "memory_fraction"


def _drawn(settings: EngineSettings) -> DrawnTensors | None:
    """What stands in for files of weights, where that is asked for."""
    if settings.load_format is not LoadFormat.DUMMY:
        return None
    first = min(settings.allowed_exit_layers or (1,))
    return DrawnTensors(late_from=first, late_scale=settings.dummy_scale)
