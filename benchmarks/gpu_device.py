"""The device under test: what it is called, how a piece of its work is timed, and how fast its memory is.

Knows devices and clocks; knows no model.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Final

import torch
import torch.nn.functional as F

from benchmarks.report import hardware

Row = dict[str, object]

_REPEATS: Final = 5
_LEAST_ROUND_S: Final = 0.002
_BATCHES_OF_BYTES: Final = {"cuda": 2 << 30, "cpu": 8 << 20}
_GIGA: Final = 1e9


@dataclass(frozen=True, slots=True)
class Device:
    """Where everything is measured."""

    torch: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.torch.type == "cuda"

    def describe(self) -> Row:
        """The machine, the device and the versions that a figure means nothing without."""
        found: Row = {**hardware(), "device": str(self.torch.type), "triton": _version("triton")}
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(self.torch)
            found |= {
                "device": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "cuda": torch.version.cuda,
                "driver": _driver(),
            }
        return found

    def settle(self) -> None:
        """Wait until the device has nothing to do."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def forget(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def time_ms(self, work: Callable[[], object]) -> float:
        """What this work takes the device, launches left out: on CUDA it is replayed as one graph."""
        if self.is_cuda:
            from triton.testing import do_bench_cudagraph

            # It works on a stream of its own, which knows nothing of what is still under way.
            self.settle()
            return float(do_bench_cudagraph(work, return_mode="median"))
        work()
        return median(_round_ms(work) for _ in range(_REPEATS))

    def launched_ms(self, work: Callable[[], object]) -> float:
        """The same as it is when called, caches cold."""
        if not self.is_cuda:
            return self.time_ms(work)
        from triton.testing import do_bench

        return float(do_bench(work, warmup=10, rep=50, return_mode="median"))


def _round_ms(work: Callable[[], object]) -> float:
    """Mean of so many calls that the clock's own step does not matter."""
    started = time.perf_counter()
    num_calls = 0
    while num_calls == 0 or time.perf_counter() - started < _LEAST_ROUND_S:
        work()
        num_calls += 1
    return 1e3 * (time.perf_counter() - started) / num_calls


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """What nvidia-smi says, where it is installed."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else None


def measure_bandwidth(device: Device, *, dtype: torch.dtype) -> Iterator[Row]:
    """Bytes per second that the memory moves: copied, read for a sum, and read as a matrix times one vector."""
    num_bytes = _BATCHES_OF_BYTES[device.torch.type]
    source = torch.ones(num_bytes // 4, device=device.torch)
    copy = partial(torch.empty_like(source).copy_, source)
    yield _moved("copy", 2 * num_bytes, device.launched_ms(copy))
    yield _moved("sum", num_bytes, device.launched_ms(source.sum))
    del source, copy
    width = 8192 if device.is_cuda else 512
    height = num_bytes // (width * dtype.itemsize)
    matrix_OI = torch.ones(height, width, device=device.torch, dtype=dtype)
    vector_1I = torch.ones(1, width, device=device.torch, dtype=dtype)
    took_ms = device.launched_ms(lambda: F.linear(vector_1I, matrix_OI))
    yield _moved("matrix times vector", height * width * dtype.itemsize, took_ms)


def _moved(way: str, num_bytes: int, took_ms: float) -> Row:
    return {
        "way": way,
        "bytes": num_bytes,
        "ms": round(took_ms, 4),
        "GB_per_s": round(gb_per_s(num_bytes, took_ms), 1),
    }


def gb_per_s(num_bytes: float, took_ms: float) -> float:
    """Gigabytes (10⁹ bytes) a second."""
    return num_bytes / _GIGA / (took_ms / 1e3)
