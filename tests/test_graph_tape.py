"""The stand-in for CUDA graphs refuses what a graph could not hold, and replays nothing but what it holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.graph_tape import NotRecordable, TapeRecorder


def test_what_work_reads_on_the_host_stays_as_it_was() -> None:
    static, numbers = torch.zeros(3), [1.0]
    tape = TapeRecorder().record(partial(lambda into: into.copy_(into + numbers[0]), static))
    static.zero_()
    numbers[0] = 5.0
    tape.replay()
    assert static.tolist() == [1.0, 1.0, 1.0]


def _reads_what_came_from_the_host(into: Tensor) -> None:
    into.copy_(torch.from_numpy(np.ones(3, dtype=np.float32)))


MISTAKES: dict[str, Callable[[Tensor], object]] = {
    "foreign": _reads_what_came_from_the_host,
    "constant": lambda into: into.mul_(torch.tensor([2.0])),
    "item": lambda into: into.fill_(into.sum().item()),
    "float": lambda into: into.fill_(float(into[0])),
    "tolist": lambda into: into.fill_(into.tolist()[0]),
    "if": lambda into: into.zero_() if into[0] > 0 else into,
    "numpy": lambda into: into.copy_(torch.from_numpy(into.numpy())),
    "nonzero": lambda into: into.fill_(len(into.nonzero())),
    "mask": lambda into: into[into > 0].sum(),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_graph_could_not_hold_is_refused(mistake: str) -> None:
    with pytest.raises(NotRecordable):
        TapeRecorder().record(partial(MISTAKES[mistake], torch.zeros(3)))


ELSEWHERE = torch.ones(3)


def test_what_the_work_is_not_bound_to_is_refused() -> None:
    static = torch.zeros(3)
    TapeRecorder().record(partial(lambda into, other: into.add_(other), static, ELSEWHERE))
    with pytest.raises(NotRecordable, match="add_ reads a tensor"):
        TapeRecorder().record(partial(lambda into: into.add_(ELSEWHERE), static))


def test_what_is_read_before_it_is_written_is_no_number() -> None:
    static = torch.zeros(3)
    tape = TapeRecorder().record(partial(lambda into: into.add_(torch.empty(3)), static))
    tape.replay()
    assert static.isnan().all()
