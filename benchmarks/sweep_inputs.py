"""What a sweep is asked for: the grid, the work, and the prompts of each domain.

Knows ranges and files of prompts; knows nothing of engines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.sweep_table import ALL_DOMAINS
from benchmarks.timing import Sampled
from config.errors import SettingsError

BUNDLED_PROMPTS: Final = Path(__file__).parent / "sweep_prompts.jsonl"
LONGEST_DRAFT: Final = 64

_MOST_EXIT_LAYERS: Final = 12


@dataclass(frozen=True, slots=True)
class Request:
    """What the operator asked for. `models` are one or two folders or hub ids; `exit_layers` None: by depth."""

    models: tuple[str, ...]
    exit_layers: tuple[int, ...] | None
    draft_lengths: tuple[int, ...]
    prompts: Path
    work: Work
    threads: int | None
    device: str


@dataclass(frozen=True, slots=True)
class Axes:
    """The grid: every draft length at every exit layer, both in the order in which they are measured."""

    exit_layers: tuple[int, ...]
    draft_lengths: tuple[int, ...]

    @classmethod
    def chosen(
        cls, exit_layers: Sequence[int] | None, draft_lengths: Sequence[int], *, num_layers: int
    ) -> Axes:
        """What was asked for, by default exits in the first half. Raises SettingsError for an impossible one."""
        layers = sorted(set(exit_layers or default_exit_layers(num_layers)))
        strange = [layer for layer in layers if not 1 <= layer < num_layers]
        if strange:
            raise SettingsError(
                f"exit-layers {strange}: this checkpoint's exit layers are 1 to {num_layers - 1}"
            )
        return cls(tuple(layers), tuple(sorted(set(draft_lengths))))


def default_exit_layers(num_layers: int) -> list[int]:
    """The exits of the first half of the layers, thinned evenly where there are very many."""
    last = max(1, num_layers // 2)
    shown = min(last, _MOST_EXIT_LAYERS)
    return sorted({round(1 + index * (last - 1) / max(1, shown - 1)) for index in range(shown)})


@dataclass(frozen=True, slots=True)
class Work:
    """What is decoded of every prompt, how tokens are chosen, and how often all of it is repeated."""

    new_tokens: int
    sampled: Sampled
    repeats: int

    def check(self, draft_lengths: Sequence[int]) -> None:
        """Refuse draft lengths that leave no full cycle to take the costs of. Raises SettingsError."""
        longest = min((self.new_tokens - 4) // 2, LONGEST_DRAFT)
        if not all(1 <= length <= longest for length in draft_lengths):
            raise SettingsError(
                f"draft-lengths {list(draft_lengths)}: 1 to {longest} can be measured with "
                f"{self.new_tokens} new tokens"
            )


def read_prompts(path: Path) -> dict[str, tuple[str, ...]]:
    """Prompts by domain, in the order of the file's lines. Raises SettingsError, naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"prompts {path}: cannot be read; pass a readable JSONL file") from error
    prompts: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            domain, prompt = _prompt_line(line, f"prompts {path}, line {number}")
            prompts[domain] = (*prompts.get(domain, ()), prompt)
    if not prompts:
        raise SettingsError(f'prompts {path}: empty; pass lines like {{"domain": "tests", "prompt": "…"}}')
    return prompts


def _prompt_line(line: str, place: str) -> tuple[str, str]:
    try:
        values = json.loads(line)
        domain, prompt = values["domain"], values["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f'{place}: pass lines like {{"domain": "tests", "prompt": "…"}}') from error
    if not all(isinstance(text, str) and text for text in (domain, prompt)) or domain == ALL_DOMAINS:
        raise SettingsError(f"{place}: domain and prompt must be texts, and no domain {ALL_DOMAINS!r}")
    return domain, prompt
