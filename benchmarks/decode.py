"""Times decoding of one checkpoint: this engine plain and speculating, beside transformers.

A speed-up means something only over a baseline that is itself fast, on the same weights, prompts, dtype and
threads, in the same minutes; published figures for early exit are mostly ratios over a slow plain loop. So
everything here runs in one process and takes turns, and each speculative figure stands beside our own plain
decoding ("x own γ=0") and beside what its parts promise: tokens per cycle x plain step / (γ x draft step +
verify pass) is "predicted". A "meas/pred" well below 1 means that time goes where no model layer runs.
"kept" is the acceptance rate, kept drafts over drafted ones; "host" the share of decoding time spent
planning and committing; "prefill" the share of all time before the first tokens, which speculation cannot
shorten and which pulls every ratio towards 1. The grid of exit layers and draft lengths is scanned once; the
best of each kind then meet in the finals, and only the finals are to be quoted. "auto", in an engine of its own,
has learned from the scan by then. Texts are compared throughout: greedy ones of all contenders, sampled ones of
ours, must equal plain decoding of the prompt alone.
Other programs join the finals if they are asked for: a separate draft model and continuous batching in
transformers, and llama.cpp on the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.agreement import Agreement
from benchmarks.contenders import (
    Ours,
    OursAuto,
    TransformersAssisted,
    TransformersPlain,
    load_transformers,
)
from benchmarks.peers import PeerRequest, Peers, TransformersDrafted, open_peers
from benchmarks.prompts import PROMPTS
from benchmarks.report import Findings, Line, as_text, hardware
from benchmarks.timing import Contender, Job, Prompt, Record, Sampled, race
from config.settings import BUNDLED_CHECKPOINT, Dtype, EngineSettings
from decoding.engine import Engine

_NUM_RIVAL_SCAN_PROMPTS = 2
_RIVAL_DRAFT_LENGTHS = (2, 4, 6, 8)
_PEER_OPTIONS = ("model", "dtype", "threads", "draft_model", "continuous_batching", "llama_cpp")
_MOST_CHOSEN = 16
"""Drafts that the controller may choose."""
_OUR_DEPTHS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8)
_RIVAL_DEPTHS = (1 / 8, 1 / 4, 3 / 8)


@dataclass(frozen=True, slots=True)
class Grid:
    """The (exit layer, draft length) pairs that are scanned."""

    ours: tuple[tuple[int, int], ...]
    rival: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Bench:
    """All engines, the prompts, and what was asked for."""

    engine: Engine
    sequence_ids: Iterator[int]
    auto: OursAuto
    model: LlamaForCausalLM
    peers: Peers
    prompts: tuple[Prompt, ...]
    grid: Grid
    agreement: Agreement
    new_tokens: int
    scan_tokens: int
    repeats: int

    @property
    def plain(self) -> Ours:
        return self._ours(1, 0)

    def measure(self, sampled: Sampled, batches: Sequence[int]) -> Findings:
        """Scan and finals at every batch size, smallest first: its winner also starts in the larger ones."""
        self.agreement.refer_to(self.plain, self._full_jobs(1, sampled))
        found = Findings(sampled)
        for batch in sorted(batches):
            _say(f"{sampled.label}, batch {batch}: scanning")
            found.scans[batch] = self._scan(batch, sampled)
            finalists = self._finalists(found, batch)
            _say(f"{sampled.label}, batch {batch}: finals of {', '.join(c.name for c in finalists)}")
            found.finals[batch] = self._race(finalists, self._full_jobs(batch, sampled), self.repeats)
        return found

    def _ours(self, exit_layer: int, draft_length: int) -> Ours:
        return Ours(self.engine, self.sequence_ids, exit_layer, draft_length)

    def _race(self, contenders: Sequence[Contender], jobs: Sequence[Job], num_rounds: int) -> list[Line]:
        witness = self.agreement.witness
        records: dict[str, Record] = race(contenders, jobs, num_rounds=num_rounds, witness=witness)
        return [Line(c, records[c.name], records[self.plain.name]) for c in contenders]

    def _scan(self, batch: int, sampled: Sampled) -> list[Line]:
        """The grid: ours on the work of the finals, the slow rival's on a little of it."""
        ours: list[Contender] = [self.plain, self.auto, *(self._ours(*setting) for setting in self.grid.ours)]
        lines = self._race(ours, self._full_jobs(batch, sampled), 1)
        if batch == 1:
            rivals: list[Contender] = [TransformersAssisted(self.model, *each) for each in self.grid.rival]
            rivals += self.peers.drafted
            few = self._jobs(1, sampled, _NUM_RIVAL_SCAN_PROMPTS, self.scan_tokens)
            lines += self._race([self.plain, *rivals], few, 1)[1:]
        return lines

    def _full_jobs(self, batch: int, sampled: Sampled) -> list[Job]:
        return self._jobs(batch, sampled, len(self.prompts), self.new_tokens)

    def _finalists(self, found: Findings, batch: int) -> list[Contender]:
        """Both plain decoders, the fastest rivals that draft, our two fastest, the winner at batch 1, peers."""
        lines = sorted(found.scans[batch], key=lambda line: -line.tokens_per_s)
        ranked = [line.contender for line in lines]
        ours = [c for c in ranked if isinstance(c, Ours) and c.draft_length]
        rivals = [c for c in ranked if isinstance(c, TransformersAssisted)]
        drafted = [c for c in ranked if isinstance(c, TransformersDrafted)]
        winner = found.best(1, Ours)
        chosen: list[Contender] = [TransformersPlain(self.model), *rivals[:1], *drafted[:1]]
        chosen += [*self.peers.finalists(batch), self.plain, self.auto, *ours[:2]]
        chosen += [winner.contender] if winner else []
        return list({contender.name: contender for contender in chosen}.values())

    def _jobs(self, batch: int, sampled: Sampled, num_prompts: int, new_tokens: int) -> list[Job]:
        starts = range(0, num_prompts - batch + 1, batch)
        return [Job(self.prompts[start : start + batch], new_tokens, sampled) for start in starts]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and end with one line of JSON."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(options, parser)
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _prepared(options) as bench:
        kinds = [Sampled(temperature, options.top_p) for temperature in options.temperatures]
        findings = [bench.measure(sampled, options.batch) for sampled in kinds]
    bench.engine.check_integrity()
    document = {
        "benchmark": "decode",
        "hardware": hardware(),
        "settings": {
            **{key: value for key, value in vars(options).items() if key != "json"},
            "model": _name(options.model),
            "draft_model": options.draft_model and _name(options.draft_model),
            "repeats": bench.repeats,
            "scan_tokens": bench.scan_tokens,
            "prompt_tokens": [len(prompt.token_ids) for prompt in bench.prompts],
            "seconds": time.perf_counter() - started,
        },
        "findings": [found.as_json() for found in findings],
        "agreement": bench.agreement.as_json(),
    }
    line = json.dumps(document, ensure_ascii=False)
    if options.json is not None:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(", ".join(f"{key} {value}" for key, value in hardware().items()))
    print(as_text(findings, bench.agreement), end="\n\n")
    print(line)


