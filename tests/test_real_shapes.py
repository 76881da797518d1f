"""Published LayerSkip checkpoints, known by their sizes: memory, profiles, and decoding in their shape."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from config.profiles import find_profile
from config.setting_types import LoadFormat
from config.settings import EngineSettings
from decoding.attention import AttentionShape
from decoding.capacity import weight_bytes
from decoding.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from decoding.engine import Engine
from decoding.kv_cache import slot_bytes
from decoding.messages import Generate, SamplingParams
from decoding.tensor_files import DrawnTensors
from decoding.weights import Placement, load_weights
from tests.mixes import one_request
from tests.tiny import load_reference, make_checkpoint

NUM_NEW = 8


@dataclass(frozen=True)
class Published:
    """Sizes of a checkpoint on the hub, and what they come to."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    positions: int
    num_parameters: int
    kv_bytes: int
    theta: float = 10000.0
    tied: bool = False
    scaling: dict[str, object] = field(default_factory=dict)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def config(self) -> dict[str, object]:
        """config.json as releases of those years wrote it."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "rope_scaling": self.scaling or None,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }


LLAMA32_ROPE: dict[str, object] = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KIB = 1024
PUBLISHED = {
    "facebook/layerskip-llama2-7B": Published(
        32, 4096, 32, 32, 11008, 32000, 4096, num_parameters=6_738_415_616, kv_bytes=512 * KIB
    ),
    "facebook/layerskip-llama2-13B": Published(
        40, 5120, 40, 40, 13824, 32000, 4096, num_parameters=13_015_864_320, kv_bytes=800 * KIB
    ),
    "facebook/layerskip-llama2-70B": Published(
        80, 8192, 64, 8, 28672, 32000, 4096, num_parameters=68_976_648_192, kv_bytes=320 * KIB
    ),
    "facebook/layerskip-codellama-7B": Published(
        32, 4096, 32, 32, 11008, 32016, 16384, 6_738_546_688, kv_bytes=512 * KIB, theta=1e6
    ),
    "facebook/layerskip-codellama-34B": Published(
        48, 8192, 64, 8, 22016, 32000, 16384, 33_743_970_304, kv_bytes=192 * KIB, theta=1e6
    ),
    "facebook/layerskip-llama3-8B": Published(
        32, 4096, 32, 8, 14336, 128256, 8192, 8_030_261_248, kv_bytes=128 * KIB, theta=5e5
    ),
    "facebook/layerskip-llama3.2-1B": Published(
        16,
        2048,
        32,
        8,
        8192,
        128256,
        131072,
        num_parameters=1_235_814_400,
        kv_bytes=32 * KIB,
        theta=5e5,
        tied=True,
        scaling=LLAMA32_ROPE,
    ),
}

every_checkpoint = pytest.mark.parametrize("name", PUBLISHED)


def opened(folder: Path, published: Published) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(published.config()))
    return open_checkpoint(str(folder), revision=None)


@every_checkpoint
def test_weights_and_cache_take_the_memory_that_their_sizes_say(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    checkpoint = opened(tmp_path, published)
    # A tied head is held beside the embedding. transformers' model also holds the frequencies of its rotations.
    copied = published.vocab * published.width if published.tied else 0
    weights = 2 * (published.num_parameters + copied)
    assert weights <= weight_bytes(checkpoint, torch.bfloat16) <= weights + KIB
    sizes = checkpoint.shape
    shape = AttentionShape(sizes.num_heads, sizes.num_kv_heads, sizes.head_width)
    held = slot_bytes(num_layers=sizes.num_layers, slot_width=shape.slot_width, dtype=torch.bfloat16)
    assert held == published.kv_bytes


@every_checkpoint
def test_config_is_read_as_it_was_meant(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    checkpoint = opened(tmp_path, published)
    sizes = checkpoint.shape
    assert sizes.head_width == published.head_width
    assert (sizes.num_layers, sizes.max_positions) == (published.layers, published.positions)
    assert (sizes.is_head_tied, sizes.stored_dtype) == (published.tied, "bfloat16")
    rope = checkpoint.config.rope_parameters
    assert rope["rope_theta"] == published.theta
    assert rope["rope_type"] == published.scaling.get("rope_type", "default")
    assert {key: rope[key] for key in published.scaling} == published.scaling


@every_checkpoint
def test_it_has_a_profile_that_its_layers_allow(name: str) -> None:
    profile = find_profile(name)
    assert profile is not None
    assert profile.exit_layer < PUBLISHED[name].layers
    assert profile.draft_length > 0


@every_checkpoint
def test_its_heads_and_rotations_decode_like_transformers(name: str, tmp_path: Path) -> None:
    """All heads, their width, RoPE and head tying of the checkpoint; fewer layers and narrower ones."""
    published = PUBLISHED[name]
    folder = make_checkpoint(
        tmp_path,
        num_layers=3,
        hidden=published.heads,
        heads=published.heads,
        kv_heads=published.kv_heads,
        head_dim=published.head_width,
        vocab=61,
        tied=published.tied,
        rope_parameters={"rope_type": "default", "rope_theta": published.theta} | published.scaling,
        dtype=torch.float64,
    )
    prompt = [7, 3, 11, 5, 2, 19]
    settings = EngineSettings(
        model=str(folder),
        dtype="float64",
        device="cpu",
        num_threads=1,
        num_blocks=8,
        max_model_len=64,
        exit_layer=2,
        draft_length=3,
    )
    request = Generate(
        sequence_id=0,
        prompt_ids=prompt,
        max_new_tokens=NUM_NEW,
        sampling=SamplingParams(temperature=0.0),
        seed=0,
        stop_token_ids=[],
    )
    events = Engine.load(settings).generate([request])[0]
    assert sum(event.drafted for event in events) > 0
    assert [t for event in events for t in event.token_ids] == greedy(folder, prompt)


@torch.inference_mode()
def greedy(folder: Path, prompt: list[int]) -> list[int]:
    """transformers' most likely tokens, every one computed from the whole text."""
    reference = load_reference(folder, torch.float64)
    ids = list(prompt)
    for _ in range(NUM_NEW):
        ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def dummy(folder: Path) -> EngineSettings:
    return EngineSettings(
        model=str(folder),
        load_format=LoadFormat.DUMMY,
        device="cpu",
        num_threads=1,
        num_blocks=8,
        max_model_len=64,
        exit_layer=2,
        draft_length=3,
    )


