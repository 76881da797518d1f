"""Engines with compiled layers for tests, and what they need.

Knows settings; knows nothing of what is tested.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding.choice import FixedChoice
from decoding.engine import Engine
from decoding.messages import Decoded, Generate, SamplingParams

WHOLE = 4096
"""Tokens of the bundled checkpoint: drafts are among all of them."""

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


def engine(folder: Path | str = BUNDLED_CHECKPOINT, **settings: object) -> Engine:
    """Nothing is left to choose, so that no steps are measured at the start."""
    return Engine.load(
        EngineSettings(
            model=str(folder),
            num_threads=1,
            num_blocks=128,
            block_size=4,
            max_model_len=128,
            exit_layer=1,
            draft_length=1,
            **settings,
        )
    )


def requests(count: int, seed: int, **changes: object) -> list[Generate]:
    """Prompts of all lengths, greedy and sampled, of one exit layer and all draft lengths."""
    rng = random.Random(seed)
    return [
        Generate(
            sequence_id=number,
            prompt_ids=[rng.randrange(5, 4000) for _ in range(rng.randrange(1, 40))],
            max_new_tokens=rng.randrange(1, 24),
            sampling=SamplingParams(
                temperature=rng.choice([0, 0.8]),
                top_p=rng.choice([1.0, 0.9]),
                min_p=rng.choice([0.0, 0.05]),
                top_k=rng.choice([0, 0, 40]),
            ),
            seed=number,
            stop_token_ids=[],
            **{"exit_layer": 4, "draft_length": number % 5} | changes,
        )
        for number in range(count)
    ]


def with_chooser(loaded: Engine, chooser: FixedChoice) -> Engine:
    loaded._scheduler._speculator._chooser = chooser
    return loaded


def text(events: Iterable[Decoded]) -> list[int]:
    """The ids of all tokens."""
    return [token_id for event in events for token_id in event.token_ids]
