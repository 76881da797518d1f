"""What a rank does that is not the first: it loads its share, then runs the plans it is told.

Knows a channel to the first rank; knows neither requests nor why a plan is as it is.
"""

from __future__ import annotations

from typing import NoReturn

import msgspec

from config.settings import EngineSettings
from decoding.draft_checkpoint import Checkpoints
from decoding.graphs import Recorder
from decoding.parallel import Channel, Introduction, Ranks
from decoding.parallel_linear import MakeCollectives, ProcessGroup, make_store
from decoding.parallel_plan import PlanReader
from decoding.runtime import build_runtime, place
from decoding.sharding import Shard


def run_rank(
    channel: Channel,
    *,
    rank: int,
    gather: MakeCollectives = ProcessGroup,
    recorder: Recorder | None = None,
) -> NoReturn:
    """Load, then run plans for ever. Raises StartupError if it cannot start."""
    introduction = msgspec.msgpack.decode(channel.recv_bytes(), type=Introduction)
    settings = EngineSettings.model_validate_json(introduction.settings_json)
    ranks = Ranks(Shard(rank, settings.tensor_parallel_size), (channel,), gather)
    checkpoints = Checkpoints.open(settings)
    placement = place(settings, checkpoints.full, ranks.shard)
    placement = ranks.meet(make_store(introduction.port, ranks.shard.size), placement)
    runtime, _ = build_runtime(settings, checkpoints, placement, ranks, lambda *_: None, recorder)
    reader = PlanReader(placement.device)
    while True:
        runtime.cycle.run(reader.read(channel.recv_bytes()))
