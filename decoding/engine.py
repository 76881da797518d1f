"""The engine: a checkpoint, its KV cache, a scheduler and a cycle, driven one step at a time.

Knows token ids, not text. Runs in one thread; usable without a server.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from config.errors import SettingsError
from config.setting_types import ExitPolicy, LoadFormat
from config.settings import EngineSettings, default_num_threads
from decoding.attention import Attention, AttentionShape
from decoding.attentions import make_attention
from decoding.blocks import BlockPool
from decoding.capacity import Capacity, exceeds_device, plan_capacity, weight_bytes
from decoding.checkpoint import Checkpoint, sampling_defaults, text_assets
from decoding.choice import DraftChooser
from decoding.cycle import Cycle
from decoding.draft_checkpoint import Checkpoints
from decoding.draft_model import DraftModel
from decoding.exits import Speculation, resolve_speculation
from decoding.kv_cache import KVCache
from decoding.messages import CycleTimes, Decoded, Generate, Limits, Ready, StepReport
from decoding.model import LlamaDecoder, Weights
from decoding.planning import StepLimits
from decoding.scheduler import Scheduler
from decoding.warm_up import Warmup
from decoding.weights import Placement, Progress, load_weights, rotations

_MODEL_DRAFT_LENGTH: Final = 4
"""As in the published comparisons; the controller measures no separate model."""


def _ignore(_stage: str, _fraction: float) -> None:
    return


@dataclass(frozen=True, slots=True)
class Runtime:
    """What runs plans on a device: the model, its cycle, and a separate draft model if there is one."""

    model: LlamaDecoder
    cycle: Cycle
    draft_model: LlamaDecoder | None = None


class Engine:
    """Decodes requests together. `submit` and `abort` between steps; `step` plans, runs and commits one."""

    def __init__(
        self, ready: Ready, runtime: Runtime, scheduler: Scheduler, *, clock: Callable[[], float]
    ) -> None:
        self.ready = ready
        self.runtime = runtime
        self._scheduler = scheduler
        self._clock = clock

    @classmethod
    def load(cls, settings: EngineSettings, *, progress: Progress = _ignore) -> Engine:
        """Read the checkpoint and allocate the cache. Raises CheckpointError or SettingsError."""
        clock = time.perf_counter
        torch.set_num_threads(settings.num_threads or default_num_threads())
        _check_budget(settings)
        checkpoints = Checkpoints.open(settings)
        checkpoint = checkpoints.full
        # What can be refused is refused before the weights are read, which may take minutes.
        speculation = resolve_speculation(settings, num_layers=checkpoint.shape.num_layers)
        text, sampling = text_assets(checkpoint), sampling_defaults(checkpoint)
        device = pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, checkpoint.shape.stored_dtype, device)
        runtime, capacity = build_runtime(settings, checkpoints, device, dtype, progress)

        def scheduler(chooser: DraftChooser) -> Scheduler:
            pool = BlockPool(num_blocks=capacity.num_blocks, block_size=capacity.block_size)
            promotes = settings.mixed_exit_layers is ExitPolicy.PROMOTE
            limits = StepLimits(
                settings.max_num_seqs,
                settings.max_num_batched_tokens,
                promotes,
                model_draft_length=None if checkpoints.draft is None else _model_draft_length(settings),
            )
            return Scheduler(pool, limits, chooser, device=device, clock=clock)

        progress("measuring steps", 0.0)
        chooser = Warmup(settings, capacity, speculation, num_layers=checkpoint.shape.num_layers).chooser(
            runtime.cycle, scheduler, clock=clock
        )
        ready = Ready(
            model=settings.model,
            revision=settings.revision,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            limits=_limits(settings, checkpoint, capacity, speculation),
            text=text,
            sampling=sampling,
        )
        return cls(ready, runtime, scheduler(chooser), clock=clock)

    @property
    def has_work(self) -> bool:
        """Whether a step would decode anything."""
        return self._scheduler.has_work

    def submit(self, request: Generate) -> None:
        """Queue a request that the limits in `ready` allow."""
        self._scheduler.submit(request)

    def abort(self, sequence_ids: Iterable[int]) -> None:
        """Drop sequences and free their KV blocks; unknown ids are ignored."""
        self._scheduler.abort(sequence_ids)

    def step(self) -> StepReport:
        """Compute one cycle for the batch and report what it gave."""
        started = self._clock()
        plan = self._scheduler.plan()
        if plan is None:
            return self.report()
        result = self.runtime.cycle.run(plan)
        decoded = self._scheduler.commit(result)
        host_s = self._clock() - started - result.draft_s - result.verify_s
        self._scheduler.host_took(host_s)
        times = CycleTimes(
            draft_s=result.draft_s,
            verify_s=result.verify_s,
            host_s=host_s,
            num_tokens=plan.num_tokens,
        )
        return StepReport(decoded=decoded, load=self._scheduler.load(), times=times)

    def report(self) -> StepReport:
        """The load, with nothing decoded."""
        return StepReport(decoded=[], load=self._scheduler.load())

    def check_integrity(self) -> None:
        """Assert that every KV block is accounted for."""
        self._scheduler.check_integrity()

    def generate(self, requests: Iterable[Generate]) -> dict[int, list[Decoded]]:
        """Decode these requests to their ends, together: the events of each, by sequence id."""
        events: dict[int, list[Decoded]] = {}
        for request in requests:
            events[request.sequence_id] = []
            self.submit(request)
        while self.has_work:
            for event in self.step().decoded:
                events[event.sequence_id].append(event)
        return events


def build_runtime(
    settings: EngineSettings,
    checkpoints: Checkpoints,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[Runtime, Capacity]:
    """The models on their device, their caches beside them, and what a cache holds."""
    num_bytes = sum(weight_bytes(checkpoint, dtype) for checkpoint in checkpoints.all)
    offloads = settings.loader == "accelerate" or exceeds_device(num_bytes, device)
    are_drawn = settings.load_format is LoadFormat.DUMMY
    placement = Placement(device=device, dtype=dtype, are_drawn=are_drawn)
    weights = [_load(checkpoint, placement, progress, offloads=offloads) for checkpoint in checkpoints.all]
    capacity = plan_capacity(settings, checkpoints, dtype, device)
    (model, attention), *others = [
        build_decoder(settings, checkpoint, capacity, of_checkpoint)
        for checkpoint, of_checkpoint in zip(checkpoints.all, weights, strict=True)
    ]
    draft_model = DraftModel(*others[0]) if others else None
    cycle = Cycle(
        model,
        attention,
        block_size=capacity.block_size,
        clock=time.perf_counter,
        draft_model=draft_model,
    )
    return Runtime(model, cycle, draft_model.model if draft_model else None), capacity


def build_decoder(
    settings: EngineSettings, checkpoint: Checkpoint, capacity: Capacity, weights: Weights
) -> tuple[LlamaDecoder, Attention]:
    """A model of these weights, with a cache of its own."""
    sizes = checkpoint.shape
    device, dtype = weights.embedding_VD.device, weights.embedding_VD.dtype
    shape = AttentionShape(sizes.num_heads, sizes.num_kv_heads, sizes.head_width)
    attention = make_attention(
        settings.attention,
        shape=shape,
        cache=KVCache(
            num_layers=len(weights.layers),
            num_slots=capacity.num_slots,
            slot_width=shape.slot_width,
            dtype=dtype,
            device=device,
        ),
        rotations_TF=rotations(checkpoint, capacity.max_model_len, device, dtype),
        block_size=capacity.block_size,
    )
    return LlamaDecoder(weights, attention), attention


def _load(checkpoint: Checkpoint, placement: Placement, progress: Progress, *, offloads: bool) -> Weights:
    with tempfile.TemporaryDirectory(prefix="layerskip-offload-") as folder:
        return load_weights(
            checkpoint, replace(placement, offload_folder=Path(folder) if offloads else None), progress
        )


def _model_draft_length(settings: EngineSettings) -> int:
    """What a separate model drafts for requests that leave it open."""
    return min(_MODEL_DRAFT_LENGTH, settings.max_draft_length)


def _check_budget(settings: EngineSettings) -> None:
    budget, rows = settings.max_num_batched_tokens, settings.max_num_seqs
    if budget < rows:
        remedy = "raise it or lower max_num_seqs"
        raise SettingsError(
            f"max_num_batched_tokens {budget} is less than a token for each of {rows} rows: {remedy}"
        )


def pick_device(wanted: str) -> torch.device:
    """The device asked for; "auto" takes CUDA where there is one. Raises SettingsError."""
    has_cuda = torch.cuda.is_available()
    if wanted == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if wanted.startswith("cuda") and not has_cuda:
        raise SettingsError(f"device {wanted!r}: torch finds no CUDA device; pass --device cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device {wanted!r}: torch finds {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
        )
    return device


def pick_dtype(wanted: str, stored: str, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is the checkpoint's own on CUDA and float32 on a CPU."""
    name = wanted if wanted != "auto" else stored if device.type == "cuda" else "float32"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _limits(
    settings: EngineSettings, checkpoint: Checkpoint, capacity: Capacity, speculation: Speculation
) -> Limits:
    return Limits(
        num_layers=checkpoint.shape.num_layers,
        vocab_size=checkpoint.shape.vocab_size,
        max_model_len=capacity.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        block_size=capacity.block_size,
        num_blocks=capacity.num_blocks,
        allowed_exit_layers=list(speculation.allowed_exit_layers),
        first_exit_layer=speculation.first_exit_layer,
        first_draft_length=speculation.first_draft_length,
        default_exit_layer=speculation.exit_layer,
        default_draft_length=speculation.draft_length,
        max_draft_length=settings.max_draft_length,
        has_draft_model=settings.draft_model is not None,
    )
