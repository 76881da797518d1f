"""Looked-up drafts against llama.cpp on the same weights, where texts repeat their prompts; ends with JSON.

One prompt at a time, greedy, each from nothing; contenders take turns at every prompt. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer

from benchmarks.machine import aligned
from benchmarks.peers import llama_cpp
from benchmarks.report import hardware
from benchmarks.sweep_inputs import read_prompts
from benchmarks.timing import Contender, Job, Prompt, Sampled, race
from benchmarks.variants import TASKS, Variant, Witness
from config.errors import StartupError
from config.settings import BUNDLED_CHECKPOINT, Dtype, EngineSettings
from decoding.engine import Engine
from decoding.messages import Drafter

_CONTEXT: Final = 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Time, print tokens a second of every task, and end with one line of JSON."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    engine = Engine.load(
        EngineSettings(
            model=options.model,
            dtype=Dtype(options.dtype),
            num_threads=options.threads,
            compile_layers=options.compile_layers,
            max_num_seqs=1,
            max_model_len=_CONTEXT,
            # No block is ever full: no prefix is found again, and every run computes its whole prompt.
            block_size=_CONTEXT,
        )
    )
    tokenizer, indices = Tokenizer.from_str(engine.ready.text.tokenizer_json), count()
    found: dict[str, dict[str, float]] = {}
    witness = Witness()
    with llama_cpp(options.model, dtype=options.dtype, threads=options.threads, context=_CONTEXT) as llama:
        # It rounds otherwise, so its texts are its own; of ours all must be alike.
        contenders: list[Contender] = [*_variants(engine), llama]
        for task in options.tasks:
            prompts = (
                Prompt(next(indices), tuple(tokenizer.encode(text).ids)) for text in read_prompts(TASKS)[task]
            )
            jobs = [Job((prompt,), options.tokens, Sampled(0.0, 1.0)) for prompt in prompts]
            records = race(
                contenders,
                jobs,
                num_rounds=options.rounds,
                witness=lambda contender, job, run: contender is llama or witness.see(contender, job, run),
            )
            found[task] = {name: record.tokens_per_s for name, record in records.items()}
    names = [contender.name for contender in contenders]
    rows = [[task, *(f"{rates[name]:.1f}" for name in names)] for task, rates in found.items()]
    sys.stdout.write(aligned(["tokens/s", *names], rows) + "\n\n")
    document = {
        "benchmark": "copying",
        "hardware": hardware(),
        "settings": {**vars(options), "model": Path(options.model).name},
        "tokens_per_s": found,
        "tokens_compared": witness.num_tokens,
        "texts_different": witness.num_different,
    }
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")


def _variants(engine: Engine) -> Iterator[Variant]:
    ids = count()
    yield Variant("plain", engine, ids, Drafter.NONE, 1, 0)
    yield Variant("lookup, auto", engine, ids, Drafter.LOOKUP, None, None)
    yield Variant("hybrid, auto", engine, ids, Drafter.HYBRID, None, None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.copying",
        description="Looked-up drafts against llama.cpp on copy-heavy prompts; ends with one line of JSON.",
    )
    add = parser.add_argument
    add("--model", default=str(BUNDLED_CHECKPOINT), help="checkpoint folder (default: the bundled one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of both engines")
    add("--threads", type=int, default=1, help="of both engines (default 1)")
    add(
        "--compile-layers",
        choices=["auto", "true", "false"],
        default="auto",
        help="with layers compiled for this CPU",
    )
    add("--tasks", nargs="+", default=["edit", "table"], help="(default: edit table)")
    add("--tokens", type=int, default=96, help="of every prompt (default 96)")
    add("--rounds", type=int, default=4, help="llama.cpp sits out every second one (default 4)")
    return parser


if __name__ == "__main__":
    try:
        main()
    except StartupError as error:
        sys.exit(f"copying: {error}")
