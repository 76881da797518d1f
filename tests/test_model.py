"""The decoder computes what transformers' LlamaForCausalLM computes from the same files, at every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from config.settings import EngineSettings
from decoding.attention import AttentionShape, GatherAttention, Queries
from decoding.checkpoint import open_checkpoint
from decoding.engine import Engine
from decoding.kv_cache import KVCache
from decoding.linear import HalfStoredLinear
from decoding.messages import Generate, SamplingParams
from decoding.model import LlamaDecoder, RmsNorm, Weights
from decoding.ragged import Ragged
from decoding.weights import Placement, load_weights, rotations
from tests.tiny import LLAMA3_ROPE, load_reference, make_checkpoint

CPU = torch.device("cpu")
NUM_LAYERS = 4
NUM_POSITIONS = 200
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

VARIANTS: dict[str, dict[str, object]] = {
    "grouped-query": {"heads": 4, "kv_heads": 2},
    "one key for all": {"heads": 4, "kv_heads": 1},
    "multi-head": {"heads": 4, "kv_heads": 4},
    "tied head": {"tied": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "sharded": {"shards": True},
    "sharded, tied": {"shards": True, "tied": True},
    "wide heads": {"head_dim": 16},
    "narrow heads": {"head_dim": 4},
    "bfloat16": {"dtype": torch.bfloat16},
    "everything": {
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 8,
        "tied": True,
        "rope_parameters": LLAMA3_ROPE,
        "shards": True,
        "dtype": torch.bfloat16,
    },
}


@dataclass
class Loaded:
    """A decoder with its cache, and transformers' model of the same files."""

    weights: Weights
    decoder: LlamaDecoder
    attention: GatherAttention
    reference: LlamaForCausalLM

    def queries(self, starts: list[int], counts: list[int]) -> Queries:
        """Rows in consecutive stretches of slots."""
        slots_BT = np.arange(len(starts))[:, None] * NUM_POSITIONS + np.arange(NUM_POSITIONS)
        arrangement = self.attention.arrange(
            Ragged.of(np.array(counts)), np.zeros(len(counts), dtype=np.int64)
        )
        return self.attention.queries(arrangement, slots_BT, np.array(starts))

    def logits_after(self, ids_N: Tensor, last: int) -> Tensor:
        hidden_ND = self.decoder.embed(ids_N)
        return self.decoder.logits(
            self.decoder.run_layers(hidden_ND, 0, last, self.queries([0], [len(ids_N)]))
        )


def load(folder: Path, dtype: torch.dtype, offload_folder: Path | None = None) -> Loaded:
    checkpoint = open_checkpoint(str(folder), revision=None)
    sizes = checkpoint.shape
    shape = AttentionShape(sizes.num_heads, sizes.num_kv_heads, sizes.head_width)
    cache = KVCache(
        num_layers=sizes.num_layers,
        num_slots=4 * NUM_POSITIONS,
        slot_width=shape.slot_width,
        dtype=dtype,
        device=CPU,
    )
    attention = GatherAttention(
        shape=shape,
        cache=cache,
        rotations_TF=rotations(checkpoint, NUM_POSITIONS, CPU, dtype),
        dtype=dtype,
    )
    weights = load_weights(checkpoint, Placement(CPU, dtype, offload_folder), lambda *_: None)
    return Loaded(weights, LlamaDecoder(weights, attention), attention, load_reference(folder, dtype))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint folders by variant, each written once."""
    made: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in made:
            target = tmp_path_factory.mktemp("checkpoint")
            made[variant] = make_checkpoint(target, num_layers=NUM_LAYERS, **VARIANTS[variant])
        return made[variant]

    return folder


@pytest.fixture(scope="module")
def plain(folder_of: Callable[[str], Path]) -> Loaded:
    return load(folder_of("grouped-query"), torch.float64)


def random_ids(count: int = NUM_POSITIONS) -> Tensor:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_logits_and_exit_logits_equal_transformers(
    variant: str, dtype: torch.dtype, folder_of: Callable[[str], Path]
) -> None:
    """At 200 positions, beyond the scaled RoPE's original context: at the last layer and at every exit."""
    loaded = load(folder_of(variant), dtype)
    ids_N = random_ids()
    expected = loaded.reference(ids_N[None], output_hidden_states=True)
    assert expected.logits.std() > 0.5
    full_NV = loaded.logits_after(ids_N, NUM_LAYERS)
    assert full_NV.dtype == dtype
    assert (full_NV - expected.logits[0]).abs().max() < TOLERANCE[dtype]
    for exit_layer in range(1, NUM_LAYERS):
        hidden_ND = expected.hidden_states[exit_layer][0]
        early_NV = loaded.reference.lm_head(loaded.reference.model.norm(hidden_ND))
        assert (loaded.logits_after(ids_N, exit_layer) - early_NV).abs().max() < TOLERANCE[dtype]


def test_rope_scaling_acts_in_the_variant_that_tests_it(folder_of: Callable[[str], Path]) -> None:
    """The control: without the scaling the same weights give other logits."""
    folder = folder_of("llama3 rope")
    loaded = load(folder, torch.float64)
    unscaled = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    )
    ids_N = random_ids()
    with torch.inference_mode():
        difference = loaded.logits_after(ids_N, NUM_LAYERS) - unscaled(ids_N[None]).logits[0]
    assert difference.abs().max() > 0.1


