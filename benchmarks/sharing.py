"""What each thing that drafting shares with the full model is worth: weights, then KV cache, then computation.

The same prompts are decoded in three ways that draft the same tokens with the same first layers and head:
`weights`, as two-model speculation does, with a draft cache apart and verification from layer 0; `weights+kv`,
where drafting writes the full model's cache, but verification still runs every draft from layer 0; and
`weights+kv+compute`, the engine's own, where it runs from the exit layer on, from the hidden states drafting left
there. They take turns prompt by prompt, one row at a time, and their texts are compared with plain decoding's.
Times are of decoding steps, prompts left out; "layers" are tokens times layers for each new token.
The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Final

import torch
from transformers import AutoTokenizer

from benchmarks.prompts import PROMPTS
from benchmarks.report import hardware
from benchmarks.sharing_ways import Decoded, Way, make_ways
from config.settings import BUNDLED_CHECKPOINT, Dtype, EngineSettings
from decoding.capacity import weight_bytes
from decoding.checkpoint import Checkpoint, open_checkpoint
from decoding.messages import Generate, SamplingParams, sequence_seed

_SEED: Final = 20240416


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured: drafts, tokens and rounds."""

    exit_layer: int
    draft_length: int
    new_tokens: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Line:
    """One way at one temperature: medians over rounds, counts over one round."""

    way: str
    temperature: float
    ms_per_token: float
    fastest_ms_per_token: float
    slowest_ms_per_token: float
    num_drafted: int
    num_kept: int
    layer_calls_per_token: float
    layer_tokens_per_token: float
    kv_bytes_per_position: int
    num_texts: int
    num_different_texts: int

    def over(self, other: Line) -> float:
        """How many times as fast as another."""
        return other.ms_per_token / self.ms_per_token


def measure(
    ways: Sequence[Way], prompts: Sequence[Sequence[int]], asked: Asked, *, temperature: float
) -> list[Line]:
    """Decode every prompt in every way, in turns. The first way is plain decoding: texts are compared with its."""
    sequence_ids = count()
    rounds: dict[str, list[list[Decoded]]] = {way.name: [] for way in ways}
    for round_index in range(asked.repeats + 1):
        for way in ways:
            rounds[way.name].append([])
        for index, prompt_ids in enumerate(prompts):
            for way in ways:
                request = _request(prompt_ids, index, asked, temperature, next(sequence_ids))
                rounds[way.name][round_index].append(way.decode(request))
    # The first round warms up.
    timed = {name: of_way[1:] for name, of_way in rounds.items()}
    return [_line(way, timed[way.name], timed[ways[0].name], temperature) for way in ways]


def _request(
    prompt_ids: Sequence[int], index: int, asked: Asked, temperature: float, sequence_id: int
) -> Generate:
    return Generate(
        sequence_id=sequence_id,
        prompt_ids=list(prompt_ids),
        max_new_tokens=asked.new_tokens,
        sampling=SamplingParams(temperature=temperature, top_p=0.95 if temperature else 1.0),
        seed=sequence_seed(_SEED, prompt_index=index, choice_index=0),
        stop_token_ids=[],
        exit_layer=asked.exit_layer,
        draft_length=asked.draft_length,
    )


def _line(way: Way, rounds: list[list[Decoded]], plain: list[list[Decoded]], temperature: float) -> Line:
    times = [1e3 * sum(d.decode_s for d in each) / sum(d.num_timed for d in each) for each in rounds]
    one = rounds[0]
    num_timed = sum(decoded.num_timed for decoded in one)
    pairs = [
        (ours.token_ids, theirs.token_ids)
        for own, others in zip(rounds, plain, strict=True)
        for ours, theirs in zip(own, others, strict=True)
    ]
    return Line(
        way=way.name,
        temperature=temperature,
        ms_per_token=median(times),
        fastest_ms_per_token=min(times),
        slowest_ms_per_token=max(times),
        num_drafted=sum(decoded.num_drafted for decoded in one),
        num_kept=sum(decoded.num_kept for decoded in one),
        layer_calls_per_token=sum(decoded.layer_calls for decoded in one) / num_timed,
        layer_tokens_per_token=sum(decoded.layer_tokens for decoded in one) / num_timed,
        kv_bytes_per_position=way.kv_bytes_per_position,
        num_texts=len(pairs),
        num_different_texts=sum(ours != theirs for ours, theirs in pairs),
    )