def without_weights(folder: Path) -> Path:
    """A checkpoint's configuration and tokenizer."""
    make_checkpoint(folder, num_layers=3)
    (folder / "model.safetensors").unlink()
    return folder


def test_a_config_and_a_tokenizer_are_enough_to_decode_with_drawn_weights(tmp_path: Path) -> None:
    folder = without_weights(tmp_path)
    answers = []
    for _ in range(2):
        events = Engine.load(dummy(folder)).generate([one_request(max_new_tokens=NUM_NEW)])[0]
        assert sum(event.drafted for event in events) > 0
        answers.append([t for event in events for t in event.token_ids])
    assert answers[0] == answers[1]
    assert len(answers[0]) == NUM_NEW
    assert len(set(answers[0])) > 1


def test_drawn_weights_are_those_of_a_model_before_training(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(without_weights(tmp_path)), revision=None)
    placement = Placement(torch.device("cpu"), torch.float64, drawn=DrawnTensors())
    weights = load_weights(checkpoint, placement, lambda *_: None)
    identity = torch.eye(checkpoint.shape.model_width, dtype=torch.float64)
    matrices = [
        weights.embedding_VD,
        weights.head(identity),
        *(layer.qkv(identity) for layer in weights.layers),
    ]
    for matrix in matrices:
        # Of n draws, the deviation is off by 0.02 / √(2n), five sigma.
        assert abs(float(matrix.std()) - 0.02) < 5 * 0.02 / (2 * matrix.numel()) ** 0.5
    flat = torch.cat([matrix.reshape(-1) for matrix in matrices])
    assert len(flat.unique()) == len(flat)


def test_weights_are_only_drawn_when_asked_for(tmp_path: Path) -> None:
    settings = dummy(without_weights(tmp_path)).model_copy(update={"load_format": LoadFormat.AUTO})
    with pytest.raises(CheckpointError, match="no weights"):
        Engine.load(settings)


def test_drawn_weights_still_need_a_tokenizer(tmp_path: Path) -> None:
    folder = without_weights(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        Engine.load(dummy(folder))
