"""The engine: a checkpoint, its KV cache, a scheduler and a cycle, driven one step at a time.

Knows token ids, not text. Runs in one thread; usable without a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from msgspec import structs

from config.errors import SettingsError
from config.setting_types import ExitPolicy
from config.settings import EngineSettings
from decoding.blocks import BlockPool
from decoding.capacity import Capacity
from decoding.checkpoint import Checkpoint, sampling_defaults, text_assets
from decoding.choice import DraftChooser
from decoding.draft_checkpoint import Checkpoints
from decoding.exits import Speculation, resolve_speculation
from decoding.graphs import Recorder
from decoding.memory_shortage import needing_memory
from decoding.messages import Decoded, Drafter, Generate, Limits, Ready, StepReport
from decoding.parallel import ALONE, Ranks
from decoding.planning import StepLimits
from decoding.reports import CycleTimes
from decoding.runtime import Runtime, build_runtime, place
from decoding.scheduler import Scheduler
from decoding.sharding import check_shards
from decoding.stepping import Stepper
from decoding.telling import BeliefTeller
from decoding.warm_up import Warmup
from decoding.weights import Progress


def _ignore(_stage: str, _fraction: float) -> None:
    return


class Engine:
    """Decodes requests together. `submit` and `abort` between steps; `step` plans, runs and commits one."""

    def __init__(
        self,
        ready: Ready,
        runtime: Runtime,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float],
        chooser: DraftChooser | None = None,
    ) -> None:
        self.ready = ready
        self.runtime = runtime
        self._scheduler = scheduler
        self._stepper = Stepper(scheduler, runtime.cycle)
        self._teller = BeliefTeller(chooser, clock)
        self._clock = clock

    @classmethod
    def load(
        cls,
        settings: EngineSettings,
        *,
        progress: Progress = _ignore,
        recorder: Recorder | None = None,
        ranks: Ranks = ALONE,
    ) -> Engine:
        """Read the checkpoint and allocate the cache. Raises CheckpointError, SettingsError or ShortOfMemory.

        Without a `recorder`, steps are recorded as CUDA graphs where that is possible and allowed. Of several
        `ranks` this is the first.
        """
        clock = time.perf_counter
        _check_budget(settings)
        checkpoints = Checkpoints.open(settings)
        checkpoint = checkpoints.full
        check_shards(settings, checkpoints.all, ranks.shard)
        # What can be refused is refused before the weights are read, which may take minutes.
        speculation = resolve_speculation(settings, num_layers=checkpoint.shape.num_layers)
        text, sampling = text_assets(checkpoint), sampling_defaults(checkpoint)
        placement = ranks.introduce(settings, checkpoints, place(settings, checkpoint, ranks.shard))
        runtime, capacity = build_runtime(settings, checkpoints, placement, ranks, progress, recorder)
        # Plans for several ranks are written on the host, and sent.
        device = placement.device if ranks.are_one else torch.device("cpu")

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
        with needing_memory(
            "while steps were measured", remedy="lower memory_fraction or max_num_batched_tokens"
        ):
            chooser = Warmup(settings, capacity, speculation, num_layers=checkpoint.shape.num_layers).chooser(
                runtime.cycle, scheduler, clock=clock, can_stop=runtime.can_stop
            )
        ready = Ready(
            model=settings.model,
            revision=settings.revision,
            dtype=str(placement.dtype).removeprefix("torch."),
            device=str(placement.device),
            limits=_limits(settings, checkpoint, capacity, speculation),
            text=text,
            sampling=sampling,
            draft_model=settings.draft_model,
            tensor_parallel_size=ranks.shard.size,
            is_compiled=runtime.is_compiled,
        )
        return cls(ready, runtime, scheduler(chooser), clock=clock, chooser=chooser)

    @property
    def has_work(self) -> bool:
        """Whether a step would decode anything."""
        return self._scheduler.has_work

    def submit(self, request: Generate) -> None:
        """Queue a request that the limits in `ready` allow. Raises ValueError for ids that are no tokens."""
        ids = (*request.prompt_ids, *request.resumed_ids)
        if not 0 <= min(ids, default=0) <= max(ids, default=0) < self.ready.limits.vocab_size:
            raise ValueError(f"token ids must be from 0 to {self.ready.limits.vocab_size - 1}")
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
            num_tokens=result.num_tokens(plan),
        )
        return structs.replace(self.report(), decoded=decoded, times=times)

    def report(self) -> StepReport:
        """The load, and now and then what choices rest on, with nothing decoded."""
        num_out_of_memory = self._stepper.num_out_of_memory
        load = structs.replace(self._scheduler.load(), num_out_of_memory_total=num_out_of_memory)
        return StepReport(
            decoded=[], load=load, running_ids=self._scheduler.running_ids, beliefs=self._teller.due()
        )

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
        default_drafter=Drafter(settings.drafter),
    )
