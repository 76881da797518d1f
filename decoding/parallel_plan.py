"""Plans as bytes: how they come to every rank that runs a model.

Knows plans and what is kept from one to the next; knows nothing of who carries the bytes. What seldom changes is
not sent again: the sampling columns of a batch that stays, the edits of a request that goes on.

Shapes: B rows, T ids that stand before a token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import msgspec
import numpy as np
import torch
from torch import Tensor

from decoding.edits import Edited, Editor, Known
from decoding.logits import Sampling
from decoding.messages import SamplingParams
from decoding.plan import Plan

_HOST: Final = torch.device("cpu")


class _EditedRow(msgspec.Struct, frozen=True, array_like=True):
    """`editor` is None where the sequence had one in the plan before: it is the same."""

    editor: Editor | None
    known: Known


class _Frame(msgspec.Struct, frozen=True, array_like=True):
    """A plan. `plan` itself comes without sampling columns and edits; no `sampling` says that it is the last."""

    plan: Plan
    sampling: Sampling | None
    edited: list[_EditedRow | None]


class PlanWriter:
    """Writes plans whose tensors lie on the host, for readers that read all of them in order."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_as_bytes)
        self._no_sampling = Sampling.of([SamplingParams()], [0], _HOST)
        self._sampling: Sampling | None = None
        self._editors: dict[int, Editor] = {}

    def write(self, plan: Plan) -> bytes:
        """The plan, and what the plan before did not say."""
        frame = _Frame(
            plan=replace(plan, sampling=self._no_sampling, edited=()),
            sampling=None if plan.sampling is self._sampling else plan.sampling,
            edited=list(map(self._edited, plan.sequence_ids, plan.edited)),
        )
        self._sampling = plan.sampling
        self._editors = _editors(plan)
        return self._encoder.encode(frame)

    def _edited(self, sequence_id: int, edited: Edited | None) -> _EditedRow | None:
        if edited is None:
            return None
        is_known = self._editors.get(sequence_id) is edited.editor
        return _EditedRow(None if is_known else edited.editor, edited.known)


class PlanReader:
    """Reads all plans of one writer, in order, with their tensors on a device."""

    def __init__(self, device: torch.device) -> None:
        def from_bytes(kind: type, sent: object) -> object:
            array = _array(sent)
            return torch.from_numpy(array).to(device) if kind is Tensor else array

        self._decoder = msgspec.msgpack.Decoder(_Frame, dec_hook=from_bytes)
        self._sampling: Sampling | None = None
        self._editors: dict[int, Editor] = {}

    def read(self, sent: bytes) -> Plan:
        """The plan; equal sampling columns and editors are the same objects as in the plan before."""
        frame = self._decoder.decode(sent)
        sampling = frame.sampling or self._sampling
        assert sampling is not None
        edited = tuple(map(self._edited, frame.plan.sequence_ids, frame.edited))
        plan = replace(frame.plan, sampling=sampling, edited=edited)
        self._sampling = sampling
        self._editors = _editors(plan)
        return plan

    def _edited(self, sequence_id: int, row: _EditedRow | None) -> Edited | None:
        return None if row is None else Edited(row.editor or self._editors[sequence_id], row.known)


def _editors(plan: Plan) -> dict[int, Editor]:
    """Of its rows that have edits, by sequence."""
    rows = zip(plan.sequence_ids, plan.edited, strict=True)
    return {sequence_id: edited.editor for sequence_id, edited in rows if edited is not None}


def _as_bytes(value: object) -> tuple[str, tuple[int, ...], bytes]:
    array = value.numpy() if isinstance(value, Tensor) else value
    assert isinstance(array, np.ndarray)
    return array.dtype.str, array.shape, array.tobytes()


def _array(sent: object) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    assert isinstance(sent, list)
    kind, shape, content = sent
    # Bytes could not be written to, which torch warns of.
    return np.frombuffer(bytearray(content), dtype=kind).reshape(shape)
