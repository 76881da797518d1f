"""A model that two ranks run together gives the tokens of one process, and reads no more than its share.

Two processes on the CPU, with gloo between them: this one is the first rank.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from config.errors import SettingsError, StartupError
from config.settings import EngineSettings
from decoding.capacity import Capacity
from decoding.draft_checkpoint import Checkpoints
from decoding.engine import Engine
from decoding.graphs import Recorder
from decoding.messages import SamplingParams
from decoding.parallel import Introduction, OutOfStep, ParallelCycle, Ranks, rank_device, rank_threads
from decoding.parallel_linear import MakeCollectives, ProcessGroup
from decoding.plan import Plan
from decoding.sharding import Shard, check_shards
from decoding.weights import DrawnTensors, Placement, load_weights
from server import ranks
from tests.mixes import MAX_LEN, NUM_LAYERS, Lab, check_mixes, one_request
from tests.oracle import NaiveDecoder
from tests.test_draft_model import RedirectingEngine
from tests.test_parallel_plan import random_plan
from tests.tiny import make_checkpoint

CPU = torch.device("cpu")
VOCAB = 62
"""Even, and no less than what mixes ask for."""


class PlainChannel:
    """The first rank's channel in a test: nothing here ends because the other does."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.num_sent_bytes = 0

    def send_bytes(self, frame: bytes, /) -> None:
        self.num_sent_bytes += len(frame)
        self._connection.send_bytes(frame)

    def recv_bytes(self) -> bytes:
        frame = self._connection.recv_bytes()
        assert frame[:1] == b"f", frame
        return frame[1:]


# Other ranks are forks of a process that has imported what takes long.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "decoding.parallel_rank"])


def other_rank(connection: Connection) -> None:
    ranks.main(connection, 1, os.getppid())


@contextmanager
def two_ranks(
    settings: EngineSettings,
    other_rank: Callable[[Connection], None] = other_rank,
    *,
    gather: MakeCollectives = ProcessGroup,
    recorder: Recorder | None = None,
) -> Iterator[Engine]:
    """An engine whose other half runs in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    other = FORKS.Process(target=other_rank, args=(theirs,), daemon=True)
    other.start()
    theirs.close()
    try:
        first = Ranks(Shard(0, 2), [PlainChannel(ours)], gather)
        yield Engine.load(settings, ranks=first, recorder=recorder)
    finally:
        ours.close()
        other.join(20)
        if dist.is_initialized():
            dist.destroy_process_group()
        assert other.exitcode == 0


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


def shared_out(folder: Path, **more: object) -> EngineSettings:
    """Settings of an engine with two ranks that measures nothing at its start."""
    sizes = {"block_size": 4, "num_blocks": 512, "max_model_len": MAX_LEN, "num_threads": 1}
    fixed = {"exit_layer": 2, "draft_length": 2, "device": "cpu", "tensor_parallel_size": 2}
    return EngineSettings(model=str(folder), **(sizes | fixed | more))


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
        # Few, as ranks that share a core wait for each other.
        happened = check_mixes(ParallelLab({4: engine}, NaiveDecoder(full)), range(405, 433, 27))
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


def tokens(events: dict[int, list]) -> dict[int, list[int]]:
    return {i: [token for event in own for token in event.token_ids] for i, own in events.items()}


class SpiedFile:
    """A safetensors file that counts what is read of each tensor."""

    num_read: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, *arguments: object, **options: object) -> None:
        self._file = safe_open(*arguments, **options)

    def __enter__(self) -> SpiedFile:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def keys(self) -> list[str]:
        return self._file.keys()

    def get_slice(self, name: str) -> SpiedSlice:
        return SpiedSlice(name, self._file.get_slice(name))


class SpiedSlice:
    def __init__(self, name: str, stored) -> None:
        self._name = name
        self._stored = stored
        self.get_dtype, self.get_shape = stored.get_dtype, stored.get_shape

    def __getitem__(self, key) -> torch.Tensor:
        read = self._stored[key]
        SpiedFile.num_read[self._name] = SpiedFile.num_read.get(self._name, 0) + read.numel()
        return read


class NoOthers:
    """Collectives that leave each rank with its own part."""

    def add_up(self, part_NO: torch.Tensor) -> None:
        return

    def join(self, part_NP: torch.Tensor) -> torch.Tensor:
        return part_NP


@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_reads_its_share_of_every_matrix_and_no_more(tmp_path: Path, monkeypatch, tied: bool) -> None:
    folder = make_checkpoint(tmp_path, num_layers=1, vocab=VOCAB, tied=tied)
    SpiedFile.num_read = {}
    monkeypatch.setattr("decoding.weights.safe_open", SpiedFile)
    [checkpoint] = Checkpoints.open(EngineSettings(model=str(folder))).all
    placement = Placement(CPU, torch.float64, shard=Shard(1, 2), collectives=NoOthers())
    load_weights(checkpoint, placement, lambda *_: None)
    with safe_open(folder / "model.safetensors", "pt") as file:
        whole = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    embedding = "model.embed_tokens.weight"
    for name, count in SpiedFile.num_read.items():
        expected = whole[name] if "norm" in name or name == embedding else whole[name] // 2
        # A tied head is read once more, as a share.
        assert count == expected + (whole[name] // 2 if tied and name == embedding else 0), name
    assert SpiedFile.num_read.keys() == whole.keys()


class Adding:
    """Collectives of ranks that take turns: the sum and the row of what all have given so far."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def add_up(self, part_NO: torch.Tensor) -> None:
        self.parts.append(part_NO.clone())

    def join(self, part_NP: torch.Tensor) -> torch.Tensor:
        self.parts.append(part_NP)
        return part_NP


