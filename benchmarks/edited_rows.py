"""What a step costs when its rows ask for penalties, beside the same step of rows that ask for nothing.

Rows of one length, all without penalties, all with them, or every second one, decode with and without drafts, in
turns. Penalties change texts, not how many tokens a step computes: steps are compared, not tokens per second. The
last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Final

from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.prompts import PROMPTS
from benchmarks.report import hardware
from benchmarks.summaries import Ratio
from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding.engine import Engine
from decoding.messages import Generate, LogitEdits, SamplingParams, sequence_seed

_PENALTIES: Final = LogitEdits(frequency_penalty=0.4, repetition_penalty=1.1)
_EVERY: Final = {"none": 0, "half": 2, "all": 1}
"""Every how manieth row has penalties; 0 is none."""

_SEED: Final = 20240416


def step_ms(engine: Engine, requests: Sequence[Generate], *, draft_length: int) -> float:
    """The median step of these rows, of those steps in which all decode and draft in full."""
    for request in requests:
        engine.submit(request)
    steps_ms: list[float] = []
    while engine.has_work:
        started = time.perf_counter()
        events = engine.step().decoded
        took_ms = 1000 * (time.perf_counter() - started)
        is_decoding = len(events) == len(requests) and all(event.queued_s is None for event in events)
        if is_decoding and all(event.drafted == draft_length for event in events):
            steps_ms.append(took_ms)
    return median(steps_ms)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print lines and the JSON document."""
    options = _parser().parse_args(arguments)
    engine = Engine.load(
        EngineSettings(
            model=str(options.model),
            num_threads=options.threads,
            dtype=options.dtype,
            compile_layers=options.compile_layers,
        )
    )
    prompts = list(_prompts(options))
    ids = count()
    sides = [(length, name) for length in options.draft_lengths for name in _EVERY]
    found: dict[tuple[int, str], list[float]] = {side: [] for side in sides}
    for number in tqdm(range(-1, options.rounds), desc="rounds"):
        start = number % len(sides)
        for length, name in [*sides[start:], *sides[:start]]:
            requests = list(_requests(prompts, ids, options, draft_length=length, every=_EVERY[name]))
            took_ms = step_ms(engine, requests, draft_length=length)
            # The first round warms up.
            found[length, name] += [took_ms] if number >= 0 else []
    print(json.dumps(_report(found, options, vocab_size=engine.ready.limits.vocab_size)))


def _prompts(options: argparse.Namespace) -> Iterator[list[int]]:
    """As long as asked, each another stretch of the same programs, over and over."""
    whole = AutoTokenizer.from_pretrained(options.model).encode("".join(PROMPTS))
    whole *= 2 + options.context // len(whole)
    for row in range(options.rows):
        start = 17 * row % (len(whole) // 2)
        yield whole[start : start + options.context]


def _requests(
    prompts: Sequence[list[int]],
    ids: Iterator[int],
    options: argparse.Namespace,
    *,
    draft_length: int,
    every: int,
) -> Iterator[Generate]:
    for index, prompt in enumerate(prompts):
        edits = _PENALTIES if every and index % every == 0 else None
        yield Generate(
            sequence_id=next(ids),
            prompt_ids=prompt,
            max_new_tokens=options.new_tokens,
            sampling=SamplingParams(temperature=options.temperature, edits=edits),
            seed=sequence_seed(_SEED, prompt_index=index, choice_index=0),
            stop_token_ids=[],
            exit_layer=options.exit_layer,
            draft_length=draft_length,
        )


def _report(
    found: dict[tuple[int, str], list[float]], options: argparse.Namespace, *, vocab_size: int
) -> dict[str, object]:
    lines: dict[str, object] = {}
    for (length, name), steps_ms in found.items():
        ratio = Ratio.of(steps_ms, found[length, "none"])
        lines[f"γ={length} {name}"] = {"step_ms": round(median(steps_ms), 3), "over_none": ratio.as_json()}
        print(f"γ={length} {name:5} {median(steps_ms):8.2f} ms, {ratio.median:.3f} × none")
    asked = {**vars(options), "model": Path(options.model).resolve().name, "vocab_size": vocab_size}
    return {"benchmark": "edited_rows", "hardware": hardware(), "asked": asked, "lines": lines}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edited_rows", description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile-layers", choices=["auto", "true", "false"], default="auto")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=400, help="tokens of each prompt (default: 400)")
    parser.add_argument("--exit-layer", type=int, default=4)
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
