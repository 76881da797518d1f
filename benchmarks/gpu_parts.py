"""The parts of what is measured on a GPU, and how much of each.

Knows which shapes and grids each part takes; knows nothing of files or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from benchmarks.gpu_cycles import Work
from benchmarks.gpu_decoding import Grid, Subject, measure_host, measure_plain, measure_speculation
from benchmarks.gpu_device import Device, Row, measure_bandwidth
from benchmarks.gpu_peers import Texts, measure_peers
from benchmarks.gpu_segments import Known, Segments, draw_weights, measure_layers
from benchmarks.gpu_shapes import Shape
from decoding.attention import AttentionShape
from decoding.tensor_files import DrawnTensors

_PEER_PROMPT_TOKENS: Final = 12
"""Shorter than a block, so that no prompt is found in the prefix cache."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each part measures."""

    token_counts: tuple[int, ...]
    work: Work
    grid: Grid
    peer_prompts: int
    peer_tokens: int
    kernel_batches: tuple[int, ...] = (1, 8, 64, 256)
    kernel_contexts: tuple[int, ...] = (128, 1024, 4096, 16384)
    kernel_queries: tuple[int, ...] = (1, 5)


FULL: Final = Sizes(
    token_counts=tuple(2**power for power in range(10)),
    work=Work(context=64, cycles=12, batches=(1, 4, 16, 64, 256)),
    grid=Grid((0.8, 0.6, 0.9), (1, 3, 6), probe_tokens=512, host_batch=64),
    peer_prompts=3,
    peer_tokens=64,
)
TINY: Final = Sizes(
    token_counts=(1, 4),
    work=Work(context=8, cycles=4, batches=(1, 2)),
    grid=Grid((0.8,), (2,), probe_tokens=128, host_batch=2),
    peer_prompts=1,
    peer_tokens=8,
)


@dataclass(slots=True)
class Bench:
    """What all parts share: where, on which shapes, in which number format, and what is known already."""

    device: Device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    sizes: Sizes
    document: dict[str, Any]
    known: dict[str, Known] = field(default_factory=dict)

    def subject(self, shape: Shape) -> Subject:
        """A shape with the work it is given."""
        return Subject(shape, self.device, self.dtype, self.sizes.work)

    def each(self, measure: Callable[[Shape], Iterator[Row]]) -> Iterator[Row]:
        """One shape after another, each with the device to itself."""
        for shape in self.shapes:
            yield from measure(shape)
            self.device.forget()

    @property
    def gb_per_s(self) -> float:
        """The memory's best measured speed, measured now if it is not known."""
        known = self.document["parts"].get("bandwidth", {}).get("rows")
        rows = known or list(measure_bandwidth(self.device, dtype=self.dtype))
        return max(float(row["GB_per_s"]) for row in rows)


def _kernels(bench: Bench) -> Iterator[Row]:
    # Triton is no dependency of a CPU.
    from benchmarks.gpu_kernels import cases, measure_kernels

    sizes = bench.sizes
    grid = cases(sizes.kernel_batches, sizes.kernel_contexts, sizes.kernel_queries)
    yield from measure_kernels(bench.device, AttentionShape(32, 8, 128), bench.dtype, grid)


def _bandwidth(bench: Bench) -> Iterator[Row]:
    yield from measure_bandwidth(bench.device, dtype=bench.dtype)


def _layers(bench: Bench) -> Iterator[Row]:
    def measure(shape: Shape) -> Iterator[Row]:
        weights = draw_weights(shape, bench.device, bench.dtype, DrawnTensors())
        segments = Segments(shape, bench.device, weights, bench.sizes.work.context)
        yield from measure_layers(segments, bench.sizes.token_counts)

    yield from bench.each(measure)


def _plain(bench: Bench) -> Iterator[Row]:
    fastest = bench.gb_per_s
    yield from bench.each(lambda shape: measure_plain(bench.subject(shape), gb_per_s=fastest))


def _speculation(bench: Bench) -> Iterator[Row]:
    for acceptance in bench.sizes.grid.acceptances:
        yield from bench.each(
            lambda shape, asked=acceptance: measure_speculation(
                bench.subject(shape), bench.sizes.grid, asked, bench.known.setdefault(shape.name, {})
            )
        )


def _peers(bench: Bench) -> Iterator[Row]:
    sizes = bench.sizes
    # The smallest shape once more in float32, where near-ties are rare and texts should be equal.
    precise = () if bench.dtype == torch.float32 else ((bench.shapes[0], torch.float32),)
    for shape, dtype in (*((shape, bench.dtype) for shape in bench.shapes), *precise):
        prompts = tuple(
            tuple((7 * place + 13 * number) % shape.sizes.vocab_size for place in range(_PEER_PROMPT_TOKENS))
            for number in range(sizes.peer_prompts)
        )
        texts = Texts(prompts, sizes.peer_tokens)
        yield from measure_peers(shape, bench.device, dtype, texts, sizes.grid.probe_tokens)
        bench.device.forget()


def _host(bench: Bench) -> Iterator[Row]:
    yield from bench.each(lambda shape: measure_host(bench.subject(shape), bench.sizes.grid))


PARTS: Final[Mapping[str, Callable[[Bench], Iterator[Row]]]] = {
    "bandwidth": _bandwidth,
    "kernels": _kernels,
    "plain": _plain,
    "layers": _layers,
    "speculation": _speculation,
    "host": _host,
    "peers": _peers,
}
"""What tells most comes first: a machine may be lent for minutes."""

NEED_CUDA: Final = ("kernels",)