def _name(model: str) -> str:
    """A folder's place says nothing elsewhere."""
    return Path(model).name if Path(model).is_dir() else model


@contextmanager
def _prepared(options: argparse.Namespace) -> Iterator[Bench]:
    """Everything loaded. Raises StartupError."""
    tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
    prompts = tuple(Prompt(i, tuple(tokenizer(text).input_ids)) for i, text in enumerate(PROMPTS))
    longest = max(len(prompt.token_ids) for prompt in prompts) + options.new_tokens
    settings = EngineSettings(
        model=str(options.model),
        revision=options.revision,
        dtype=Dtype(options.dtype),
        device="cpu",
        num_threads=options.threads,
        compile_layers=options.compile_layers,
        max_num_seqs=max(options.batch),
        max_model_len=longest,
        # Longer than any prompt: no prefix is ever found again, and every run computes its whole prompt.
        block_size=longest,
        max_draft_length=max(options.draft_lengths),
        draft_length=1,
    )
    asked = PeerRequest(
        **{name: getattr(options, name) for name in _PEER_OPTIONS},
        rows=max(options.batch),
        longest=longest,
        draft_lengths=_RIVAL_DRAFT_LENGTHS[: 2 if options.quick else None],
    )
    _say("loading all engines")
    engine = Engine.load(settings)
    chooses = {"exit_layer": None, "draft_length": None, "max_draft_length": _MOST_CHOSEN}
    choosing = Engine.load(settings.model_copy(update=chooses))
    dtype = getattr(torch, options.dtype)
    model = load_transformers(str(options.model), revision=options.revision, dtype=dtype)
    with open_peers(asked, model) as peers:
        yield Bench(
            engine=engine,
            sequence_ids=count(),
            auto=OursAuto(choosing, count()),
            model=model,
            peers=peers,
            prompts=prompts,
            grid=_grid(options, engine.ready.limits.num_layers),
            agreement=Agreement(),
            new_tokens=options.new_tokens,
            scan_tokens=_scan_tokens(options),
            repeats=min(options.repeats, 1) if options.quick else options.repeats,
        )


