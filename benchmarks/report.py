"""Turns what was measured into aligned tables, the checks against what is promised, and one JSON document.

Knows numbers; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Final

import torch

from benchmarks.agreement import Agreement
from benchmarks.contenders import Ours, TransformersAssisted
from benchmarks.machine import aligned, machine
from benchmarks.timing import Contender, Costs, Record, Sampled

_MOST_PARTINGS: Final = 12
"""How many partings the text names; the JSON has them all."""


@dataclass(frozen=True, slots=True)
class Line:
    """One contender in one race: its record beside that of own plain decoding in the same race."""

    contender: Contender
    record: Record
    plain: Record

    @property
    def tokens_per_s(self) -> float:
        return self.record.tokens_per_s

    @property
    def costs(self) -> Costs | None:
        """What its cycles cost; None for transformers, which does not say."""
        if not isinstance(self.contender, Ours):
            return None
        return Costs.of(self.record.steps, draft_length=self.contender.draft_length)

    @property
    def measured_speed_up(self) -> float:
        return self.tokens_per_s / self.plain.tokens_per_s

    @property
    def predicted_speed_up(self) -> float | None:
        """What tokens per cycle and step costs promise over own plain decoding."""
        costs = self.costs
        if costs is None:
            return None
        return costs.predicted_speed_up(Costs.of(self.plain.steps, draft_length=0))

    def as_json(self) -> dict[str, object]:
        slowest, fastest = self.record.range_tokens_per_s
        return {
            "name": self.contender.name,
            "exit_layer": getattr(self.contender, "exit_layer", None),
            "draft_length": getattr(self.contender, "draft_length", None),
            "rounds": len(self.record.rounds_s),
            "tokens_per_round": self.record.num_tokens,
            "tokens_per_s": self.tokens_per_s,
            "slowest_tokens_per_s": slowest,
            "fastest_tokens_per_s": fastest,
            "measured_speed_up": self.measured_speed_up,
            "predicted_speed_up": self.predicted_speed_up,
            "costs": (costs := self.costs) and asdict(costs),
        }


@dataclass(frozen=True, slots=True)
class Check:
    """A promised ratio and what it came to."""

    name: str
    value: float
    target: float

    @property
    def is_met(self) -> bool:
        return self.value >= self.target

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"is_met": self.is_met}


@dataclass(slots=True)
class Findings:
    """All races of one way of choosing tokens, by batch size: the scan of the grid, then the finals."""

    sampled: Sampled
    scans: dict[int, list[Line]] = field(default_factory=dict)
    finals: dict[int, list[Line]] = field(default_factory=dict)

    def best(self, batch: int, kind: type) -> Line | None:
        """The fastest finalist of this kind that drafts, if there is one."""
        lines = [line for line in self.finals.get(batch, []) if isinstance(line.contender, kind)]
        drafting = [line for line in lines if getattr(line.contender, "draft_length", 0)]
        return max(drafting, key=lambda line: line.tokens_per_s, default=None)

    def named(self, batch: int, name: str) -> Line | None:
        lines = self.finals.get(batch, [])
        return next((line for line in lines if line.contender.name == name), None)

    def checks(self) -> list[Check]:
        """The promised ratios, as far as the races needed for them were run."""
        plain, rival = self.named(1, "ours γ=0"), self.named(1, "transformers plain")
        ours, assisted = self.best(1, Ours), self.best(1, TransformersAssisted)
        checks = [*_ratio("ours γ=0 / transformers plain", plain, rival, 2.0)]
        checks += _ratio("ours best / transformers assisted best", ours, assisted, 3.0)
        checks += _ratio("ours best / ours γ=0", ours, plain, 1.3)
        auto = self.named(1, "ours auto")
        checks += _ratio("ours auto / ours γ=0", auto, plain, 1.5)
        checks += _ratio("ours auto / ours best", auto, ours, 0.95)
        if ours and ours.predicted_speed_up:
            checks.append(
                Check(
                    "measured / predicted at the best", ours.measured_speed_up / ours.predicted_speed_up, 0.85
                )
            )
        checks += _ratio("batch 8 / batch 1, γ=0", self.named(8, "ours γ=0"), plain, 3.0)
        if ours:
            name = ours.contender.name
            checks += _ratio(f"batch 8 / batch 1, {name}", self.named(8, name), ours, 3.0)
        best_of_8 = max(self.finals.get(8, []), key=lambda line: line.tokens_per_s, default=None)
        best_of_1 = max(
            (line for line in (ours, plain) if line), key=lambda line: line.tokens_per_s, default=None
        )
        return checks + _ratio("batch 8 best / batch 1 best", best_of_8, best_of_1, 3.0)

    def as_json(self) -> dict[str, object]:
        return {
            **asdict(self.sampled),
            "scans": {str(batch): [line.as_json() for line in lines] for batch, lines in self.scans.items()},
            "finals": {
                str(batch): [line.as_json() for line in lines] for batch, lines in self.finals.items()
            },
            "checks": [check.as_json() for check in self.checks()],
        }


def _ratio(name: str, above: Line | None, below: Line | None, target: float) -> list[Check]:
    return [Check(name, above.tokens_per_s / below.tokens_per_s, target)] if above and below else []


def hardware() -> dict[str, object]:
    """The machine and the versions that a figure means nothing without."""
    return {
        **machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def as_text(findings: Sequence[Findings], agreement: Agreement) -> str:
    """Everything a reader needs, as plain text."""
    blocks = [block for found in findings for block in _blocks(found)]
    return "\n\n".join([*blocks, _agreement_text(agreement)])


def _blocks(found: Findings) -> list[str]:
    label = found.sampled.label
    blocks = [
        f"{label}, batch {batch}: every setting, short rounds\n{_table(lines)}"
        for batch, lines in found.scans.items()
    ]
    blocks += [
        f"{label}, batch {batch}: the finals, medians of interleaved rounds\n{_table(lines)}"
        for batch, lines in found.finals.items()
    ]
    rows = [
        [c.name, f"{c.value:.2f}", f">= {c.target:g}", "met" if c.is_met else "SHORT"] for c in found.checks()
    ]
    if not rows:
        return blocks
    return [*blocks, f"{label}: checks\n{aligned(['ratio', 'value', 'target', ''], rows)}"]


def _table(lines: Sequence[Line]) -> str:
    head = [
        "contender",
        "tokens/s",
        "slowest..fastest",
        "x own γ=0",
        "predicted",
        "meas/pred",
        "tokens/cycle",
    ]
    return aligned(
        [*head, "kept", "draft ms", "verify ms", "host", "prefill"], [_cells(line) for line in lines]
    )


def _cells(line: Line) -> list[str]:
    slowest, fastest = line.record.range_tokens_per_s
    cells = [line.contender.name, f"{line.tokens_per_s:.1f}", f"{slowest:.0f}..{fastest:.0f}"]
    cells.append(f"{line.measured_speed_up:.2f}")
    costs, predicted = line.costs, line.predicted_speed_up
    if costs is None or predicted is None:
        return cells + [""] * 8
    return [
        *cells,
        f"{predicted:.2f}",
        f"{line.measured_speed_up / predicted:.2f}",
        f"{costs.tokens_per_cycle:.2f}",
        "" if costs.acceptance_rate is None else f"{costs.acceptance_rate:.2f}",
        f"{costs.draft_step_ms:.2f}" if costs.draft_length else "",
        f"{costs.verify_ms:.2f}",
        f"{100 * costs.host_share:.0f}%",
        f"{100 * costs.prefill_share:.0f}%",
    ]


def _agreement_text(agreement: Agreement) -> str:
    rows = [
        [label, str(t.num_texts), str(t.num_tokens), str(t.num_different)]
        for label, t in agreement.tallies.items()
    ]
    table = aligned(["texts against ours γ=0 alone", "texts", "tokens", "different"], rows)
    partings = [
        f"  {p.contender}, T={p.temperature:g}, batch {p.num_rows}: prompt {p.prompt} at token {p.position}"
        for p in agreement.partings
    ]
    if len(partings) > _MOST_PARTINGS:
        partings[_MOST_PARTINGS:] = [f"  and {len(partings) - _MOST_PARTINGS} more"]
    return "\n".join([table, *partings])
