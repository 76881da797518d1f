"""Matrices of which every rank holds a part: what each comes to is added up, or put side by side.

Knows matrices and what ranks do together; knows nothing of layers or plans. Afterwards all ranks hold the same
bits, so that whatever they choose from them is the same, too.

Shapes: N tokens, I inputs, O outputs, P outputs of one rank.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from decoding.linear import Linear
from decoding.sharding import Cut, Shard

if TYPE_CHECKING:
    # Some builds of torch have none, and serve one device as well as any.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_LONGEST_WAIT: Final = timedelta(minutes=10)
"""A rank that waits so long for the others ends. None is ever so late unless it hangs: they step together."""

_LOOPBACK: Final = "127.0.0.1"


class Collectives(Protocol):
    """What all ranks do together, each at the same point of its work and with tensors of the same shape."""

    def add_up(self, part_NO: Tensor) -> None:
        """Put the sum over all ranks in place of this rank's part."""

    def join(self, part_NP: Tensor) -> Tensor:
        """The parts of all ranks side by side, in the order of ranks: [N, O]."""
        ...


MakeCollectives = Callable[["TCPStore", Shard, torch.device], Collectives]
"""Makes this rank's, once all have the same store."""


class SummedLinear:
    """A matrix whose inputs are shared out: each rank multiplies what it has of both."""

    def __init__(self, own: Linear, collectives: Collectives) -> None:
        self._own = own
        self._collectives = collectives

    def __call__(self, x_NI: Tensor, /) -> Tensor:
        """Apply the whole matrix; `x_NI` is this rank's share of the inputs."""
        sum_NO = self._own(x_NI)
        self._collectives.add_up(sum_NO)
        return sum_NO


class JoinedLinear:
    """A matrix whose outputs are shared out and then given to all."""

    def __init__(self, own: Linear, collectives: Collectives) -> None:
        self._own = own
        self._collectives = collectives

    def __call__(self, x_NI: Tensor, /) -> Tensor:
        """Apply the whole matrix."""
        return self._collectives.join(self._own(x_NI))


def put_together(own: Linear, cut: Cut, collectives: Collectives | None) -> Linear:
    """The linear of a matrix of which this rank has its part. Without others it is the whole."""
    if collectives is None or cut is Cut.OUTPUTS:
        return own
    return SummedLinear(own, collectives) if cut is Cut.INPUTS else JoinedLinear(own, collectives)


class ProcessGroup:
    """The ranks of one model: processes of one machine, with NCCL among GPUs and gloo elsewhere."""

    def __init__(self, store: TCPStore, shard: Shard, device: torch.device) -> None:
        """Returns once all ranks are here."""
        self._size = shard.size
        is_cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=store,
            rank=shard.rank,
            world_size=shard.size,
            timeout=_LONGEST_WAIT,
            pg_options=None if is_cuda else _on_loopback(),
            device_id=device if is_cuda else None,
        )
        # The name until torch 2.12, and the one from then on.
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def add_up(self, part_NO: Tensor) -> None:
        """Put the sum over all ranks in place of this rank's part."""
        dist.all_reduce(part_NO)

    def join(self, part_NP: Tensor) -> Tensor:
        """The parts of all ranks side by side."""
        num_tokens, width = part_NP.shape
        gathered = part_NP.new_empty(self._size * num_tokens, width)
        self._gather(gathered, part_NP.contiguous())
        return gathered.view(self._size, num_tokens, width).transpose(0, 1).reshape(num_tokens, -1)


def make_store(port: int | None, size: int) -> TCPStore:
    """Where ranks find each other, on loopback alone: made by the first, on a free port, for the others."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if port is not None:
        return TCPStore(_LOOPBACK, port, size, is_master=False, timeout=_LONGEST_WAIT)
    listener = socket.create_server((_LOOPBACK, 0))
    return TCPStore(
        _LOOPBACK,
        listener.getsockname()[1],
        size,
        is_master=True,
        wait_for_workers=False,
        timeout=_LONGEST_WAIT,
        master_listen_fd=listener.detach(),
    )


def _on_loopback() -> object:
    """Else gloo listens wherever this machine's name leads."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    options._timeout = _LONGEST_WAIT
    return options
