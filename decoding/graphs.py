"""Device work that is recorded once and replayed: the seam to CUDA graphs, and how many of them are kept.

Knows functions without arguments; knows nothing of what they compute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Final, Generic, Protocol, Self, TypeVar

import torch

from config.setting_types import AttentionKind
from config.settings import EngineSettings
from decoding.kernel_devices import hindrance

Key = TypeVar("Key", bound=Hashable)

Work = Callable[[], None]
"""Reads and writes tensors that stay where they are; asks the device for nothing."""

MOST_GRAPHS: Final = 128
"""A graph of a small model's layers takes about 6 MB (35 of them 0.21 GiB, vLLM's pull request 11349): together
less than the share of memory that is left free.
"""


class Replayable(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Queue the same operations on the same tensors again."""


class Moment(Protocol):
    """When the device came to some point of its work."""

    def seconds_since(self, earlier: Self) -> float:
        """Time between two points that the device has passed."""


class Recorder(Protocol):
    """Records work, and sees when replayed work is done."""

    def record(self, work: Work) -> Replayable:
        """Do the work, and record it. Whatever it writes on the way must not matter."""

    def mark(self) -> Moment:
        """The point behind everything that was queued so far."""


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: they hand nothing to one another in it, and one runs at
    a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, work: Work) -> Replayable:
        """Do the work once beside the current stream, so that what it compiles is there; then capture."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                work()
        return graph

    def mark(self) -> CudaMoment:
        """An event on the current stream."""
        return CudaMoment(self._device)


class CudaMoment:
    """An event that has a time once the device has passed it."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: CudaMoment) -> float:
        """By the device's clock."""
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def cuda_recorder(settings: EngineSettings, device: torch.device, dtype: torch.dtype) -> Recorder | None:
    """What records CUDA graphs; None where steps are to run eagerly, or do something that is not recorded.

    Contexts of any length are gathered in float64 alone, which is the reference; else only kernels do without
    knowing on the host how long contexts are. A draft model's steps are not recorded.
    """
    if device.type != "cuda" or settings.enforce_eager or settings.draft_model is not None:
        return None
    has_kernels = settings.attention is not AttentionKind.GATHER and hindrance(device) is None
    return CudaRecorder(device) if has_kernels or dtype == torch.float64 else None


class Graphs(Generic[Key]):
    """Recordings by key; of more than `most` the one that was not used for longest goes.

    `num_recorded` counts those made so far, those that are gone included.
    """

    def __init__(self, recorder: Recorder, *, most: int = MOST_GRAPHS) -> None:
        self._recorder = recorder
        self._most = most
        self._kept: OrderedDict[Key, Replayable] = OrderedDict()
        self.num_recorded = 0

    def __len__(self) -> int:
        return len(self._kept)

    def mark(self) -> Moment:
        """The point behind everything that was queued so far."""
        return self._recorder.mark()

    def missing(self, keys: Collection[Key]) -> list[Key]:
        """Those of these keys, of which there are fewer than `most`, that are to be recorded. The others stay."""
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
        return [key for key in keys if key not in self._kept]

    def record(self, key: Key, work: Work) -> None:
        """Record what this key stands for."""
        while len(self._kept) >= self._most:
            self._kept.popitem(last=False)
        self._kept[key] = self._recorder.record(work)
        self.num_recorded += 1

    def replay(self, key: Key) -> None:
        """Replay what was recorded for this key."""
        self._kept[key].replay()
