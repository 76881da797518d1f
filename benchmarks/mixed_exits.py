"""What it costs when rows of one batch ask for different exit layers, drafting each at its own or all at one.

Twelve rows, a third each at a shallow, a middle and a deep exit layer, run under both policies of
`mixed_exit_layers`, beside plain decoding and beside all rows at each of the three layers, in turns. Then a third
of the rows does not draft: how long do their tokens wait beside rows that do? Texts are compared with plain
decoding's. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Final

from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.prompts import PROMPTS
from benchmarks.report import hardware
from config.setting_types import ExitPolicy
from config.settings import BUNDLED_CHECKPOINT, Dtype, EngineSettings
from decoding.engine import Engine
from decoding.messages import Generate, SamplingParams, sequence_seed

_ROWS: Final = 12
_LAYERS: Final = (3, 4, 8)
"""Shallow, middle and deep for a checkpoint of sixteen layers."""

_SEED: Final = 20240416

Asked = tuple[int, int]
"""Exit layer and draft length of a row."""


@dataclass(frozen=True, slots=True)
class Run:
    """One batch decoded: seconds without those of prompts, texts, and gaps of rows that do not draft."""

    seconds: float
    num_tokens: int
    texts: tuple[tuple[int, ...], ...]
    plain_gaps_ms: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all rows."""
        return self.num_tokens / self.seconds


def run(engine: Engine, requests: Sequence[Generate]) -> Run:
    """Decode these requests together, prompts left out of the time."""
    texts: dict[int, list[int]] = {request.sequence_id: [] for request in requests}
    latest: dict[int, float] = {}
    gaps: list[float] = []
    is_plain = {request.sequence_id for request in requests if request.draft_length == 0}
    for request in requests:
        engine.submit(request)
    while not all(texts.values()):
        for event in engine.step().decoded:
            texts[event.sequence_id] += event.token_ids
    num_before = sum(map(len, texts.values()))
    started = time.perf_counter()
    while engine.has_work:
        decoded = engine.step().decoded
        now = time.perf_counter()
        for event in decoded:
            texts[event.sequence_id] += event.token_ids
            if event.sequence_id in is_plain and event.sequence_id in latest:
                gaps.append(1000 * (now - latest[event.sequence_id]))
            latest[event.sequence_id] = now
    seconds = time.perf_counter() - started
    num_tokens = sum(map(len, texts.values())) - num_before
    return Run(seconds, num_tokens, tuple(map(tuple, texts.values())), tuple(gaps))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print lines and the JSON document."""
    options = _parser().parse_args(arguments)
    engines = {
        policy: Engine.load(
            EngineSettings(
                model=str(options.model),
                dtype=Dtype(options.dtype),
                num_threads=options.threads,
                mixed_exit_layers=policy,
            )
        )
        for policy in ExitPolicy
    }
    exact, promote = engines[ExitPolicy.EXACT], engines[ExitPolicy.PROMOTE]
    length = options.draft_length
    mixed: list[Asked] = [(layer, length) for layer in _LAYERS]
    sides: dict[str, tuple[Engine, list[Asked]]] = {
        "plain": (exact, [(1, 0)]),
        "exact": (exact, mixed),
        "promote": (promote, mixed),
        **{f"all at E={layer}": (exact, [(layer, length)]) for layer in _LAYERS},
        "exact, a third plain": (exact, [(_LAYERS[0], length), (_LAYERS[1], length), (1, 0)]),
    }
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [tokenizer.encode(text) for text in islice(cycle(PROMPTS), _ROWS)]
    ids = count()
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in tqdm(range(-1, options.rounds), desc="rounds"):
        order = list(sides.items())
        start = number % len(order)
        for name, (engine, asked) in [*order[start:], *order[:start]]:
            done = run(engine, list(_requests(prompts, asked, ids, options)))
            # The first round warms up.
            runs[name] += [done] if number >= 0 else []
    print(json.dumps(_report(runs, options)))


def _requests(
    prompts: Sequence[Sequence[int]], asked: Sequence[Asked], ids: Iterator[int], options: argparse.Namespace
) -> Iterator[Generate]:
    for index, (prompt, (exit_layer, draft_length)) in enumerate(zip(prompts, cycle(asked), strict=False)):
        yield Generate(
            sequence_id=next(ids),
            prompt_ids=list(prompt),
            max_new_tokens=options.new_tokens,
            sampling=SamplingParams(temperature=options.temperature),
            seed=sequence_seed(_SEED, prompt_index=index, choice_index=0),
            stop_token_ids=[],
            exit_layer=exit_layer,
            draft_length=draft_length,
        )


def _report(runs: dict[str, list[Run]], options: argparse.Namespace) -> dict[str, object]:
    plain = runs["plain"]
    lines: dict[str, object] = {}
    for name, own in runs.items():
        ratios = [each.tokens_per_s / beside.tokens_per_s for each, beside in zip(own, plain, strict=True)]
        different = sum(
            text != expected
            for each, beside in zip(own, plain, strict=True)
            for text, expected in zip(each.texts, beside.texts, strict=True)
        )
        gaps = sorted(gap for each in own for gap in each.plain_gaps_ms)
        lines[name] = {
            "tokens_per_s": round(median(each.tokens_per_s for each in own), 1),
            "over_plain": round(median(ratios), 3),
            "different_texts": different,
            "plain_rows_gap_ms": [round(gaps[int(q * (len(gaps) - 1))], 2) for q in (0.5, 0.99)]
            if gaps
            else None,
        }
        print(f"{name:22} {lines[name]}")
    asked = {**vars(options), "model": Path(options.model).resolve().name}
    return {"benchmark": "mixed_exits", "hardware": hardware(), "asked": asked, "lines": lines}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_exits", description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT)
    parser.add_argument("--draft-length", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=[str(each) for each in Dtype], default="float32")
    return parser


if __name__ == "__main__":
    main()
