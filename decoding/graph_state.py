"""What recorded steps read and write: tensors that stay where they are, and how a plan gets into them.

Knows plans and places in memory; knows no model and nothing of how work is recorded.

Shapes: R rows at most, B rows of a step with padding, Q tokens of a row at most, W blocks of a row, X = 2 + W,
D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

import numpy as np
import torch
from torch import Tensor

from config.settings import EngineSettings
from decoding.capacity import Capacity
from decoding.logits import Sampling
from decoding.plan import Plan
from decoding.ragged import Ints

_START_LENGTH: Final = 2
"""Numbers before the blocks of a row in its context."""


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """The most that recorded steps hold: rows, tokens of a row and of all rows, blocks of a row.

    Entries of block tables that are no row's say `trash_block`, which no row owns.
    """

    num_rows: int
    num_columns: int
    num_tokens: int
    num_blocks: int
    block_size: int
    trash_block: int


def graph_sizes(settings: EngineSettings, capacity: Capacity) -> GraphSizes:
    """What steps of an engine may come to; padding may reach behind the longest context."""
    return GraphSizes(
        num_rows=settings.max_num_seqs,
        num_columns=1 + settings.max_draft_length,
        num_tokens=settings.max_num_batched_tokens,
        num_blocks=-(-capacity.num_positions // capacity.block_size),
        block_size=capacity.block_size,
        trash_block=capacity.num_blocks,
    )


class Choosing(Enum):
    """What choosing must do for some row at least."""

    GREEDY = "greedy"
    SAMPLED = "sampled"
    FILTERED = "filtered"

    @classmethod
    def of(cls, sampling: Sampling) -> Choosing:
        """The least that is enough."""
        if not sampling.any_sampled:
            return cls.GREEDY
        return cls.FILTERED if sampling.any_truncated or sampling.any_min_p else cls.SAMPLED


@dataclass(frozen=True, slots=True)
class Columns:
    """The first B rows. Row b has `counts_B[b]` tokens from position `starts_B[b]` on, 0 if it is padding;
    after token i < `made_B[b]` stands a draft that is made in the step.

    `ids_BQ` are known tokens and drafts, `exits_BQD` what left the early layers for them, `contexts_BX` what the
    attention is told, `column_1` the token that a draft step is at.
    """

    column_1: Tensor
    starts_B: Tensor
    counts_B: Tensor
    made_B: Tensor
    ids_BQ: Tensor
    exits_BQD: Tensor
    contexts_BX: Tensor
    sampling: Sampling
    result_BP: Tensor


class GraphState:
    """Static tensors of one device, and what the host knows of their content. One writer: the step's upload."""

    def __init__(self, sizes: GraphSizes, *, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._sizes = sizes
        self._device = device
        rows, columns = sizes.num_rows, sizes.num_columns
        is_cuda = device.type == "cuda"
        # One piece, so that one copy brings all of a step: the column, three numbers of each row, ids.
        num_numbers = 1 + 3 * rows + rows * columns
        self._host = torch.zeros(num_numbers, dtype=torch.int64, pin_memory=is_cuda)
        self._numbers = torch.zeros(num_numbers, dtype=torch.int64, device=device)
        self._exits_RQD = torch.zeros(rows, columns, width, dtype=dtype, device=device)
        self._contexts_RX = torch.zeros(
            rows, _START_LENGTH + sizes.num_blocks, dtype=torch.int32, device=device
        )
        self._contexts_RX[:, _START_LENGTH:] = sizes.trash_block
        self._blocks_RW: Ints = np.full((rows, sizes.num_blocks), sizes.trash_block, dtype=np.int64)
        self._num_wide = 0
        self._result_RP = torch.zeros(rows, 1 + columns, dtype=torch.int64, device=device)
        self._sampling = _idle_sampling(rows, device)
        self._sampled: Sampling | None = None

    def first(self, num_rows: int, choosing: Choosing) -> Columns:
        """Views of the first rows, which choose in this way."""
        rows, columns = self._sizes.num_rows, self._sizes.num_columns
        starts, counts, made = self._numbers[1 : 1 + 3 * rows].view(3, rows)[:, :num_rows].unbind(0)
        return Columns(
            column_1=self._numbers[:1],
            starts_B=starts,
            counts_B=counts,
            made_B=made,
            ids_BQ=self._numbers[1 + 3 * rows :].view(rows, columns)[:num_rows],
            exits_BQD=self._exits_RQD[:num_rows],
            contexts_BX=self._contexts_RX[:num_rows],
            sampling=_choosing(self._sampling.first(num_rows), choosing),
            result_BP=self._result_RP[:num_rows],
        )

    def rest(self) -> None:
        """Let all rows be padding: work that is done now stores nothing that matters."""
        self._numbers.zero_()

    def upload(self, plan: Plan, num_rows: int) -> None:
        """Bring a plan to the device, padded to so many rows. All its rows have one pending token."""
        real, rows, columns = plan.num_rows, self._sizes.num_rows, self._sizes.num_columns
        host = self._host.numpy()
        host.fill(0)
        starts, counts, made = host[1 : 1 + 3 * rows].reshape(3, rows)
        starts[:real] = plan.num_computed_B
        counts[:real] = 1 + plan.num_drafts_B
        made[:real] = plan.draft_lengths_B
        ids_RQ = host[1 + 3 * rows :].reshape(rows, columns)[:real]
        ids_RQ[np.arange(columns) < plan.num_fed_B[:, None]] = plan.fed_N
        used = 1 + 3 * rows + num_rows * columns
        self._numbers[:used].copy_(self._host[:used], non_blocking=True)
        self._upload_blocks(plan)
        if plan.sampling.any_sampled and self._sampled is not plan.sampling:
            self._upload_sampling(plan.sampling, real)

    def download(self, num_rows: int, num_columns: int) -> list[list[int]]:
        """Of each row how many drafts it keeps, then its choices. The step's one copy from the device."""
        rows: list[list[int]] = self._result_RP[:num_rows, : 1 + num_columns].tolist()
        return rows

    def _upload_blocks(self, plan: Plan) -> None:
        """Send the entries of block tables that differ: a row's change once in a block's worth of tokens."""
        ends_B = plan.num_computed_B + 1 + plan.num_drafts_B
        num_own_B = -(-ends_B // self._sizes.block_size)
        width = plan.blocks_BW.shape[1]
        num_wide = max(width, self._num_wide)
        wanted_RW = np.full_like(self._blocks_RW[:, :num_wide], self._sizes.trash_block)
        is_own_BW = np.arange(width) < num_own_B[:, None]
        wanted_RW[: plan.num_rows, :width][is_own_BW] = plan.blocks_BW[is_own_BW]
        rows, places = (wanted_RW != self._blocks_RW[:, :num_wide]).nonzero()
        if len(rows):
            flat = rows * self._contexts_RX.shape[1] + _START_LENGTH + places
            changes = torch.from_numpy(np.stack((flat, wanted_RW[rows, places])))
            changes = changes.to(self._device, non_blocking=True)
            self._contexts_RX.view(-1).index_copy_(0, changes[0], changes[1].int())
        # Not before the device has them: it may have had no memory for the changes.
        self._blocks_RW[:, :num_wide] = wanted_RW
        self._num_wide = width

    def _upload_sampling(self, sampling: Sampling, num_rows: int) -> None:
        own = self._sampling.first(num_rows)
        self._sampling.temperatures_N.zero_()
        own.temperatures_N.copy_(sampling.temperatures_N)
        own.top_ks_N.copy_(sampling.top_ks_N)
        own.top_ps_N.copy_(sampling.top_ps_N)
        own.min_ps_N.copy_(sampling.min_ps_N)
        own.keys_2N.copy_(sampling.keys_2N)
        self._sampled = sampling


def _choosing(sampling: Sampling, choosing: Choosing) -> Sampling:
    """The same columns, with everything skipped that this way of choosing does not need."""
    is_filtered = choosing is Choosing.FILTERED
    return replace(
        sampling,
        any_sampled=choosing is not Choosing.GREEDY,
        any_truncated=is_filtered,
        any_top_k=is_filtered,
        any_min_p=is_filtered,
    )


def _idle_sampling(num_rows: int, device: torch.device) -> Sampling:
    """Columns of rows that are greedy; they are `any_sampled` so that slices of them are taken."""
    zeros_R = torch.zeros(num_rows, dtype=torch.float64, device=device)
    return Sampling(
        temperatures_N=zeros_R,
        top_ks_N=torch.zeros(num_rows, dtype=torch.int64, device=device),
        top_ps_N=torch.ones_like(zeros_R),
        min_ps_N=torch.zeros_like(zeros_R),
        keys_2N=torch.zeros(2, num_rows, dtype=torch.int32, device=device),
        any_sampled=True,
        all_sampled=False,
        any_truncated=True,
        any_top_k=True,
        any_min_p=True,
        on_host=False,
    )
