"""Two ranks that replay recorded steps record the same ones in the same order, and give one process's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch.distributed import TCPStore

from decoding.engine import Engine
from decoding.messages import SamplingParams
from decoding.noise import _mixed_ids
from decoding.parallel_linear import ProcessGroup
from decoding.parallel_rank import run_rank
from decoding.sharding import Shard
from server import ranks
from tests.graph_tape import TapeRecorder
from tests.mixes import one_request
from tests.tiny import make_checkpoint
from tests.two_ranks import VOCAB, shared_out, tokens, two_ranks


class Taped:
    """What ranks do together, on a tape where there is one: as a graph holds NCCL's calls."""

    def __init__(self, group: ProcessGroup, recorder: TapeRecorder) -> None:
        self._group = group
        self._recorder = recorder

    def add_up(self, part_NO: torch.Tensor) -> None:
        self._do(lambda: self._group.add_up(part_NO), [part_NO])

    def join(self, part_NP: torch.Tensor) -> torch.Tensor:
        whole_NO = part_NP.new_empty(len(part_NP), 2 * part_NP.shape[1])
        self._do(lambda: whole_NO.copy_(self._group.join(part_NP)), [part_NP, whole_NO])
        return whole_NO

    def _do(self, function, tensors: list[torch.Tensor]) -> None:
        tape = self._recorder.tape
        function() if tape is None else tape.call(function, tensors)


@dataclass
class Gathering:
    """Makes taped collectives."""

    recorder: TapeRecorder

    def __call__(self, store: TCPStore, shard: Shard, device: torch.device) -> Taped:
        return Taped(ProcessGroup(store, shard, device), self.recorder)


def strict_recorder() -> TapeRecorder:
    recorder = TapeRecorder()
    # Kept for every step, as graphs keep it.
    recorder.declared.append(_mixed_ids(VOCAB, torch.device("cpu")))
    return recorder


def taped_rank(connection: Connection) -> None:
    recorder = strict_recorder()
    with ranks.EndingAtOnce():
        run_rank(ranks._Channel(connection), rank=1, gather=Gathering(recorder), recorder=recorder)


def test_two_ranks_that_replay_say_what_one_process_says(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_layers=3, vocab=VOCAB, dtype=torch.float64)
    some = np.random.default_rng(1).integers(1, 60, size=(5, 9)).tolist()
    requests = [
        one_request(sequence_id=i, prompt_ids=ids, seed=i, draft_length=(0, 2, 3, 3, 1)[i], exit_layer=1)
        for i, ids in enumerate(some)
    ]
    sampled = SamplingParams(temperature=0.8)
    requests += [one_request(sequence_id=5, sampling=sampled, draft_length=2, exit_layer=1)]
    settings = shared_out(folder, dtype="float64", max_model_len=64, num_blocks=128, max_draft_length=4)
    alone = Engine.load(settings.model_copy(update={"tensor_parallel_size": 1})).generate(requests)
    recorder = strict_recorder()
    with two_ranks(settings, taped_rank, gather=Gathering(recorder), recorder=recorder) as engine:
        assert tokens(engine.generate(requests)) == tokens(alone)
        assert recorder.num_replays > 20
