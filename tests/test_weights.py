"""A checkpoint whose weights cannot be used is refused in one line that names the file and the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoding.checkpoint import CheckpointError, open_checkpoint
from decoding.linear import DenseLinear, HalfStoredLinear
from decoding.model import Weights
from decoding.weights import Placement, load_weights
from tests.tiny import make_checkpoint

CPU = torch.device("cpu")
SOME_TENSOR = "model.layers.1.mlp.up_proj.weight"
EVERY_KIND = [
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    SOME_TENSOR,
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]

Progress = Callable[[str, float], None]


def read(folder: Path, progress: Progress = lambda *_: None, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(open_checkpoint(str(folder), revision=None), Placement(CPU, dtype), progress)


def refusal(folder: Path) -> str:
    """The one line that says why."""
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "single": make_checkpoint(tmp_path_factory.mktemp("single"), num_layers=2),
        "sharded": make_checkpoint(tmp_path_factory.mktemp("sharded"), num_layers=2, shards=True),
    }


@pytest.fixture
def single(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy with one safetensors file, to be spoilt."""
    return Path(shutil.copytree(originals["single"], tmp_path / "single"))


@pytest.fixture
def sharded(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy with several files and their index, to be spoilt."""
    return Path(shutil.copytree(originals["sharded"], tmp_path / "sharded"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], object]) -> dict[str, str]:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")
    return dict(index["weight_map"])


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_missing_tensor_is_named(single: Path, name: str) -> None:
    rewrite(single, lambda tensors: tensors.pop(name))
    message = refusal(single)
    assert name in message
    assert str(single) in message


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(single: Path, name: str) -> None:
    rewrite(single, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    found = list(load_file(single / "model.safetensors")[name].shape)
    message = refusal(single)
    assert f"{single / 'model.safetensors'}: tensor {name}" in message
    assert str(found) in message
    assert str([found[0] + 1, *found[1:]]) in message


def test_a_transposed_square_tensor_is_all_that_passes_as_another(single: Path) -> None:
    """A one-dimensional tensor of the right count is not broadcast into a matrix."""
    rewrite(single, lambda tensors: tensors.update({SOME_TENSOR: tensors[SOME_TENSOR].flatten()}))
    assert SOME_TENSOR in refusal(single)


def test_a_config_that_promises_more_layers_than_there_are_names_the_first_missing(single: Path) -> None:
    path = single / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    assert "model.layers.2." in refusal(single)


def test_an_untied_checkpoint_without_a_head_is_not_served_with_its_embedding(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(single)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_and_never_opened(single: Path, pickled: str) -> None:
    (single / "model.safetensors").unlink()
    # Loading this as a pickle would fail in another way than the one expected.
    (single / pickled).write_bytes(b"not even a pickle")
    message = refusal(single)
    assert pickled in message
    assert "pickle" in message
    assert "model.safetensors" in message


def test_a_folder_without_weights_says_what_it_lacks(single: Path) -> None:
    (single / "model.safetensors").unlink()
    message = refusal(single)
    assert str(single) in message
    assert "model.safetensors" in message


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_a_truncated_file_is_named(single: Path, kept_bytes: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert str(path) in refusal(single)


def test_a_file_that_is_no_safetensors_file_is_named(single: Path) -> None:
    (single / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 12\n")
    assert str(single / "model.safetensors") in refusal(single)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    message = refusal(sharded)
    assert str(gone) in message
    assert "missing" in message


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    short = sorted(sharded.glob("model-*.safetensors"))[-1]
    short.write_bytes(short.read_bytes()[:-8])
    assert str(short) in refusal(sharded)


def test_a_tensor_that_the_index_lacks_is_named(sharded: Path) -> None:
    rewrite_index(sharded, lambda files: files.pop(SOME_TENSOR))
    assert SOME_TENSOR in refusal(sharded)


def test_a_tensor_that_its_shard_lacks_is_named_with_the_shard(sharded: Path) -> None:
    files = rewrite_index(sharded, lambda _: None)
    other = next(file for file in sorted(set(files.values())) if file != files[SOME_TENSOR])
    rewrite_index(sharded, lambda files: files.update({SOME_TENSOR: other}))
    message = refusal(sharded)
    assert SOME_TENSOR in message
    assert str(sharded / other) in message


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\x00"], ids=repr
)
def test_an_index_that_is_none_is_refused_in_one_line(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    assert str(sharded) in refusal(sharded)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_weights_that_are_not_floating_point_are_not_read_as_if_they_were(
    single: Path, dtype: torch.dtype
) -> None:
    """Quantised tensors without their scales would load without a word and give noise."""
    rewrite(single, lambda tensors: tensors.update({SOME_TENSOR: tensors[SOME_TENSOR].to(dtype)}))
    assert SOME_TENSOR in refusal(single)


def test_tensors_the_model_does_not_need_are_ignored(single: Path) -> None:
    """Old checkpoints carry rotary frequencies of their own."""
    rewrite(
        single,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    assert len(read(single).layers) == 2


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_progress_grows_to_one(originals: dict[str, Path], kind: str) -> None:
    seen: list[tuple[str, float]] = []
    read(originals[kind], lambda stage, fraction: seen.append((stage, fraction)))
    assert seen == [("weights", 0.5), ("weights", 1.0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_come_in_the_dtype_asked_for(originals: dict[str, Path], dtype: torch.dtype) -> None:
    weights = read(originals["single"], dtype=dtype)
    stored = load_file(originals["single"] / "model.safetensors")
    assert torch.equal(weights.embedding_VD, stored["model.embed_tokens.weight"].to(dtype))
    assert weights.head(torch.ones(1, 32, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("vocab", [24, 97])
@pytest.mark.parametrize("shares_tied", [False, True])
def test_a_tied_head_lies_in_memory_once_where_that_is_asked_for(
    tmp_path: Path, vocab: int, shares_tied: bool
) -> None:
    """Whichever of its sides is the longer; what is read from either place is the same."""
    folder = make_checkpoint(tmp_path, num_layers=1, vocab=vocab, tied=True)
    placement = Placement(CPU, torch.float64, shows_head=True, shares_tied=shares_tied)
    weights = load_weights(open_checkpoint(str(folder), revision=None), placement, lambda *_: None)
    head, embedding_VD = weights.head, weights.embedding_VD
    assert isinstance(head, DenseLinear)
    stored_VD = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].double()
    assert torch.equal(embedding_VD, stored_VD)
    assert torch.equal(head.weight_OI, stored_VD)
    assert weights.head_rows_VD is embedding_VD
    assert (address(embedding_VD) == address(head.weight_OI)) is shares_tied
    ids = torch.tensor([3, 0, vocab - 1, 3])
    assert torch.equal(F.embedding(ids, embedding_VD), stored_VD[ids])


def test_heads_that_are_not_the_embedding_or_in_another_form_are_not_shared(tmp_path: Path) -> None:
    for tied, dtype, form in ((False, torch.float64, DenseLinear), (True, torch.float32, HalfStoredLinear)):
        folder = make_checkpoint(tmp_path / str(tied), num_layers=1, tied=tied, dtype=torch.bfloat16)
        placement = Placement(CPU, dtype, shares_tied=True)
        weights = load_weights(open_checkpoint(str(folder), revision=None), placement, lambda *_: None)
        assert isinstance(weights.head, form)
        stored = load_file(folder / "model.safetensors")
        assert torch.equal(weights.embedding_VD, stored["model.embed_tokens.weight"].to(dtype))


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
