"""A model that two ranks run together gives the tokens of one process; what stops one of them stops both."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from config.errors import StartupError
from config.settings import EngineSettings
from decoding.capacity import Capacity
from decoding.engine import Engine
from decoding.messages import SamplingParams
from decoding.parallel import Introduction, OutOfStep, ParallelCycle, Ranks
from decoding.plan import Plan
from decoding.sharding import Shard
from server import ranks
from tests.mixes import NUM_LAYERS, Lab, check_mixes, one_request
from tests.oracle import NaiveDecoder
from tests.test_draft_model import RedirectingEngine
from tests.test_parallel_plan import random_plan
from tests.tiny import make_checkpoint
from tests.two_ranks import CPU, FORKS, VOCAB, other_rank, shared_out, tokens, two_ranks


def test_a_rank_that_cannot_start_says_why_through_the_first(tmp_path: Path) -> None:
    """In one line, and the first lives on to say it."""
    ours, theirs = multiprocessing.Pipe()
    other = FORKS.Process(target=other_rank, args=(theirs,), daemon=True)
    other.start()
    theirs.close()
    channel = ranks.RankChannel(ours, other)
    settings = EngineSettings(model=str(tmp_path / "none"), tensor_parallel_size=2)
    Ranks.first_of([channel]).tell(msgspec.msgpack.encode(Introduction(settings.model_dump_json(), port=1)))
    with pytest.raises(StartupError, match=r"none: no such folder; pass a checkpoint folder") as caught:
        channel.recv_bytes()
    assert "\n" not in str(caught.value)
    other.join(20)


@dataclass
class ParallelLab(Lab):
    """A lab of one engine, whose blocks have one size, and whose draft model drafts for every second request."""

    model_draft_length: int | None = 3

    def fresh_engine(self, *, block_size: int, num_blocks: int, **limits) -> Engine:
        num_blocks = num_blocks * block_size // 4
        made = super().fresh_engine(block_size=4, num_blocks=num_blocks, **limits)
        return RedirectingEngine(made.ready, made.runtime, made._scheduler, clock=lambda: 0.0)


def test_random_mixes_on_two_ranks_equal_naive_decoding(tmp_path: Path) -> None:
    """Grouped heads, a draft model of other sizes; prompts in chunks, all drafters, edits, log-probabilities."""
    full, draft = tmp_path / "full", tmp_path / "draft"
    make_checkpoint(full, num_layers=NUM_LAYERS, vocab=VOCAB, dtype=torch.float64)
    make_checkpoint(draft, num_layers=2, hidden=16, heads=2, kv_heads=2, vocab=VOCAB, seed=3)
    with two_ranks(shared_out(full, dtype="float64", draft_model=str(draft))) as engine:
        assert engine.ready.tensor_parallel_size == 2
        # Few, as ranks that share a core wait for each other; even ones, in which no choice depends on times.
        happened = check_mixes(ParallelLab({4: engine}, NaiveDecoder(full)), range(424, 433, 8))
        assert happened["model"] > 0


def test_two_ranks_in_float32_with_a_tied_head_say_what_one_process_says(tmp_path: Path) -> None:
    """Sums over ranks round differently; in so few tokens no choice is that close."""
    folder = make_checkpoint(tmp_path, num_layers=3, heads=4, kv_heads=4, vocab=98, tied=True)
    requests = [
        one_request(sequence_id=0),
        one_request(sequence_id=1, sampling=SamplingParams(temperature=0.8), seed=9, draft_length=2),
        one_request(sequence_id=2, prompt_ids=[1, 2, 3, 1, 2, 3] * 9, exit_layer=1, logprobs=2),
    ]
    alone = Engine.load(shared_out(folder, tensor_parallel_size=1)).generate(requests)
    with two_ranks(shared_out(folder)) as engine:
        assert tokens(engine.generate(requests)) == tokens(alone)
        drafted = [event for events in alone.values() for event in events]
        assert 0 < sum(event.kept for event in drafted) < sum(event.drafted for event in drafted)


class Said:
    """A channel to a rank that has said all it says."""

    def __init__(self, *frames: bytes) -> None:
        self.frames = [*frames]
        self.sent: list[bytes] = []

    def send_bytes(self, frame: bytes, /) -> None:
        self.sent.append(frame)

    def recv_bytes(self) -> bytes:
        return self.frames.pop(0)


def test_all_ranks_take_the_least_of_what_fits() -> None:
    one, other = Said(), Said()
    first = Ranks.first_of([one, other])
    for channel, numbers in ((one, (300, 90)), (other, (200, 95))):
        Ranks(Shard(1, 3), [told := Said(b"\x90")]).least(*numbers)
        channel.frames = told.sent
    own = Capacity(max_model_len=400, block_size=4, num_blocks=100)
    assert first.least_capacity(own) == Capacity(max_model_len=200, block_size=4, num_blocks=90)
    assert one.sent == other.sent != []


def test_memory_that_runs_out_on_one_rank_ends_it_rather_than_the_step() -> None:
    """The others are still in that step: a smaller one would never meet them."""

    class Full:
        def run(self, plan: Plan):
            raise torch.OutOfMemoryError

    with pytest.raises(OutOfStep):
        ParallelCycle(Full(), Ranks.first_of([Said()]), CPU).run(random_plan(np.random.default_rng(0)))
