"""Several ranks run one model: how they meet, agree on what fits, and run the same plans.

Knows ranks and what they tell each other; knows nothing of who starts them. The first rank schedules. It tells the
others each plan and nothing else: the same plan on the same bits comes to the same drafts and choices everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import torch

from config.errors import SettingsError
from config.settings import EngineSettings
from decoding.capacity import Capacity
from decoding.draft_checkpoint import Checkpoints
from decoding.parallel_linear import MakeCollectives, ProcessGroup, make_store
from decoding.parallel_plan import PlanReader, PlanWriter
from decoding.plan import Plan, Result
from decoding.sharding import WHOLE, Shard
from decoding.stepping import Runner
from decoding.weights import Placement

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]


class Channel(Protocol):
    """Carries frames to one other rank and back, whole and in order."""

    def send_bytes(self, frame: bytes, /) -> None:
        """Send a frame."""

    def recv_bytes(self) -> bytes:
        """Wait for the next frame. Raises StartupError if the other rank cannot start."""
        ...


class Introduction(msgspec.Struct, frozen=True):
    """What the first rank tells the others before anything else: what to load, and where they meet."""

    settings_json: str
    port: int


class OutOfStep(RuntimeError):
    """A rank could not finish a step in which the others wait for it: all of them must start anew."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that run one model. The first has a channel to each other, those one to it."""

    shard: Shard
    channels: Sequence[Channel]
    gather: MakeCollectives = ProcessGroup

    @classmethod
    def first_of(cls, channels: Sequence[Channel]) -> Ranks:
        """The first rank, which has these channels to the others."""
        return cls(Shard(0, 1 + len(channels)), channels)

    @property
    def leads(self) -> bool:
        """Whether this one schedules."""
        return self.shard.rank == 0

    def tell(self, frame: bytes) -> None:
        """Send this to all ranks there is a channel to."""
        for channel in self.channels:
            channel.send_bytes(frame)

    def hear(self) -> list[bytes]:
        """A frame of each rank there is a channel to. Raises StartupError if one cannot start."""
        return [channel.recv_bytes() for channel in self.channels]

    def least(self, *numbers: int) -> list[int]:
        """The least that any rank says, of each number; waits for all. Raises StartupError if one cannot start."""
        if not self.leads:
            self.tell(msgspec.msgpack.encode(numbers))
            return msgspec.msgpack.decode(self.hear()[0], type=list[int])
        heard = [msgspec.msgpack.decode(frame, type=list[int]) for frame in self.hear()]
        lowest = [min(each) for each in zip(numbers, *heard, strict=True)]
        self.tell(msgspec.msgpack.encode(lowest))
        return lowest

    def least_capacity(self, own: Capacity) -> Capacity:
        """What fits on every rank."""
        max_model_len, num_blocks = self.least(own.max_model_len, own.num_blocks)
        return replace(own, max_model_len=max_model_len, num_blocks=num_blocks)

    @property
    def are_one(self) -> bool:
        """Whether there is no other."""
        return self.shard.size == 1

    def introduce(
        self, settings: EngineSettings, checkpoints: Checkpoints, placement: Placement
    ) -> Placement:
        """As the first rank: tell the others what to load, and meet them where they are put."""
        if self.are_one:
            return placement
        store = make_store(None, self.shard.size)
        # What was found once is not looked for again: a hub may answer differently meanwhile.
        found: dict[str, object] = {"model": str(checkpoints.full.folder), "revision": None}
        if checkpoints.draft is not None:
            found["draft_model"] = str(checkpoints.draft.folder)
        same = settings.model_copy(update=found)
        self.tell(msgspec.msgpack.encode(Introduction(same.model_dump_json(), store.port)))
        return self.meet(store, placement)

    def meet(self, store: TCPStore, placement: Placement) -> Placement:
        """Wait for all, and let them put together what they compute. Raises StartupError if one cannot start."""
        self.least()
        if placement.device.type == "cuda":
            torch.cuda.set_device(placement.device)
        return replace(placement, collectives=self.gather(store, self.shard, placement.device))

    def together(self, own: Runner, device: torch.device) -> Runner:
        """What runs plans on all ranks: on the first, it tells the others."""
        return ParallelCycle(own, self, device) if self.leads and not self.are_one else own


ALONE: Final = Ranks(WHOLE, ())


def rank_device(device: torch.device, shard: Shard) -> torch.device:
    """The device of one rank: the CPU, or the CUDA device of its number. Raises SettingsError if there is none."""
    if device.type != "cuda" or shard.size == 1:
        return device
    num_devices = torch.cuda.device_count()
    if shard.size > num_devices:
        remedy = f"pass at most {num_devices}"
        raise SettingsError(
            f"tensor_parallel_size {shard.size}: torch finds {num_devices} CUDA devices; {remedy}"
        )
    return torch.device("cuda", shard.rank)


def rank_threads(num_threads: int, shard: Shard) -> int:
    """CPU threads of one rank, of those for all."""
    return max(1, num_threads // shard.size)


class ParallelCycle:
    """Runs plans as the first rank's part of all. Plans have their tensors on the host."""

    def __init__(self, own: Runner, ranks: Ranks, device: torch.device) -> None:
        self._own = own
        self._ranks = ranks
        self._writer = PlanWriter()
        self._reader = PlanReader(device)

    def run(self, plan: Plan) -> Result:
        """Compute the plan's tokens, on all ranks at once. Raises OutOfStep where memory runs out on this one."""
        frame = self._writer.write(plan)
        self._ranks.tell(frame)
        try:
            # Through the same bytes as on the other ranks, so that all see the same.
            return self._own.run(self._reader.read(frame))
        except torch.OutOfMemoryError as error:
            raise OutOfStep("memory ran out on one of several ranks: they start again together") from error
