"""A rank reads its share of a checkpoint and no more, and what ranks hold is the whole when put together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from config.errors import SettingsError
from config.settings import EngineSettings
from decoding.draft_checkpoint import Checkpoints
from decoding.parallel import rank_device, rank_threads
from decoding.sharding import Shard, check_shards
from decoding.tensor_files import DrawnTensors
from decoding.weights import Placement, load_weights
from tests.tiny import make_checkpoint
from tests.two_ranks import CPU, VOCAB, shared_out


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
    monkeypatch.setattr("decoding.tensor_files.safe_open", SpiedFile)
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
