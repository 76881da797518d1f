"""Whether "auto" pays at every concurrency: the engine alone, without HTTP; ends with one JSON line.

At each concurrency a short scan finds the most promising static exit layers and draft lengths. Then, in every
round, "auto", plain decoding and each of those static settings run the same prompts in turns, the order
changing from round to round; each keeps so many requests under way, the first of them at different points of
their texts, and where one ends the next begins. The static setting that did best over all rounds is the one
that "auto" is held against. Each side has an engine of its own for the whole program, as a server that decodes
so all day: what steps take there, and with that how much of a prompt joins them, is learned from its own.
"auto" runs the scan's prompts as often as static settings were tried on them: neither is chosen in the first
minute. Tokens over time are counted, prompts included, until no request is left to begin: a batch that runs dry
says more of who ends unevenly than of a server that has more to do. Ratios are medians over rounds, with what
they exceed with 95 % confidence. Every text is held against plain decoding's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Final

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from benchmarks.closed_loop import AUTO, PLAIN, Drafting, Driver, Pass
from benchmarks.concurrency_report import Contest, Scanned, as_text, draw
from benchmarks.peers import TransformersContinuous
from benchmarks.prompts import PROMPTS
from benchmarks.report import hardware
from benchmarks.sweep_inputs import BUNDLED_PROMPTS, read_prompts
from benchmarks.timing import Job, Prompt, Sampled
from config.settings import BUNDLED_CHECKPOINT, Dtype, EngineSettings
from decoding.engine import Engine

_DEPTHS: Final = (1 / 8, 3 / 16, 1 / 4, 3 / 8)
_FINALISTS: Final = 3
_SCAN_ROUNDS: Final = 3
_PEER_EVERY: Final = 5
_WARM_UP_TOKENS: Final = 8
_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Work:
    """What every round decodes."""

    prompts: tuple[Prompt, ...]
    tokens: int
    scan_tokens: int
    rounds: int
    waves: int

    def job(self, number: int, concurrency: int, sampled: Sampled, *, tokens: int | None = None) -> Job:
        """The prompts of a round: each begins where the one before ended, so that rounds differ."""
        size = self.waves * concurrency
        chosen = [self.prompts[(number * size + place) % len(self.prompts)] for place in range(size)]
        return Job(tuple(chosen), tokens or self.tokens, sampled)


@dataclass(frozen=True, slots=True)
class Bench:
    """Engines on one checkpoint, and what is measured on them."""

    auto: Driver
    plain: Driver
    statics: tuple[Driver, ...]
    peer: TransformersContinuous | None
    peer_concurrency: int
    grid: tuple[Drafting, ...]
    work: Work

    @property
    def scan_passes(self) -> int:
        """Runs of one scan."""
        again = _SCAN_ROUNDS - 1
        return 1 + len(self.grid) + again * (1 + min(_FINALISTS, len(self.grid)))

    def contest(self, concurrency: int, sampled: Sampled, bar: tqdm) -> Contest:
        """Scan, then all rounds."""
        warm_up = self.work.job(0, concurrency, sampled, tokens=_WARM_UP_TOKENS)
        for driver in (self.auto, self.plain, *self.statics):
            driver.run(warm_up, AUTO if driver is self.auto else PLAIN, concurrency=concurrency)
        scan = self._scan(concurrency, sampled, bar)
        self._learn(concurrency, sampled, bar)
        sides = [
            (self.auto, AUTO),
            (self.plain, PLAIN),
            *zip(self.statics, (each.drafting for each in scan), strict=False),
        ]
        found: list[list[Pass]] = [[] for _ in sides]
        peer: list[Pass] = []
        for number in range(self.work.rounds):
            job = self.work.job(number, concurrency, sampled)
            for turn in range(len(sides)):
                place = (number + turn) % len(sides)
                driver, drafting = sides[place]
                found[place].append(driver.run(job, drafting, concurrency=concurrency))
                bar.update()
            if self.peer is not None and concurrency == self.peer_concurrency and number % _PEER_EVERY == 0:
                run = self.peer.run(job)
                peer.append(Pass(run.token_ids, run.wall_s, sum(map(len, run.token_ids)), 0, 0))
        auto, plain, *statics = map(tuple, found)
        best = max(range(len(statics)), key=lambda place: _median_speed(statics[place], plain))
        drafting = sides[2 + best][1]
        return Contest(sampled, concurrency, drafting, scan, auto, plain, statics[best], tuple(peer))

    def _scan(self, concurrency: int, sampled: Sampled, bar: tqdm) -> tuple[Scanned, ...]:
        """Every static setting once, the most promising ones twice more, each against plain decoding beside it."""
        first = self._scanned(self.grid, 0, concurrency, sampled, bar)
        promising = sorted(first, key=lambda each: -each.speed_up)[:_FINALISTS]
        again = [
            self._scanned([each.drafting for each in promising], number, concurrency, sampled, bar)
            for number in range(1, _SCAN_ROUNDS)
        ]
        return tuple(
            Scanned(each.drafting, sum(rounds[place].speed_up for rounds in again) / len(again))
            for place, each in enumerate(promising)
        )

    def _learn(self, concurrency: int, sampled: Sampled, bar: tqdm) -> None:
        """As many runs for "auto" as the search for the best static setting took, of the same prompts."""
        for number in range(self.scan_passes):
            job = self.work.job(number % _SCAN_ROUNDS, concurrency, sampled, tokens=self.work.scan_tokens)
            self.auto.run(job, AUTO, concurrency=concurrency)
            bar.update()

    def _scanned(
        self, grid: Sequence[Drafting], number: int, concurrency: int, sampled: Sampled, bar: tqdm
    ) -> list[Scanned]:
        job = self.work.job(number, concurrency, sampled, tokens=self.work.scan_tokens)
        passes = []
        for drafting in (PLAIN, *grid):
            passes.append(self.statics[0].run(job, drafting, concurrency=concurrency))
            bar.update()
        plain, *others = passes
        return [
            Scanned(drafting, each.tokens_per_s / plain.tokens_per_s)
            for drafting, each in zip(grid, others, strict=True)
        ]


def _median_speed(passes: Sequence[Pass], plain: Sequence[Pass]) -> float:
    """Against plain decoding of the same round."""
    return median(one.tokens_per_s / other.tokens_per_s for one, other in zip(passes, plain, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, draw, and end with one line of JSON."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    bench = prepare(options)
    kinds = [Sampled(temperature, options.top_p) for temperature in options.temperatures]
    total = (
        len(kinds)
        * len(options.concurrency)
        * (2 * bench.scan_passes + (2 + len(bench.statics)) * options.pairs)
    )
    contests = []
    with tqdm(total=total, unit="run", mininterval=1, dynamic_ncols=True) as bar:
        for sampled in kinds:
            for concurrency in options.concurrency:
                bar.set_postfix_str(f"{sampled.label}, {concurrency} at once", refresh=False)
                contests.append(bench.contest(concurrency, sampled, bar))
    bench.auto.engine.check_integrity()
    document = {
        "benchmark": "concurrency",
        "hardware": hardware(),
        "settings": {
            **{key: value for key, value in vars(options).items() if key != "out"},
            # A folder's place says nothing elsewhere.
            "model": Path(options.model).name if Path(options.model).is_dir() else options.model,
            "seconds": round(time.perf_counter() - started, 1),
        },
        "contests": [contest.as_json() for contest in contests],
    }
    print(as_text(contests), end="\n\n")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(contests, options.out / "concurrency.png")
    line = json.dumps(document, ensure_ascii=False)
    (options.out / "concurrency.json").write_text(line + "\n", encoding="utf-8")
    print(line)


def prepare(options: argparse.Namespace) -> Bench:
    """Load the engines, and the peer if it is asked for. Raises StartupError."""
    most = max(options.concurrency)
    auto, plain, *statics = (
        Driver(Engine.load(_settings(options, most, **fixed)), count()) for fixed in _ENGINES
    )
    tokenizer = Tokenizer.from_str(auto.engine.ready.text.tokenizer_json)
    prompts = tuple(Prompt(index, tuple(tokenizer.encode(text).ids)) for index, text in enumerate(_texts()))
    num_layers = auto.engine.ready.limits.num_layers
    layers = options.exit_layers or sorted(
        {min(max(1, round(d * num_layers)), num_layers - 1) for d in _DEPTHS}
    )
    peer = None
    if options.continuous_batching:
        longest = max(len(prompt.token_ids) for prompt in prompts) + options.tokens
        peer = TransformersContinuous.load(
            options.model, dtype=options.dtype, rows=options.peer_concurrency, longest=longest
        )
    return Bench(
        auto=auto,
        plain=plain,
        statics=tuple(statics),
        peer=peer,
        peer_concurrency=options.peer_concurrency,
        grid=tuple(Drafting(layer, length) for layer in layers for length in options.draft_lengths),
        work=Work(prompts, options.tokens, options.scan_tokens, options.pairs, options.waves),
    )


_FIXED: Final = {"exit_layer": 1, "draft_length": 1}
_ENGINES: Final[tuple[dict[str, int], ...]] = ({}, *[_FIXED] * (1 + _FINALISTS))
"""The first one's controller chooses; the others, with nothing left to choose, have none."""