def test_variants_are_stored_as_their_names_say(folder_of: Callable[[str], Path]) -> None:
    assert (folder_of("grouped-query") / "model.safetensors").is_file()
    assert len(list(folder_of("sharded").glob("model-*.safetensors"))) > 2
    shape = open_checkpoint(str(folder_of("wide heads")), revision=None).shape
    assert shape.head_width * shape.num_heads != shape.model_width
    tied = open_checkpoint(str(folder_of("tied head")), revision=None).shape
    assert tied.is_head_tied


def test_half_stored_weights_are_among_the_variants(folder_of: Callable[[str], Path]) -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no float16-weight kernel")
    assert isinstance(load(folder_of("bfloat16"), torch.float32).weights.head, HalfStoredLinear)


@pytest.mark.parametrize("exit_layer", range(NUM_LAYERS + 1))
@torch.inference_mode()
def test_layers_run_in_two_stretches_give_what_one_gives(plain: Loaded, exit_layer: int) -> None:
    """The hand-over from draft to verification: the same bits, and what entered is left as it was."""
    ids_N = random_ids(40)
    queries = plain.queries([0], [40])
    whole_ND = plain.decoder.run_layers(plain.decoder.embed(ids_N), 0, NUM_LAYERS, queries)
    exit_ND = plain.decoder.run_layers(plain.decoder.embed(ids_N), 0, exit_layer, queries)
    kept_ND = exit_ND.clone()
    rest_ND = plain.decoder.run_layers(exit_ND, exit_layer, NUM_LAYERS, queries)
    assert torch.equal(rest_ND, whole_ND)
    assert torch.equal(exit_ND, kept_ND)


@torch.inference_mode()
def test_a_ragged_batch_in_chunks_equals_each_row_whole(plain: Loaded) -> None:
    """Three rows advance at different paces; logits equal transformers' on each row alone."""
    lengths, paces = [50, 7, 90], [20, 1, 45]
    rows = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    given: list[list[Tensor]] = [[], [], []]
    computed = [0, 0, 0]
    while computed != lengths:
        counts = [min(pace, n - done) for pace, n, done in zip(paces, lengths, computed, strict=True)]
        active = [i for i in range(3) if counts[i]]
        slots_BT = np.array(active)[:, None] * NUM_POSITIONS + np.arange(NUM_POSITIONS)
        queries = plain.attention.queries(
            plain.attention.arrange(
                Ragged.of(np.array([counts[i] for i in active])), np.zeros(len(active), dtype=np.int64)
            ),
            slots_BT,
            np.array([computed[i] for i in active]),
        )
        ids_N = torch.cat([rows[i][computed[i] :][: counts[i]] for i in active])
        logits_NV = plain.decoder.logits(
            plain.decoder.run_layers(plain.decoder.embed(ids_N), 0, NUM_LAYERS, queries)
        )
        for i, part in zip(active, logits_NV.split([counts[i] for i in active]), strict=True):
            given[i].append(part)
            computed[i] += counts[i]
    for ids_N, parts in zip(rows, given, strict=True):
        assert (torch.cat(parts) - plain.reference(ids_N[None]).logits[0]).abs().max() < 1e-10


@torch.inference_mode()
def test_layer_calls_count_layers_not_tokens(plain: Loaded) -> None:
    for num_tokens in (1, 30):
        before = plain.decoder.num_layer_calls
        hidden_ND = plain.decoder.embed(random_ids(num_tokens))
        plain.decoder.run_layers(hidden_ND, 1, 3, plain.queries([0], [num_tokens]))
        assert plain.decoder.num_layer_calls == before + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-12, 1e6])
def test_normalisation_divides_by_the_root_mean_square(dtype: torch.dtype, scale: float) -> None:
    """Where the values drown in epsilon too, and at 0."""
    generator = torch.Generator().manual_seed(2)
    x_ND = (scale * torch.randn(5, 24, generator=generator, dtype=torch.float64)).to(dtype)
    x_ND[4] = 0
    weight_D = (1 + 0.3 * torch.randn(24, generator=generator, dtype=torch.float64)).to(dtype)
    x = x_ND.double()
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight_D.double()
    got = RmsNorm(weight_D, 1e-5)(x_ND)
    assert got.dtype == dtype
    assert ((got.double() - expected).abs() <= 8 * torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", ["grouped-query", "everything"])
@torch.inference_mode()
def test_offloaded_weights_give_the_same_logits(
    variant: str, dtype: torch.dtype, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = load(folder_of(variant), dtype, offload_folder=tmp_path)
    assert any(tmp_path.iterdir())
    ids_N = random_ids()
    expected = loaded.reference(ids_N[None]).logits[0]
    assert (loaded.logits_after(ids_N, NUM_LAYERS) - expected).abs().max() < TOLERANCE[dtype]


def test_an_engine_with_offloaded_weights_gives_the_same_tokens(folder_of: Callable[[str], Path]) -> None:
    request = Generate(
        sequence_id=0,
        prompt_ids=[5, 6, 7],
        max_new_tokens=20,
        sampling=SamplingParams(temperature=0.9),
        seed=3,
        stop_token_ids=[],
        exit_layer=2,
        draft_length=3,
    )
    given = []
    for loader in ("safetensors", "accelerate"):
        settings = EngineSettings(
            model=str(folder_of("grouped-query")),
            dtype="float64",
            device="cpu",
            loader=loader,
            num_threads=1,
            max_model_len=64,
        )
        events = Engine.load(settings).generate([request])[0]
        assert 0 < sum(event.kept for event in events) < sum(event.drafted for event in events)
        given.append([token for event in events for token in event.token_ids])
    assert given[0] == given[1]
    assert len(given[0]) == 20
