"""The table of assistants: what each makes of a checkpoint, beside the figures that were published of others.

Knows numbers and how they look; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from benchmarks.machine import aligned

ALL_TASKS: Final = "all"

PUBLISHED_UNDER: Final = (
    "A100, float16, greedy summarisation, transformers in eager mode; huggingface.co/blog/layerskip. Its columns "
    "headed FLOPs and time hold milliseconds for an input and for a token: those for a token stand here."
)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes held for one row at the longest text."""

    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One assistant on one task. `speed_up` is plain decoding's time over the assistant's, median of rounds."""

    task: str
    assistant: str
    ms_per_token: float
    plain_ms_per_token: float
    speed_up: float
    acceptance_rate: float | None
    memory: Memory
    flops_per_token: float

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Published:
    """One line of somebody else's table; None where no figure is known."""

    model: str
    assistant: str
    ms_per_token: float | None
    plain_ms_per_token: float | None
    speed_up: float


PUBLISHED: Final = (
    Published("LayerSkip Llama 2 7B", "early exit E=4", 19.9, 25.8, 1.297),
    Published("LayerSkip Llama 2 13B", "early exit E=4", None, None, 0.995),
    Published("LayerSkip Llama 2 13B", "early exit E=8", None, None, 1.746),
    Published("LayerSkip Llama 2 70B", "early exit E=10", None, None, 2.06),
    Published("Llama 2 70B", "separate draft model", None, None, 2.83),
    Published("LayerSkip Llama 3 8B", "early exit E=4", 15.75, 28.87, 1.83),
    Published("LayerSkip Llama 3.2 1B", "early exit E=4", 9.96, 17.9, 1.80),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured, and on what."""

    model: str
    num_parameters: int
    circumstances: str


def as_text(rows: Sequence[Row], subject: Subject) -> str:
    """Ours task by task, all tasks last, then the published figures."""
    head = ["task", "variant", "parameters", "assistant", "ms/token", "plain", "efficiency", "kept"]
    head += ["weights MB", "KV MB", "scratch MB", "GFLOPs/token"]
    ours = aligned(head, [_cells(row, subject) for row in rows])
    theirs = aligned(
        ["variant", "assistant", "ms/token", "plain", "efficiency"],
        [
            [
                each.model,
                each.assistant,
                _number(each.ms_per_token, 2),
                _number(each.plain_ms_per_token, 2),
                f"{each.speed_up:g}x",
            ]
            for each in PUBLISHED
        ],
    )
    return f"Ours: {subject.circumstances}\n{ours}\n\nPublished: {PUBLISHED_UNDER}\n{theirs}"


def _cells(row: Row, subject: Subject) -> list[str]:
    memory = row.memory
    held = (memory.weight_bytes, memory.kv_bytes, memory.scratch_bytes)
    return [
        row.task,
        subject.model,
        f"{subject.num_parameters / 1e6:.1f} M",
        row.assistant,
        f"{row.ms_per_token:.2f}",
        f"{row.plain_ms_per_token:.2f}",
        f"{row.speed_up:.2f}x",
        _number(row.acceptance_rate, 2),
        *(f"{num_bytes / 1e6:.2f}" for num_bytes in held),
        f"{row.flops_per_token / 1e9:.4f}",
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