def _settings(options: argparse.Namespace, most: int, **fixed: int) -> EngineSettings:
    return EngineSettings(
        model=options.model,
        dtype=Dtype(options.dtype),
        num_threads=options.threads,
        compile_layers=options.compile_layers,
        max_num_seqs=max(64, most),
        max_model_len=_BLOCK,
        # Longer than any prompt: no prefix is ever found again, and every run computes its whole prompt.
        block_size=_BLOCK,
        **fixed,
    )


def _texts() -> Iterator[str]:
    """Prompts of several domains."""
    yield from PROMPTS
    for texts in read_prompts(BUNDLED_PROMPTS).values():
        yield from texts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.concurrency",
        description='"auto" against plain decoding and the best static setting; ends with one line of JSON. '
        "With the defaults about 20 minutes on 2 idle cores; --pairs 3 --tokens 24 --concurrency 1 8 "
        "--temperatures 0 takes about one.",
    )
    add = parser.add_argument
    add("--model", default=str(BUNDLED_CHECKPOINT), help="checkpoint (default: the bundled one)")
    add("--dtype", choices=[str(each) for each in Dtype], default="float32")
    add("--threads", type=int, default=1)
    add(
        "--compile-layers",
        choices=["auto", "true", "false"],
        default="auto",
        help="with layers compiled for this CPU",
    )
    add("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N")
    add("--pairs", type=int, default=15, help="rounds at every concurrency (default 15)")
    add("--waves", type=int, default=3, help="requests of a round, in units of the concurrency (default 3)")
    add("--tokens", type=int, default=64, help="tokens of every request (default 64)")
    add("--scan-tokens", type=int, default=32, help="the same in the scan (default 32)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.8], metavar="T", help="0 is greedy")
    add("--top-p", type=float, default=0.95, help="for temperatures above 0 (default 0.95)")
    add("--exit-layers", type=int, nargs="+", metavar="E", help="scan (default: by the model's depth)")
    add("--draft-lengths", type=int, nargs="+", default=[1, 2, 3, 5], metavar="γ", help="scan")
    add("--continuous-batching", action="store_true", help="time transformers' continuous batching, too")
    add("--peer-concurrency", type=int, default=16, metavar="N", help="where that is timed (default 16)")
    add("--out", type=Path, default=Path("concurrency"), metavar="DIR", help="folder of JSON and PNG")
    return parser


if __name__ == "__main__":
    main()
