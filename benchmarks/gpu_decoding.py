"""Measures decoding of drawn models: plain against the memory's floor, drafts against their ceiling, and the host.

Knows engines, segments and ratios; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

import torch

from benchmarks.closed_loop import AUTO, Drafting
from benchmarks.gpu_cycles import Rows, Steady, Work, load_engine, plain_of
from benchmarks.gpu_device import Device, Row
from benchmarks.gpu_segments import Known, Segments, calibrate
from benchmarks.gpu_shapes import Shape
from decoding.engine import Engine
from decoding.model import Weights

_HOST_STEPS: Final = 12
_NEVER_FULL: Final = "some row was missing in every cycle"


@dataclass(frozen=True, slots=True)
class Grid:
    """Settings that are measured together."""

    acceptances: tuple[float, ...]
    draft_lengths: tuple[int, ...]
    probe_tokens: int
    host_batch: int


@dataclass(frozen=True, slots=True)
class Subject:
    """A shape on a device in one number format, and the work it is given."""

    shape: Shape
    device: Device
    dtype: torch.dtype
    work: Work

    def rows(self, engine: Engine) -> Rows:
        return Rows(engine, self.work)

    def engine(self, *, late_scale: float = 1.0, **fixed: int) -> Engine:
        name = str(self.dtype).removeprefix("torch.")
        return load_engine(self.shape, self.device, self.work, dtype=name, late_scale=late_scale, **fixed)

    def segments(self, weights: Weights, known: Known) -> Segments:
        """At the context that rows have in the midst of their cycles."""
        return Segments(self.shape, self.device, weights, self.work.prompt_tokens + self.work.cycles, known)


def measure_plain(subject: Subject, *, gb_per_s: float) -> Iterator[Row]:
    """One row without drafts: what a step takes, and the least it could take at the memory's measured speed."""
    # With nothing left to choose, no step is measured at the start.
    engine = subject.engine(exit_layer=subject.shape.exit_layers[0], draft_length=0)
    steady = subject.rows(engine).run(1, plain_of(engine))
    if steady is None:
        yield {"shape": subject.shape.name, "left_out": _NEVER_FULL}
        return
    context = subject.work.prompt_tokens + subject.work.cycles
    num_bytes = subject.shape.bytes_per_step(itemsize=subject.dtype.itemsize, context=context)
    floor_ms = num_bytes / gb_per_s / 1e6
    segments_ms = subject.segments(engine.runtime.model.weights, {}).plain_ms(1)
    yield {
        "shape": subject.shape.name,
        "bytes_per_step": num_bytes,
        "floor_ms": round(floor_ms, 4),
        "segments_ms": round(segments_ms, 4),
        "step_ms": round(steady.cycle_ms, 4),
        "host_ms": round(steady.host_ms, 4),
        "tokens_per_s": round(steady.tokens_per_s, 2),
        "share_of_floor": round(floor_ms / steady.cycle_ms, 4),
    }


def measure_speculation(subject: Subject, grid: Grid, acceptance: float, known: Known) -> Iterator[Row]:
    """Every batch, exit layer and draft length beside plain decoding, and "auto", at one acceptance that is set.

    `known` are segment times of this run so far; it gets those that are needed besides.
    """
    scale, agreed = calibrate(
        subject.shape, subject.device, subject.dtype, acceptance=acceptance, num_tokens=grid.probe_tokens
    )
    engine = subject.engine(late_scale=scale)
    rows, segments = subject.rows(engine), subject.segments(engine.runtime.model.weights, known)
    first = {
        "shape": subject.shape.name,
        "asked_acceptance": acceptance,
        "late_scale": round(scale, 5),
        "calibrated": round(agreed, 4),
    }
    for batch in subject.work.batches:
        if not rows.holds(batch):
            yield {**first, "batch": batch, "left_out": "the cache does not hold so many rows"}
            continue
        plain = rows.run(batch, plain_of(engine))
        if plain is None:
            yield {**first, "batch": batch, "left_out": _NEVER_FULL}
            continue
        # It learns at first, as it does in a server, from its own steps alone.
        rows.run(batch, AUTO)
        auto = rows.run(batch, AUTO)
        if auto is not None:
            yield {**first, **_compared(batch, AUTO, auto, plain)}
        for exit_layer in subject.shape.exit_layers:
            for length in grid.draft_lengths:
                drafting = Drafting(exit_layer, length)
                found = rows.run(batch, drafting)
                if found is None:
                    yield {**first, "batch": batch, **asdict(drafting), "left_out": _NEVER_FULL}
                    continue
                ceiling = _ceiling(segments, batch, drafting, found.tokens_per_cycle)
                yield {**first, **_compared(batch, drafting, found, plain), **ceiling}


