"""How often float32 decodes a token that plain decoding of the row alone would not, and how near a tie that was.

Matrix products may round differently with the number of rows, so in float32 a mixed, speculating batch may
differ from one plain row where the two best noised scores lie within 1e-4. This counts such places over many
tokens and measures each margin in float64. A margin above the bound is a defect. The last line of standard
output is one JSON document.

Run as `python -m benchmarks.ties [--tokens 100000]`; about five minutes for each 100,000 tokens on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch
from transformers import LlamaForCausalLM

from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding.engine import Engine
from decoding.messages import Generate, SamplingParams
from decoding.noise import gumbel_noise, seed_keys

BOUND: Final = 1e-4
NEW_TOKENS: Final = 128
ROWS_TOGETHER: Final = 16


@dataclass(frozen=True)
class Divergence:
    """Where a row first differed: the two tokens, and how far apart float64 puts their noised scores."""

    sequence_id: int
    position: int
    alone: int
    mixed: int
    margin: float


@dataclass(frozen=True)
class Comparison:
    """Tokens compared up to each row's first divergence, and the drafts that were made meanwhile."""

    num_tokens: int
    num_rows: int
    num_drafted: int
    num_kept: int
    divergences: list[Divergence]

    @property
    def worst_margin(self) -> float:
        return max((d.margin for d in self.divergences), default=0.0)


def random_requests(num_tokens: int, *, num_layers: int, vocab_size: int, seed: int) -> list[Generate]:
    """Rows of every length, temperature, exit layer and draft length."""
    rng = np.random.default_rng(seed)
    return [
        Generate(
            sequence_id=i,
            prompt_ids=rng.integers(1, vocab_size, size=int(rng.integers(1, 300))).tolist(),
            max_new_tokens=NEW_TOKENS,
            sampling=SamplingParams(temperature=float(rng.choice([0.0, 0.7, 1.2]))),
            seed=int(rng.integers(0, 2**63 - 1)),
            stop_token_ids=[],
            exit_layer=int(rng.integers(1, num_layers)),
            draft_length=int(rng.integers(0, 9)),
        )
        for i in range(-(-num_tokens // NEW_TOKENS))
    ]


def compare(folder: Path, *, num_tokens: int, seed: int = 0) -> Comparison:
    """Decode every request alone and plain, then mixed and speculating, and measure where they part."""
    settings = EngineSettings(model=str(folder), dtype="float32", num_threads=1)
    # Two engines, so that a row alone finds nothing in the prefix cache that a mixed batch computed.
    engine, plain_engine = Engine.load(settings), Engine.load(settings)
    limits = engine.ready.limits
    requests = random_requests(
        num_tokens, num_layers=limits.num_layers, vocab_size=limits.vocab_size, seed=seed
    )
    judge = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    divergences: list[Divergence] = []
    compared = drafted = kept = 0
    waiting = iter(requests)
    while batch := list(islice(waiting, ROWS_TOGETHER)):
        mixed = engine.generate(batch)
        for request in batch:
            plain = msgspec.structs.replace(request, draft_length=0)
            alone = plain_engine.generate([plain])[request.sequence_id]
            ids = [
                [t for event in run for t in event.token_ids] for run in (alone, mixed[request.sequence_id])
            ]
            parted = next((i for i, pair in enumerate(zip(*ids, strict=True)) if pair[0] != pair[1]), None)
            compared += NEW_TOKENS if parted is None else parted + 1
            drafted += sum(event.drafted for event in mixed[request.sequence_id])
            kept += sum(event.kept for event in mixed[request.sequence_id])
            if parted is not None:
                divergences.append(_measure(judge, request, ids[0][: parted + 1], ids[1][parted]))
        print(f"{compared} tokens, {len(divergences)} divergences", file=sys.stderr)
    return Comparison(compared, len(requests), drafted, kept, divergences)


@torch.inference_mode()
def _measure(judge: LlamaForCausalLM, request: Generate, alone: list[int], mixed: int) -> Divergence:
    known = [*request.prompt_ids, *alone[:-1]]
    scores_V = judge(torch.tensor([known])).logits[0, -1]
    if request.sampling.temperature > 0:
        noise = gumbel_noise(
            seed_keys([request.seed]), torch.tensor([len(known)]), len(scores_V), dtype=torch.float64
        )
        scores_V = scores_V / request.sampling.temperature + noise[0]
    margin = abs(float(scores_V[alone[-1]] - scores_V[mixed]))
    return Divergence(request.sequence_id, len(known), alone[-1], mixed, margin)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT)
    parser.add_argument("--tokens", type=int, default=100_000)
    arguments = parser.parse_args()
    started = time.perf_counter()
    found = compare(arguments.model, num_tokens=arguments.tokens)
    print(
        f"{found.num_tokens} tokens of {found.num_rows} rows, {found.num_drafted} drafted, {found.num_kept} kept: "
        f"{len(found.divergences)} divergences, widest margin {found.worst_margin:.2e} (bound {BOUND:.0e})"
    )
    print(json.dumps({**asdict(found), "bound": BOUND, "seconds": round(time.perf_counter() - started, 1)}))
    return 0 if found.worst_margin <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