def worths(lines: Sequence[Line]) -> dict[str, float]:
    """Speed-ups that sharing one thing more brings, and what all bring over plain decoding."""
    plain, weights, cache, everything = lines
    return {
        "kv": cache.over(weights),
        "compute": everything.over(cache),
        "kv_and_compute": everything.over(weights),
        "over_plain": everything.over(plain),
    }


def memory(checkpoint: Checkpoint, dtype: torch.dtype, exit_layer: int) -> dict[str, int]:
    """Weights of the model, and of the draft model's copy that sharing them saves, in bytes."""
    config = copy(checkpoint.config)
    config.num_hidden_layers = exit_layer  # type: ignore[attr-defined]
    drafting = replace(checkpoint, config=config)
    return {
        "weight_bytes": weight_bytes(checkpoint, dtype),
        "draft_weight_bytes_not_copied": weight_bytes(drafting, dtype),
    }


def as_text(lines: Sequence[Line]) -> str:
    """A table for people."""
    rows = [
        f"{'':20} {'T':>4} {'ms/token':>9} {'x plain':>8} {'kept':>6} {'layers':>7} {'KV B/pos':>9} differ"
    ]
    for line in lines:
        plain = next(other for other in lines if other.temperature == line.temperature)
        kept = f"{line.num_kept / line.num_drafted:.2f}" if line.num_drafted else ""
        rows.append(
            f"{line.way:20} {line.temperature:4g} {line.ms_per_token:9.3f} {line.over(plain):8.2f} {kept:>6} "
            f"{line.layer_tokens_per_token:7.1f} {line.kv_bytes_per_position:9,} "
            f"{line.num_different_texts}/{line.num_texts}"
        )
    return "\n".join(rows)


def main() -> int:
    options = _parser().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [tokenizer(text).input_ids for text in PROMPTS][: options.prompts]
    longest = max(map(len, prompts)) + options.new_tokens
    settings = EngineSettings(
        model=str(options.model),
        dtype=Dtype(options.dtype),
        device=options.device,
        num_threads=options.threads,
        max_num_seqs=1,
        max_model_len=longest,
        # Longer than any prompt: no prefix is ever found again.
        block_size=longest,
        exit_layer=options.exit_layer,
        draft_length=options.draft_length,
        # Each way runs the same layers otherwise, by the operators that all of them have.
        compile_layers=False,
    )
    asked = Asked(options.exit_layer, options.draft_length, options.new_tokens, options.repeats)
    ways = make_ways(settings, exit_layer=asked.exit_layer)
    lines, found = [], {}
    for temperature in options.temperatures:
        print(f"T = {temperature:g}", file=sys.stderr)
        measured = measure(ways, prompts, asked, temperature=temperature)
        lines += measured
        found[f"{temperature:g}"] = worths(measured)
    document = {
        "benchmark": "sharing",
        "hardware": hardware(),
        "settings": {"model": Path(options.model).name, "dtype": options.dtype, **asdict(asked)},
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "memory": memory(open_checkpoint(settings.model, revision=None), ways[0].dtype, asked.exit_layer),
        "lines": [asdict(line) for line in lines],
        "speed_ups": found,
        "are_texts_equal": not any(line.num_different_texts for line in lines),
    }
    text = json.dumps(document, ensure_ascii=False)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(as_text(lines), end="\n\n")
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT)
    parser.add_argument("--dtype", default="float32", choices=[each.value for each in Dtype])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exit-layer", type=int, default=4)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the JSON line, under benchmarks/results by custom")
    return parser


if __name__ == "__main__":
    sys.exit(main())
