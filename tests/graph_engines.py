"""Engines that replay tapes beside eager ones and the oracle of their model, and requests for them.

Knows how to run and compare; the promises are in the tests that use it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace as replace_fields
from torch import Tensor

from config.settings import EngineSettings
from decoding.attention import Arrangement, Queries
from decoding.attention_standing import StandingAttention
from decoding.blocks import BlockPool
from decoding.choice import Choice, DraftingRow, ExitLayers, FixedChoice
from decoding.engine import Engine
from decoding.graph_state import Choosing
from decoding.graphed_cycle import GraphedCycle
from decoding.messages import Decoded, Drafter, Generate, LogitEdits, SamplingParams
from decoding.noise import _mixed_ids
from decoding.plan import Plan, Result
from decoding.planning import StepLimits
from decoding.recorded_cycle import RecordedCycle
from decoding.scheduler import Scheduler
from decoding.stepping import Runner
from tests.graph_tape import Moment, TapeRecorder, poison
from tests.mixes import VOCAB, run_mix
from tests.oracle import NaiveDecoder

NUM_LAYERS, BLOCK_SIZE, NUM_BLOCKS, MOST_ROWS, MAX_LEN = 4, 4, 200, 8, 96


class RaggedChooser(FixedChoice):
    """Another exit layer now and then, and any draft length for each row."""

    def __init__(self, seed: int, *, longest: int = 4) -> None:
        super().__init__(exit_layer=2, draft_length=0)
        self._rng = np.random.default_rng(seed)
        self._longest = longest

    def choose(
        self,
        rows: Sequence[DraftingRow],
        *,
        among: ExitLayers = (),
        num_others: int = 0,
        can_stop: bool = False,
    ) -> Choice:
        self.exit_layer = int(self._rng.choice([2, 2, 2, 3]))
        most = self._longest if self._rng.random() < 0.8 else 0
        lengths = [int(self._rng.integers(0, min(row.limit, most) + 1)) for row in rows]
        return Choice(self.exit_layer, tuple(lengths))

    def lookup_length(self, num_rows: int, limit: int, *, num_matched: int, may_exit: bool) -> int:
        return int(self._rng.integers(0, min(limit, self._longest) + 1))


class Watch:
    """Fills what no row may read with no numbers before a replay, and checks after it what was written."""

    def __init__(self, recorded: RecordedCycle, cache_layers: Sequence[Tensor]) -> None:
        self._state = recorded.state
        self._sizes = recorded.sizes
        self._layers = cache_layers
        self._kept: list[Tensor] = []
        for layer_SW in cache_layers:
            layer_SW.fill_(torch.nan)

    def before(self) -> None:
        rows = self._state.first(self._sizes.num_rows, Choosing.FILTERED)
        column_Q = torch.arange(self._sizes.num_columns)
        is_free_RQ = (column_Q >= rows.counts_B[:, None]) | (column_Q >= rows.column_1)
        rows.exits_BQD[is_free_RQ] = torch.nan
        for column_R in (rows.sampling.temperatures_N, rows.sampling.top_ps_N, rows.sampling.min_ps_N):
            column_R[rows.counts_B == 0] = torch.nan
        for layer_SW in self._layers:
            layer_SW[-BLOCK_SIZE:] = torch.nan
        poison(rows.result_BP)
        self._kept = [layer_SW.clone() for layer_SW in self._layers]

    def after(self) -> None:
        rows = self._state.first(self._sizes.num_rows, Choosing.FILTERED)
        may_change = torch.zeros(len(self._layers[0]), dtype=torch.bool)
        may_change[-BLOCK_SIZE:] = True
        for start, count, context in zip(
            rows.starts_B.tolist(), rows.counts_B.tolist(), rows.contexts_BX.tolist(), strict=True
        ):
            for position in range(start, start + count):
                block = context[2 + position // BLOCK_SIZE]
                assert block != self._sizes.trash_block
                may_change[block * BLOCK_SIZE + position % BLOCK_SIZE] = True
            num_own = -(-(start + count) // BLOCK_SIZE) if count else 0
            assert set(context[2 + num_own :]) == {self._sizes.trash_block}
        for layer_SW, kept_SW in zip(self._layers, self._kept, strict=True):
            torch.testing.assert_close(
                layer_SW[~may_change], kept_SW[~may_change], rtol=0, atol=0, equal_nan=True
            )


@dataclass
class Subject:
    """An engine that replays tapes, and the oracle of its model."""

    loaded: Engine
    eager: Engine
    oracle: NaiveDecoder
    recorder: TapeRecorder

    @property
    def eager_cycle(self) -> Runner:
        return self.cycle._eager

    @property
    def cycle(self) -> GraphedCycle:
        assert isinstance(self.loaded.runtime.cycle, GraphedCycle)
        return self.loaded.runtime.cycle

    def check(
        self, requests: list[Generate], seed: int, *, drafts_alike: bool = True, **changes: int
    ) -> Counter[str]:
        """Decode requests that come at any time as an eager engine and the oracle do; say what happened.

        The same drafts must be made and kept, not only the same tokens told.
        """
        engines = [fresh(each, seed, **changes) for each in (self.loaded, self.eager)]
        mix, eager_mix = (run_mix(each, requests, np.random.default_rng(seed)) for each in engines)
        happened: Counter[str] = Counter(preemptions=engines[0].report().load.num_preemptions_total)
        for request in requests:
            events, got = mix.events[request.sequence_id], mix.tokens(request.sequence_id)
            assert not drafts_alike or list(map(facts, events)) == list(
                map(facts, eager_mix.events[request.sequence_id])
            )
            expected, _ = self.oracle.decode_with_logprobs(request, guess=got)
            expected = expected[: len(got)] if request.sequence_id in mix.left else expected
            assert got == expected, f"seed {seed}, row {request.sequence_id}"
            for event in events:
                happened += Counter(
                    {"kept": event.kept, "drafted": event.drafted, event.drafter: event.drafted}
                )
        return happened


def facts(event: Decoded) -> tuple[object, ...]:
    return (event.token_ids, event.drafted, event.kept, event.exit_layer, event.drafter, event.finish_reason)


def fresh(loaded: Engine, seed: int, *, num_blocks: int = NUM_BLOCKS, budget: int = 64) -> Engine:
    """A new scheduler over an old cache."""
    scheduler = Scheduler(
        BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE),
        StepLimits(MOST_ROWS, budget),
        RaggedChooser(seed),
        device=torch.device(loaded.ready.device),
        clock=lambda: 0.0,
    )
    runtime = replace(loaded.runtime, cycle=Timeless(loaded.runtime.cycle))
    return Engine(loaded.ready, runtime, scheduler, clock=lambda: 0.0)


def replace_cycle(loaded: Engine, cycle: GraphedCycle) -> Engine:
    """Its model with another cycle, to make fresh engines from."""
    return Engine(loaded.ready, replace(loaded.runtime, cycle=cycle), None, clock=lambda: 0.0)


@dataclass
class Timeless:
    """Steps that take no time to speak of: what is planned next must not depend on the machine."""

    cycle: Runner

    def run(self, plan: Plan) -> Result:
        return replace(self.cycle.run(plan), draft_s=1e-3, verify_s=1e-3)


def settings_of(folder: Path, **changes: object) -> EngineSettings:
    return EngineSettings(
        **{"model": str(folder), "dtype": "float64", "device": "cpu", "num_threads": 1},
        **{"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, "max_model_len": MAX_LEN},
        **{"max_num_seqs": MOST_ROWS, "max_num_batched_tokens": 64, "max_draft_length": 5},
        # Both are chosen, so that nothing is measured, and so recorded, before it can be watched.
        **{"exit_layer": 2, "draft_length": 2},
        **changes,
    )


def load(folder: Path, **changes: object) -> Subject:
    recorder = taping()
    settings = settings_of(folder, **changes)
    engine = Engine.load(settings, recorder=recorder)
    subject = Subject(engine, Engine.load(settings), NaiveDecoder(folder), recorder)
    watch(engine, subject.cycle.recorded, recorder)
    return subject


def taping() -> TapeRecorder:
    """The noise's part of the token ids is kept as long as the process runs."""
    recorder = TapeRecorder()
    recorder.declared.append(_mixed_ids(VOCAB, torch.device("cpu")))
    return recorder