@pytest.mark.parametrize("drawn", [None, DrawnTensors()])
def test_shares_put_together_are_the_whole_matrix(tmp_path: Path, drawn: DrawnTensors | None) -> None:
    """Of files, and of drawn weights, which are those of one process whatever the number of ranks."""
    folder = make_checkpoint(tmp_path, num_layers=1, vocab=VOCAB, mlp=48, dtype=torch.float64)
    [checkpoint] = Checkpoints.open(EngineSettings(model=str(folder))).all

    def load(placement: Placement):
        return load_weights(checkpoint, placement, lambda *_: None)

    whole = load(Placement(CPU, torch.float64, drawn=drawn))
    collectives = Adding()
    halves = [
        load(Placement(CPU, torch.float64, drawn=drawn, shard=Shard(r, 2), collectives=collectives))
        for r in (0, 1)
    ]
    x_ND = torch.randn(3, 32, dtype=torch.float64)
    x_NI = torch.randn(3, 48, dtype=torch.float64)
    for half, own_NI in zip(halves, x_NI.chunk(2, -1), strict=True):
        half.layers[0].down(own_NI)
    assert torch.allclose(sum(collectives.parts), whole.layers[0].down(x_NI))
    collectives.parts.clear()
    for half in halves:
        half.head(x_ND)
    assert torch.allclose(torch.cat(collectives.parts, -1), whole.head(x_ND))
    heads = torch.cat([half.layers[0].qkv(x_ND)[:, :16] for half in halves], -1)
    assert torch.allclose(heads, whole.layers[0].qkv(x_ND)[:, :32])


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({}, {"hidden": 36, "heads": 3, "kv_heads": 3}, ["has 3 attention heads", "pass 1"]),
        ({}, {"kv_heads": 1}, ["has 1 key/value heads", "pass 1"]),
        ({}, {"mlp": 55}, ["has 55 columns of the MLP"]),
        ({}, {"vocab": 61}, ["has 61 tokens of the vocabulary"]),
        ({"tensor_parallel_size": 4}, {}, ["tensor_parallel_size 4", "2 key/value heads", "pass 2, or 1"]),
        ({"compile_layers": True}, {}, ["compile_layers", "leave one of the two out"]),
        ({"loader": "accelerate"}, {}, ["loader accelerate"]),
        ({"draft_vocab_size": 9}, {}, ["draft_vocab_size"]),
        ({"device": "cuda:1"}, {}, ["cuda:1", "CUDA_VISIBLE_DEVICES"]),
        ({}, {}, ["`layerskip serve`"]),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_one_line(
    tmp_path: Path, changes: dict, shape: dict, words: list[str]
) -> None:
    """The last of them only because no other rank was started."""
    folder = make_checkpoint(tmp_path, num_layers=2, **({"vocab": VOCAB} | shape))
    settings = shared_out(folder, **changes)
    with pytest.raises(SettingsError) as caught:
        check_shards(settings, Checkpoints.open(settings).all, Shard(0, 1))
    message = str(caught.value)
    assert "\n" not in message
    for word in ("tensor_parallel_size", *words):
        assert word in message


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"tensor_parallel_size 99: torch finds \d+ CUDA devices"):
        rank_device(torch.device("cuda"), Shard(0, 99))
    assert rank_device(CPU, Shard(3, 4)) == CPU


def test_ranks_share_the_threads_of_one() -> None:
    assert [rank_threads(8, Shard(0, size)) for size in (1, 3, 4, 16)] == [8, 2, 2, 1]


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
