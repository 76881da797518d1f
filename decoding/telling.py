"""Reads off what choices rest on, and says it seldom: it is for people, and takes time of a step.

Knows expected costs and acceptance; changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from decoding.acceptance_record import AcceptanceRecord
from decoding.choice import DraftChooser
from decoding.reports import Beliefs, LayerBeliefs
from decoding.step_costs import Floats, StepCosts

_ROWS: Final = (1, 4, 16)
_POSITIONS: Final = 4
"""Few enough that a message with them stays small."""

_EVERY_S: Final = 1.0


class BeliefTeller:
    """Tells what a chooser believes, at most once a second; nothing without one, or where all is fixed."""

    def __init__(self, chooser: DraftChooser | None, clock: Callable[[], float]) -> None:
        self._chooser = chooser
        self._clock = clock
        self._next_s = -math.inf

    def due(self) -> Beliefs | None:
        """What is believed now; None if that was told less than a second ago."""
        if self._chooser is None or (now_s := self._clock()) < self._next_s:
            return None
        self._next_s = now_s + _EVERY_S
        return self._chooser.beliefs()


def beliefs_of(
    costs: StepCosts,
    record: AcceptanceRecord,
    *,
    exit_layers: Sequence[int],
    lookup_acceptance: Sequence[float],
) -> Beliefs:
    """What is expected of these exit layers, and of steps."""
    return Beliefs(
        exit_layers=[
            LayerBeliefs(
                exit_layer=layer,
                num_first_drafts=round(record.weight(layer), 1),
                acceptance=_shares(record.curve(layer)[:_POSITIONS]),
                draft_step_ms=_in_ms(costs.draft_s(layer, np.array(_ROWS))),
            )
            for layer in exit_layers
        ],
        num_rows=list(_ROWS),
        plain_step_ms=_in_ms([costs.plain_s(num_rows) for num_rows in _ROWS]),
        host_ms=_in_ms([costs.host_s(num_rows, drafts=False) for num_rows in _ROWS]),
        drafting_ms=_in_ms([_drafting_s(costs, num_rows) for num_rows in _ROWS]),
        lookup_acceptance=[round(rate, 3) for rate in lookup_acceptance],
    )


def _drafting_s(costs: StepCosts, num_rows: int) -> float:
    """What drafting takes beside its draft steps, on the device and on the host."""
    more_s = costs.host_s(num_rows, drafts=True) - costs.host_s(num_rows, drafts=False)
    return costs.start_s(num_rows) + more_s


def _shares(rates_K: Floats) -> list[float]:
    return [round(rate, 3) for rate in rates_K.tolist()]


def _in_ms(seconds: Sequence[float] | Floats) -> list[float]:
    return [round(1e3 * float(each_s), 4) for each_s in seconds]