def watch(loaded: Engine, recorded: RecordedCycle, recorder: TapeRecorder) -> None:
    cache = loaded.runtime.model.attention._cache
    watching = Watch(recorded, [cache.layer(each) for each in range(loaded.ready.limits.num_layers)])
    recorder.before, recorder.after = [watching.before], [watching.after]


def random_requests(seed: int, count: int, *, most_new: int = 24) -> list[Generate]:
    """Rows of every kind: most of them can be recorded, some of each kind cannot."""
    rng = np.random.default_rng(seed)
    requests = []
    for row in range(count):
        prompt = rng.integers(0, VOCAB, size=int(rng.integers(1, 12))).tolist()
        filters = {"top_k": int(rng.choice([0, 5])), "top_p": float(rng.choice([1.0, 0.8])), "min_p": 0.05}
        sampling = SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.1])),
            **(filters if rng.random() < 0.3 else {"top_p": 1.0}),
        )
        if rng.random() < 0.15:
            sampling = replace_fields(sampling, edits=LogitEdits(frequency_penalty=0.8))
        requests.append(
            Generate(
                sequence_id=row,
                prompt_ids=(prompt * 4)[: int(rng.integers(2, 30))],
                max_new_tokens=int(rng.integers(1, most_new)),
                sampling=sampling,
                seed=int(rng.integers(0, 2**62)),
                stop_token_ids=rng.integers(0, VOCAB, size=1).tolist() if rng.random() < 0.3 else [],
                exit_layer=1 if rng.random() < 0.05 else None,
                drafter=Drafter(rng.choice(["early_exit", "early_exit", "lookup", "hybrid", "none"])),
                logprobs=1 if rng.random() < 0.1 else None,
            )
        )
    return requests


def plain_request(row: int) -> Generate:
    return Generate(
        sequence_id=row,
        prompt_ids=[3 + row, 1, 4, 1, 5],
        max_new_tokens=20,
        sampling=SamplingParams(temperature=0.0),
        seed=row,
        stop_token_ids=[],
    )


class Freezing:
    """An attention that takes a row's start from the host."""

    def __init__(self, attention: StandingAttention) -> None:
        self._attention = attention
        self.position = 0

    def standing(self, arrangement: Arrangement, contexts_BX: Tensor) -> Queries:
        contexts_BX[:, 0].fill_(self.position)
        return self._attention.standing(arrangement, contexts_BX)

    def arrange(self, *args: object) -> Arrangement:
        return self._attention.arrange(*args)

    def queries(self, *args: object) -> Queries:
        return self._attention.queries(*args)

    def attend(self, *args: object) -> Tensor:
        return self._attention.attend(*args)


class Doing:
    """Records nothing: work is done whenever it is replayed."""

    def record(self, work: Callable[[], None]) -> Done:
        return Done(work)

    def mark(self) -> Moment:
        return Moment()


@dataclass
class Done:
    work: Callable[[], None]

    def replay(self) -> None:
        self.work()
