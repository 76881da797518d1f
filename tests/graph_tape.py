"""A stand-in for CUDA graphs on a CPU that is as strict: what a graph would do wrong fails here.

Work is done once and every operation kept on a tape, with the very tensors that it read and wrote. Replaying runs
the tape and never the work: what the work read on the host stays as it was. An operation may read what is on the
tape, or what the work is bound to, and nothing may ask for a value. Before a replay all that is on the tape is
made no number.

Knows operations; knows nothing of what they compute.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"),
    *("aten::equal", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"),
}
"""Operations that make the host wait for the device."""

HOST_METHODS = {
    *(Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__),
    *(Tensor.__index__, Tensor.cpu, Tensor.__array__),
}
"""Methods that do so without an operation, at least on a CPU."""

GARBAGE = 0x5EED5EED5EED
"""What stands in tensors of integers: no place in anything."""


class NotRecordable(AssertionError):
    """What a graph could not hold, or would hold wrongly."""


class Tape:
    """Recorded operations."""

    def __init__(self, statics: list[Tensor]) -> None:
        self._steps: list[Callable[[], None]] = []
        self._made: dict[int, Tensor] = {}
        self._kept: list[object] = statics
        self._static = {_storage(tensor) for tensor in statics}
        self.is_paused = False
        self.before: list[Callable[[], None]] = []
        self.after: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Do it all again."""
        for watch in self.before:
            watch()
        with torch.inference_mode():
            for tensor in self._made.values():
                poison(tensor)
            for step in self._steps:
                step()
        for watch in self.after:
            watch()

    def read(self, tensors: list[Tensor], what: str) -> None:
        """Fail if one of these is neither on the tape nor declared."""
        for tensor in tensors:
            known = tensor.numel() == 0 or _storage(tensor) in self._static or _storage(tensor) in self._made
            if not known:
                raise NotRecordable(
                    f"{what} reads a tensor {tuple(tensor.shape)} that may be gone at the replay"
                )

    def call(self, function: Callable[..., object], tensors: list[Tensor]) -> None:
        """Something that is no operation, and writes to tensors that exist."""
        self.read(tensors, "a kernel")
        self.is_paused = True
        try:
            function()
        finally:
            self.is_paused = False
        self._steps.append(function)

    def add(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation and keep it."""
        name = operation._schema.name
        reads = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name in SYNCS or _has_mask(name, args):
            raise NotRecordable(f"{name} makes the host wait")
        self.read(reads, name)
        result = operation(*args, **kwargs)
        known = {_storage(tensor) for tensor in reads}
        outs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        fresh = [each for each in outs if each.numel() and _storage(each) not in known]
        self._kept.append((args, kwargs, result))
        self._made |= {_storage(each): each for each in fresh}
        if "empty" in name:
            return result
        if fresh:
            assert len(fresh) == len([each for each in outs if each.numel()]), name
            self._steps.append(lambda: _refill(fresh, operation(*args, **kwargs)))
        elif operation._schema.is_mutable:
            self._steps.append(lambda: operation(*args, **kwargs))
        return result


class TapeRecorder:
    """Records tapes. `declared` are tensors beside those that the work is bound to; `watches` see every replay."""

    def __init__(self) -> None:
        self.declared: list[Tensor] = []
        self.before: list[Callable[[], None]] = []
        self.after: list[Callable[[], None]] = []
        self.tape: Tape | None = None
        self.num_replays = 0

    def record(self, work: Callable[[], None]) -> Tape:
        """Once without a tape and once with one, as a graph is."""
        work()
        tape = Tape([*self.declared, *bound_tensors(work)])
        with self._taping(tape), _NoHost(tape), _Taping(tape):
            work()
        tape.before, tape.after = [self._count, *self.before], self.after
        return tape

    def mark(self) -> Moment:
        """Now: work is done when it is queued."""
        return Moment()

    @contextmanager
    def _taping(self, tape: Tape) -> Iterator[None]:
        self.tape = tape
        try:
            yield
        finally:
            self.tape = None

    def _count(self) -> None:
        self.num_replays += 1


class Moment:
    def __init__(self) -> None:
        self._at_s = time.perf_counter()

    def seconds_since(self, earlier: Moment) -> float:
        return self._at_s - earlier._at_s


class _Taping(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._tape.is_paused:
            return func(*args, **(kwargs or {}))
        return self._tape.add(func, args, kwargs or {})


class _NoHost(TorchFunctionMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in HOST_METHODS and not self._tape.is_paused:
            raise NotRecordable(f"{func.__name__} makes the host wait")
        return func(*args, **(kwargs or {}))


def bound_tensors(work: object) -> list[Tensor]:
    """All tensors that can be reached from some work without calling anything."""
    found: list[Tensor] = []
    seen: set[int] = set()
    left = [work]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, type):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            found.append(each)
        else:
            left += _parts(each)
    return found


def _parts(each: object) -> list[object]:
    if isinstance(each, dict):
        return list(each.values())
    if isinstance(each, list | tuple | set):
        return list(each)
    parts = [getattr(each, name, None) for name in ("__self__", "func", "args", "keywords", "__closure__")]
    if dataclasses.is_dataclass(each):
        parts += [getattr(each, field.name) for field in dataclasses.fields(each)]
    parts += vars(each).values() if hasattr(each, "__dict__") and not callable(each) else []
    if callable(each) and type(each).__module__.startswith(("decoding", "tests")):
        parts += vars(each).values() if hasattr(each, "__dict__") else []
    parts += [each.cell_contents] if type(each).__name__ == "cell" else []
    return parts


def poison(tensor: Tensor) -> None:
    """Nothing that could be taken for a value."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(torch.nan)
    elif tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(GARBAGE if tensor.dtype == torch.int64 else GARBAGE & 0x7FFFFFFF)


def _refill(fresh: list[Tensor], result: object) -> None:
    again = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.numel()]
    for old, new in zip(fresh, again, strict=True):
        old.copy_(new)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _has_mask(name: str, args: Any) -> bool:
    """Indexing by booleans asks how many are true."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1])