def _compared(batch: int, drafting: Drafting, found: Steady, plain: Steady) -> Row:
    return {
        "batch": batch,
        "exit_layer": drafting.exit_layer,
        "draft_length": drafting.draft_length,
        "acceptance": None if found.acceptance is None else round(found.acceptance, 4),
        "tokens_per_cycle": round(found.tokens_per_cycle, 3),
        "drafts_per_cycle": round(found.drafts_per_cycle, 3),
        "cycle_ms": round(found.cycle_ms, 4),
        "host_ms": round(found.host_ms, 4),
        "plain_ms": round(plain.cycle_ms, 4),
        "tokens_per_s": round(found.tokens_per_s, 2),
        "plain_tokens_per_s": round(plain.tokens_per_s, 2),
        "speed_up": round(found.tokens_per_s / plain.tokens_per_s, 4),
    }


def _ceiling(segments: Segments, batch: int, drafting: Drafting, tokens_per_cycle: float) -> Row:
    """What drafts could gain at this acceptance if a cycle took no more than its segments, and neither did plain
    decoding."""
    assert drafting.exit_layer is not None
    assert drafting.draft_length is not None
    cycle_ms = segments.cycle_ms(batch, drafting.exit_layer, drafting.draft_length)
    plain_ms = segments.plain_ms(batch)
    return {
        "segments_ms": round(cycle_ms, 4),
        "plain_segments_ms": round(plain_ms, 4),
        "ceiling": round(tokens_per_cycle * plain_ms / cycle_ms, 4),
    }


def measure_host(subject: Subject, grid: Grid) -> Iterator[Row]:
    """At one batch, the time of a cycle in which the device has nothing to do."""
    engine = subject.engine()
    rows, batch = subject.rows(engine), grid.host_batch
    if not rows.holds(batch):
        yield {
            "shape": subject.shape.name,
            "batch": batch,
            "left_out": "the cache does not hold so many rows",
        }
        return
    for drafting in (plain_of(engine), Drafting(subject.shape.exit_layers[0], grid.draft_lengths[-1]), AUTO):
        steady = rows.run(batch, drafting)
        if steady is None:
            yield {"shape": subject.shape.name, "batch": batch, "left_out": _NEVER_FULL}
            continue
        busy_ms = _busy_ms(rows, batch, drafting) if subject.device.is_cuda else None
        # On a CPU, what decodes is the host: only planning and committing count.
        idle_ms = steady.host_ms if busy_ms is None else steady.cycle_ms - busy_ms
        yield {
            "shape": subject.shape.name,
            "batch": batch,
            "drafting": drafting.name,
            "cycle_ms": round(steady.cycle_ms, 4),
            "plan_and_commit_ms": round(steady.host_ms, 4),
            "device_busy_ms": None if busy_ms is None else round(busy_ms, 4),
            "not_overlapped_ms": round(idle_ms, 4),
            "not_overlapped_share": round(idle_ms / steady.cycle_ms, 4),
        }


def _busy_ms(rows: Rows, batch: int, drafting: Drafting) -> float:
    """Sum of all kernels and copies of a cycle. The profiler slows the host down, not those."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    steps = rows.steps(batch, drafting, _HOST_STEPS)
    next(steps)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        num_steps = sum(1 for _ in steps)
        torch.cuda.synchronize()
    # What launched a kernel may be listed beside it, with the same time.
    total_us = sum(
        event.self_device_time_total
        for event in profiled.key_averages()
        if event.device_type is DeviceType.CUDA and not event.is_user_annotation
    )
    return total_us / 1e3 / max(1, num_steps)