def _scan_tokens(options: argparse.Namespace) -> int:
    return min(int(options.new_tokens), 24 if options.quick else 32)


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse a draft length that leaves no full cycle to take the costs of, and a peer that is not installed."""
    if options.llama_cpp and find_spec("llama_cpp") is None:
        parser.error("--llama-cpp: needs the package llama-cpp-python")
    longest = (_scan_tokens(options) - 4) // 2
    if not all(1 <= length <= longest for length in options.draft_lengths):
        parser.error(
            f"--draft-lengths {options.draft_lengths}: 1 to {longest} can be measured with these tokens"
        )


def _grid(options: argparse.Namespace, num_layers: int) -> Grid:
    """Every pair of the exit layers and draft lengths; `--quick` leaves the first two of each."""
    few = 2 if options.quick else None
    our_layers = (options.exit_layers or _layers(_OUR_DEPTHS, num_layers))[:few]
    rival_layers = (options.exit_layers or _layers(_RIVAL_DEPTHS, num_layers))[:few]
    strange = [layer for layer in [*our_layers, *rival_layers] if not 1 <= layer < num_layers]
    if strange:
        raise SystemExit(f"--exit-layers {strange}: this checkpoint's exit layers are 1 to {num_layers - 1}")
    our_lengths, rival_lengths = options.draft_lengths[:few], _RIVAL_DRAFT_LENGTHS[:few]
    return Grid(
        ours=tuple((layer, length) for layer in our_layers for length in our_lengths),
        rival=tuple((layer, length) for layer in rival_layers for length in rival_lengths),
    )


def _layers(depths: Sequence[float], num_layers: int) -> list[int]:
    return sorted({min(max(1, round(depth * num_layers)), num_layers - 1) for depth in depths})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description="Time decoding against transformers on the same weights; ends with one line of JSON. "
        "With the defaults about 10 minutes on 2 idle cores; --quick about 2.",
    )
    add = parser.add_argument
    add("--model", default=str(BUNDLED_CHECKPOINT), help="checkpoint folder (default: the bundled one)")
    add("--revision", help="branch, tag or commit of a hub checkpoint")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of all engines")
    add("--threads", type=int, default=1, help="threads of all engines (default 1)")
    add(
        "--compile-layers",
        choices=["auto", "true", "false"],
        default="auto",
        help="our engine with layers compiled for this CPU",
    )
    add("--draft-model", metavar="FOLDER", help="also time transformers with this draft model, at batch 1")
    add("--continuous-batching", action="store_true", help="also transformers' own, at batches above 1")
    add("--llama-cpp", action="store_true", help="also llama.cpp, at batch 1; needs llama-cpp-python")
    add("--repeats", type=int, default=5, help="rounds of the finals; transformers sits out every second one")
    add("--batch", type=int, nargs="+", choices=range(1, len(PROMPTS) + 1), default=[1, 8], metavar="N")
    add("--new-tokens", type=int, default=128, help="tokens decoded for every prompt (default 128)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.8], metavar="T", help="0 is greedy")
    add("--top-p", type=float, default=0.95, help="for temperatures above 0 (default 0.95)")
    add("--exit-layers", type=int, nargs="+", metavar="E", help="grid (default: by the model's depth)")
    add("--draft-lengths", type=int, nargs="+", default=[1, 2, 3, 4], metavar="γ", help="grid")
    add("--quick", action="store_true", help="a small grid, one round")
    add("--json", type=Path, metavar="FILE", help="also write the JSON line there")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
