"""Runs an engine's cycles with a full batch for a while and says what they took and gave.

Knows engines and requests; knows no part of any measurement.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Final

import msgspec
import numpy as np
import torch

from benchmarks.closed_loop import Drafting
from benchmarks.gpu_device import Device
from benchmarks.gpu_shapes import Shape
from config.setting_types import LoadFormat
from config.settings import Dtype, EngineSettings
from decoding.engine import Engine
from decoding.messages import Generate, SamplingParams, StepReport

_BLOCK: Final = 16
_WARM_CYCLES: Final = 3
_LONGEST_DRAFT: Final = 6
_LEAST_PROMPTS: Final = 4
"""One prompt alone may happen to draft well or badly."""

_SPARE_CYCLES: Final = 8
"""Cycles that may pass before the last row begins."""

_STEP_TOKENS: Final = 4096
_SHARE_OF_MEMORY: Final = 0.7
"""The rest is for segments, which are timed beside the engine with caches of their own."""


@dataclass(frozen=True, slots=True)
class Work:
    """How many cycles are timed, behind prompts of how many tokens."""

    context: int
    cycles: int
    batches: tuple[int, ...]

    @property
    def new_tokens(self) -> int:
        """More than a row can come to before all are through."""
        return (self.cycles + _WARM_CYCLES + _SPARE_CYCLES) * (1 + _LONGEST_DRAFT)

    @property
    def prompt_tokens(self) -> int:
        """One more than the context: where that is whole blocks, only this one is not in the prefix cache."""
        return self.context + 1


@dataclass(frozen=True, slots=True)
class Steady:
    """Cycles in which every row decoded. `acceptance` is per position: of drafts whose predecessors were kept."""

    num_cycles: int
    cycle_ms: float
    host_ms: float
    draft_ms: float
    tokens_per_s: float
    tokens_per_cycle: float
    drafts_per_cycle: float
    acceptance: float | None


def load_engine(
    shape: Shape, device: Device, work: Work, *, dtype: str, late_scale: float = 1.0, **fixed: int
) -> Engine:
    """The shape with weights drawn on the device, for the largest of the batches."""
    most = max(work.batches)
    longest = min(shape.sizes.max_positions, work.prompt_tokens + work.new_tokens)
    return Engine.load(
        EngineSettings(
            model=str(shape.folder),
            load_format=LoadFormat.DUMMY,
            dummy_scale=late_scale,
            dtype=Dtype(dtype),
            device=str(device.torch),
            num_threads=torch.get_num_threads(),
            allowed_exit_layers=shape.exit_layers,
            max_draft_length=_LONGEST_DRAFT,
            max_num_seqs=most,
            max_num_batched_tokens=max(_STEP_TOKENS, most * (1 + _LONGEST_DRAFT)),
            max_model_len=longest,
            block_size=_BLOCK,
            memory_fraction=_SHARE_OF_MEMORY,
            **fixed,
        )
    )


@dataclass(slots=True)
class Rows:
    """Keeps an engine's batch full. Prompts are random tokens, computed before and then found in the prefix cache:
    beside rows that decode they would be computed bit by bit, and the first row would end before the last began.
    """

    engine: Engine
    work: Work
    _ids: Iterator[int] = field(default_factory=count)
    _num_computed: int = 0

    def holds(self, batch: int) -> bool:
        """Whether the cache has room for so many rows until they are through."""
        limits = self.engine.ready.limits
        return batch * -(-limits.max_model_len // _BLOCK) <= limits.num_blocks

    def run(self, batch: int, drafting: Drafting) -> Steady | None:
        """Cycles of a full batch, small ones of several prompts; None where some row was always missing."""
        steps: list[tuple[float, StepReport]] = []
        for number in range(max(1, _LEAST_PROMPTS // batch)):
            found = self.steps(batch, drafting, self.work.cycles + _WARM_CYCLES, first=number * batch)
            steps += list(found)[_WARM_CYCLES:]
        return _reduced(batch, steps) if steps else None

    def steps(
        self, batch: int, drafting: Drafting, num_steps: int, *, first: int = 0
    ) -> Iterator[tuple[float, StepReport]]:
        """Wall seconds and reports of so many steps in which every row decodes; prompts begin with the `first`."""
        self._compute(first + batch)
        ids = [next(self._ids) for _ in range(batch)]
        for row, number in enumerate(ids, start=first):
            self.engine.submit(self._request(row, number, drafting))
        try:
            for _ in range(num_steps + _SPARE_CYCLES):
                started = time.perf_counter()
                report = self.engine.step()
                took_s = time.perf_counter() - started
                if _is_full(report, batch, drafting):
                    yield took_s, report
                    num_steps -= 1
                if not num_steps or any(event.finish_reason is not None for event in report.decoded):
                    return
        finally:
            self.engine.abort(ids)

    def _compute(self, num_prompts: int) -> None:
        """The first so many prompts, as far as they were not computed before."""
        none = Drafting(self.engine.ready.limits.allowed_exit_layers[0], 0)
        missing = range(self._num_computed, num_prompts)
        self.engine.generate(
            msgspec.structs.replace(self._request(row, next(self._ids), none), max_new_tokens=0)
            for row in missing
        )
        self._num_computed = max(self._num_computed, num_prompts)

    def _request(self, row: int, sequence_id: int, drafting: Drafting) -> Generate:
        limits = self.engine.ready.limits
        prompt_ids = np.random.default_rng(row).integers(limits.vocab_size, size=self.work.prompt_tokens)
        return Generate(
            sequence_id=sequence_id,
            prompt_ids=prompt_ids.tolist(),
            max_new_tokens=limits.max_model_len - self.work.prompt_tokens,
            sampling=SamplingParams(temperature=0.0),
            seed=row,
            stop_token_ids=[],
            exit_layer=drafting.exit_layer,
            draft_length=drafting.draft_length,
        )


def plain_of(engine: Engine) -> Drafting:
    """No drafts. An exit layer is named, so that nobody asks what would be worth drafting."""
    return Drafting(engine.ready.limits.allowed_exit_layers[0], 0)


def _is_full(report: StepReport, batch: int, drafting: Drafting) -> bool:
    """Whether every row was there, behind its first token, and drafted what was asked for."""
    rows = report.decoded
    return (
        len(rows) == batch
        and all(event.queued_s is None for event in rows)
        and (drafting.draft_length is None or all(event.drafted == drafting.draft_length for event in rows))
    )


def _reduced(batch: int, steps: Sequence[tuple[float, StepReport]]) -> Steady:
    events = [event for _, report in steps for event in report.decoded]
    times = [report.times for _, report in steps if report.times is not None]
    kept = sum(event.kept for event in events)
    refused = sum(event.kept < event.drafted for event in events)
    emitted = sum(len(event.token_ids) for event in events)
    return Steady(
        num_cycles=len(steps),
        cycle_ms=1e3 * median(took_s for took_s, _ in steps),
        host_ms=1e3 * median(each.host_s for each in times),
        draft_ms=1e3 * median(each.draft_s for each in times),
        tokens_per_s=emitted / sum(took_s for took_s, _ in steps),
        tokens_per_cycle=emitted / (len(steps) * batch),
        drafts_per_cycle=sum(event.drafted for event in events) / (len(steps) * batch),
        acceptance=kept / (kept + refused) if kept + refused else None,
    )
