"""What is commonly observed when every layer of a LayerSkip checkpoint is un-embedded, judged on what was read.

Knows inspections and thresholds; computes no layer and shows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from training.lens import Inspection

NEARLY_EVERY: Final = 0.9
"""From this share of positions on it is "nearly every" one."""

FEW: Final = 0.25
"""Up to this share of positions it is "few"."""

HARDLY_ANY: Final = 0.1
"""Up to this share of positions it is "hardly any"."""


class Verdict(StrEnum):
    """Whether an observation holds for a checkpoint."""

    TRUE = "true"
    FALSE = "false"
    NOT_APPLICABLE = "n/a"


@dataclass(frozen=True, slots=True)
class Finding:
    """One checkpoint's verdict, and the number behind it in words."""

    verdict: Verdict
    evidence: str


@dataclass(frozen=True, slots=True)
class Observation:
    """A claim, and what was found of it: one finding for each checkpoint, in their order."""

    claim: str
    findings: tuple[Finding, ...]


def observe(inspections: Sequence[Inspection]) -> tuple[Observation, ...]:
    """Judge all four claims on all checkpoints."""
    return (
        Observation(
            "The last row is the output: its top tokens are what the server generates greedily.",
            tuple(map(_last_row_is_output, inspections)),
        ),
        Observation(
            "With a tied head, the embedding row without the final norm repeats the input token at nearly every "
            "position.",
            tuple(map(_tied_repeats_input, inspections)),
        ),
        Observation(
            "With a head of its own, the embedding row without the final norm is gibberish: it repeats the input "
            "token at few positions and gives the output at hardly any.",
            tuple(map(_untied_is_gibberish, inspections)),
        ),
        Observation(
            "Tokens settle earliest in this checkpoint, as they do with LayerSkip training: the smallest mean "
            "settling layer as a share of the layers.",
            _settles_earliest(inspections),
        ),
    )


def _last_row_is_output(inspection: Inspection) -> Finding:
    generated = inspection.generated
    if not generated:
        return Finding(Verdict.NOT_APPLICABLE, "no token was generated")
    said = inspection.reading.top_RN[-1, inspection.num_prompt_tokens - 1 :]
    num_equal = int((said == np.array(generated)).sum())
    return Finding(
        _verdict(num_equal == len(generated)), f"{num_equal} of {len(generated)} generated tokens agree"
    )


def _tied_repeats_input(inspection: Inspection) -> Finding:
    if not inspection.is_head_tied:
        return Finding(Verdict.NOT_APPLICABLE, "the head is not tied")
    repeats = inspection.raw_embedding_N == inspection.reading.ids_N
    return Finding(_verdict(repeats.mean() >= NEARLY_EVERY), f"repeats the input at {_count(repeats)}")


def _untied_is_gibberish(inspection: Inspection) -> Finding:
    if inspection.is_head_tied:
        return Finding(Verdict.NOT_APPLICABLE, "the head is tied")
    repeats = inspection.raw_embedding_N == inspection.reading.ids_N
    foresees = inspection.raw_embedding_N == inspection.reading.top_RN[-1]
    is_gibberish = repeats.mean() <= FEW and foresees.mean() <= HARDLY_ANY
    evidence = f"repeats the input at {_count(repeats)}, gives the output at {_count(foresees)}"
    return Finding(_verdict(is_gibberish), evidence)


def _settles_earliest(inspections: Sequence[Inspection]) -> tuple[Finding, ...]:
    readings = [inspection.reading for inspection in inspections]
    shares = [reading.mean_settling_layer / reading.num_layers for reading in readings]
    evidence = [
        f"mean settling layer {reading.mean_settling_layer:.1f} of {reading.num_layers}: {share:.0%} of the depth"
        for reading, share in zip(readings, shares, strict=True)
    ]
    if len(inspections) < 2:
        return tuple(
            Finding(Verdict.NOT_APPLICABLE, f"{words}; nothing to compare with") for words in evidence
        )
    return tuple(
        Finding(_verdict(share == min(shares)), words) for share, words in zip(shares, evidence, strict=True)
    )


def _verdict(holds: object) -> Verdict:
    return Verdict.TRUE if holds else Verdict.FALSE


def _count(holds_N: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> str:
    return f"{int(holds_N.sum())} of {len(holds_N)} positions"
