"""What a worker says of its steps: what they took, and what it expects of the next.

Knows numbers; knows neither how they were learned nor what is made of them. Imports no torch, as messages do not.
"""

from __future__ import annotations

import msgspec


class CycleTimes(msgspec.Struct, frozen=True):
    """Where one step's wall time went, in seconds, and how many tokens its verification pass computed."""

    draft_s: float
    verify_s: float
    host_s: float
    num_tokens: int


class LayerBeliefs(msgspec.Struct, frozen=True):
    """What is expected of drafts that leave after this layer.

    `acceptance` is per position: how likely a draft is kept if all before it were, for the first few positions.
    `num_first_drafts` that were seen are remembered; seldom a whole number, for older ones count less.
    `draft_step_ms` is what one draft of each row takes, for the numbers of rows in `Beliefs`.
    """

    exit_layer: int
    num_first_drafts: float
    acceptance: list[float]
    draft_step_ms: list[float]


class Beliefs(msgspec.Struct, frozen=True):
    """What choices rest on: exit layers that were tried or chosen last, and steps by their number of rows.

    `plain_step_ms` gives each row one token without drafts. `host_ms` is what such a step takes beside it, and
    `drafting_ms` what drafting takes beside draft steps and verifying. `lookup_acceptance` is what a looked-up
    draft is expected to be kept with, whatever its position, by the number of ids that matched: two and more.
    """

    exit_layers: list[LayerBeliefs]
    num_rows: list[int]
    plain_step_ms: list[float]
    host_ms: list[float]
    drafting_ms: list[float]
    lookup_acceptance: list[float]
