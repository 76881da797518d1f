"""Steps with Triton's kernels recorded and replayed: as CUDA graphs, or on a CPU as tapes of interpreted kernels.

`test_attention_triton` runs this file in a process of its own, as `triton_checks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from config.setting_types import AttentionKind
from config.settings import EngineSettings
from decoding.attention_triton import TritonAttention
from decoding.engine import Engine
from decoding.graphed_cycle import GraphedCycle
from decoding.messages import Decoded, Drafter, Generate, SamplingParams
from decoding.ragged import Ragged
from tests.graph_engines import BLOCK_SIZE, watch
from tests.graph_tape import TapeRecorder
from tests.tiny import make_checkpoint
from tests.triton_checks import DEVICE, IS_INTERPRETED, SHAPES, Rows, _turns

LONGEST = 150
"""So long that contexts may be split."""


@pytest.fixture
def recorder() -> Iterator[TapeRecorder | None]:
    """None on CUDA, where graphs are made unasked. A launch of an interpreted kernel goes on the tape whole."""
    if not IS_INTERPRETED:
        yield None
        return
    tapes, launch = TapeRecorder(), GridExecutor.__call__

    def recorded(self: GridExecutor, *args: object, **kwargs: object) -> None:
        if tapes.tape is None or tapes.tape.is_paused:
            launch(self, *args, **kwargs)
            return
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        tapes.tape.call(lambda: launch(self, *args, **kwargs), tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", recorded)
        yield tapes


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # Of padding, which may be anything.
@pytest.mark.parametrize(("num_columns", "starts"), [(4, [300, 3, 126]), (33, [40, 3, 5])])
def test_padded_rows_are_attended_as_they_are_alone(num_columns: int, starts: list[int]) -> None:
    """Bit by bit where contexts are split; nearly where tiles are long. Of padding nothing is stored."""
    counts = [2, 3, num_columns]
    rows = Rows.random(SHAPES["three share"], starts, counts, dtype=torch.float32)
    alone, stored = rows.by_triton()
    shape, size = rows.shape, rows.block_size
    cache = rows._cache(torch.float32, DEVICE)
    turns_TF = _turns(shape.head_width, DEVICE)
    attention = TritonAttention(shape=shape, cache=cache, rotations_TF=turns_TF, block_size=size)
    tokens = Ragged.of(np.full(4, num_columns))
    arrangement = attention.arrange(tokens, np.zeros(4, dtype=np.int64))
    # The last row is padding altogether.
    contexts_BX = torch.zeros(4, 2 + 400 // size, dtype=torch.int32)
    contexts_BX[:3, 0] = torch.tensor(starts)
    contexts_BX[:3, 1] = torch.tensor(starts) + torch.tensor(counts)
    blocks_BW = torch.from_numpy(rows.slots_BT[:, ::size] // size)
    contexts_BX[:3, 2 : 2 + blocks_BW.shape[1]] = blocks_BW
    is_real_N = torch.from_numpy(tokens.steps_N < np.array([*counts, 0])[tokens.rows_N])
    qkv_NW = torch.full((len(is_real_N), rows.qkv_NW.shape[1]), torch.nan)
    qkv_NW[is_real_N] = rows.qkv_NW
    queries = attention.standing(arrangement, contexts_BX.to(DEVICE))
    attended_NW = attention.attend(1, qkv_NW.to(DEVICE), queries).double().cpu()
    tolerance = 0 if num_columns == 4 else 1e-6
    torch.testing.assert_close(attended_NW[is_real_N], alone, rtol=0, atol=tolerance)
    assert torch.equal(cache.layer(1).double().cpu().nan_to_num(), stored.nan_to_num())


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # Of padding, which may be anything.
def test_replayed_kernels_decode_the_same_tokens(tmp_path: Path, recorder: TapeRecorder | None) -> None:
    folder = make_checkpoint(tmp_path, num_layers=2, hidden=16, heads=2, kv_heads=1, vocab=31)
    replayed = Engine.load(settings_of(folder), recorder=recorder)
    eager = Engine.load(settings_of(folder, attention=AttentionKind.GATHER))
    cycle, attention = replayed.runtime.cycle, replayed.runtime.model.attention
    assert isinstance(cycle, GraphedCycle)
    assert isinstance(attention, TritonAttention)
    assert not isinstance(eager.runtime.cycle, GraphedCycle)
    if recorder is not None:
        watch(replayed, cycle.recorded, recorder)
    requests = [request(row) for row in range(2)]
    events = replayed.generate(requests)
    assert facts(events) == facts(eager.generate(requests))
    drafted, kept = (
        sum(getattr(event, name) for own in events.values() for event in own) for name in ("drafted", "kept")
    )
    assert 0 < kept < drafted
    assert cycle.recorded.graphs.num_recorded > 0


def facts(events: dict[int, list[Decoded]]) -> list[tuple[object, ...]]:
    return [(event.token_ids, event.drafted, event.kept) for own in events.values() for event in own]


def settings_of(folder: Path, **changes: object) -> EngineSettings:
    return EngineSettings(
        **{"model": str(folder), "dtype": "float32", "device": DEVICE.type, "num_threads": 1},
        **{"num_blocks": 80, "block_size": BLOCK_SIZE, "max_model_len": LONGEST, "max_draft_length": 4},
        **{"exit_layer": 1, "draft_length": 2, "max_num_seqs": 4},
        **({"attention": AttentionKind.TRITON} | changes),
    )


def request(row: int) -> Generate:
    """One that drafts; one that looks drafts up, sampled."""
    return Generate(
        sequence_id=row,
        prompt_ids=[5, 9, 2] if row == 0 else [1, 2, 3, 1, 2, 3, 1, 2],
        max_new_tokens=5,
        sampling=SamplingParams(temperature=0.6 * row),
        seed=row,
        stop_token_ids=[],
        drafter=Drafter.HYBRID if row == 1 else Drafter.EARLY_EXIT,
    )
