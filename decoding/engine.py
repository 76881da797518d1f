"""The engine: a checkpoint, its KV cache, a scheduler and a cycle, driven one step at a time.

Knows token ids, not text. Runs in one thread; usable without a server.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from msgspec import structs

from config.errors import SettingsError
from config.setting_types import ExitPolicy, LoadFormat
from config.settings import EngineSettings, default_num_threads
from decoding.attention import Attention, AttentionShape
from decoding.attentions import make_attention
from decoding.blocks import BlockPool
from decoding.capacity import Capacity, exceeds_device, plan_capacity, weight_bytes
from decoding.checkpoint import Checkpoint, sampling_defaults, text_assets
from decoding.choice import DraftChooser
from decoding.compiled import PanelLinear, make_compiled
from decoding.compiled import prepare as prepare_compiled
from decoding.coupling import warm_up as warm_up_choices
from decoding.cycle import Cycle
from decoding.devices import pick_device, pick_dtype
from decoding.draft_checkpoint import Checkpoints
from decoding.draft_head import make_draft_head
from decoding.draft_model import DraftModel
from decoding.exits import Speculation, resolve_speculation
from decoding.kv_cache import KVCache
from decoding.memory_profile import activation_bytes
from decoding.messages import CycleTimes, Decoded, Generate, Limits, Ready, StepReport
from decoding.model import LlamaDecoder, Weights
from decoding.planning import StepLimits
from decoding.scheduler import Scheduler
from decoding.stepping import Stepper
from decoding.warm_up import Warmup
from decoding.weights import DrawnTensors, Placement, Progress, load_weights, rotations


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
        self._stepper = Stepper(scheduler, runtime.cycle)
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
                model_draft_length=checkpoints.draft_length(settings),
                model_context=checkpoints.draft_context,
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
            draft_model=settings.draft_model,
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
        """Compute one cycle for the batch and report what it gave.

        Where the device has no memory for even a small one, the newest of its sequences is dropped instead.
        """
        started = self._clock()
        stepped = self._stepper.step()
        if stepped is None:
            return self.report()
        plan, result = stepped.plan, stepped.result
        if result is None:
            # Ids grow.
            newest = max(plan.sequence_ids)
            self.abort([newest])
            return structs.replace(self.report(), out_of_memory=[newest])
        decoded = self._scheduler.commit(result)
        host_s = self._clock() - started - result.draft_s - result.verify_s
        self._scheduler.host_took(host_s)
        times = CycleTimes(
            draft_s=result.draft_s,
            verify_s=result.verify_s,
            host_s=host_s,
            num_tokens=plan.num_tokens,
        )
        return structs.replace(self.report(), decoded=decoded, times=times)

    def report(self) -> StepReport:
        """The load, with nothing decoded."""
        num_out_of_memory = self._stepper.num_out_of_memory
        load = structs.replace(self._scheduler.load(), num_out_of_memory_total=num_out_of_memory)
        return StepReport(decoded=[], load=load, running_ids=self._scheduler.running_ids)

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
    shows_head = settings.draft_vocab_size is not None
    placement = Placement(device=device, dtype=dtype, drawn=_drawn(settings), shows_head=shows_head)
    if offloads and settings.draft_vocab_size:
        raise SettingsError(
            "draft_vocab_size: weights that are offloaded have no head of their own for drafts"
        )
    if settings.compile_layers:
        if offloads:
            raise SettingsError("compile_layers: weights that are offloaded are not compiled for")
        prepare_compiled([checkpoint.shape for checkpoint in checkpoints.all], device, dtype, progress)
        placement = replace(placement, form=PanelLinear)
    weights = [_load(checkpoint, placement, progress, offloads=offloads) for checkpoint in checkpoints.all]
    activations = activation_bytes(
        settings, lambda capacity: build_decoder(settings, checkpoints.full, capacity, weights[0]), device
    )
    capacity = plan_capacity(settings, checkpoints, dtype, device, activations=activations)
    (model, attention), *others = [
        build_decoder(settings, checkpoint, capacity, of_checkpoint)
        for checkpoint, of_checkpoint in zip(checkpoints.all, weights, strict=True)
    ]
    draft_model = DraftModel(*others[0]) if others else None
    warm_up_choices(model.weights.embedding_VD)
    cycle = Cycle(
        model,
        attention,
        block_size=capacity.block_size,
        clock=time.perf_counter,
        draft_model=draft_model,
        draft_head=make_draft_head(settings, weights[0]),
    )
    return Runtime(model, cycle, draft_model.model if draft_model else None), capacity


def build_decoder(
    settings: EngineSettings, checkpoint: Checkpoint, capacity: Capacity, weights: Weights
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
    turns_TF = rotations(checkpoint, capacity.max_model_len, device, dtype)
    if settings.compile_layers:
        return make_compiled(weights, shape, cache, turns_TF)
    attention = make_attention(
        settings.attention, shape=shape, cache=cache, rotations_TF=turns_TF, block_size=capacity.block_size
    )
    return LlamaDecoder(weights, attention), attention


def _load(checkpoint: Checkpoint, placement: Placement, progress: Progress, *, offloads: bool) -> Weights:
    with tempfile.TemporaryDirectory(prefix="layerskip-offload-") as folder:
        return load_weights(
            checkpoint, replace(placement, offload_folder=Path(folder) if offloads else None), progress
        )


def _drawn(settings: EngineSettings) -> DrawnTensors | None:
    """What stands in for files of weights, where that is asked for."""
    if settings.load_format is not LoadFormat.DUMMY:
        return None
    first = min(settings.allowed_exit_layers or (1,))
    return DrawnTensors(late_from=first, late_scale=settings.dummy_scale)


def _check_budget(settings: EngineSettings) -> None:
    budget, rows = settings.max_num_batched_tokens, settings.max_num_seqs
    if budget < rows:
        remedy = "raise it or lower max_num_seqs"
        raise SettingsError(
            f"max_num_batched_tokens {budget} is less than a token for each of {rows} rows: {remedy}"
        )


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
