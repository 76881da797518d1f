"""The ways that the sharing benchmark compares draft and keep alike, and differ in what they compute again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace as replace_fields

from benchmarks.sharing import Asked, Line, measure, memory, worths
from benchmarks.sharing_ways import Decoded, Way, make_ways
from config.settings import EngineSettings
from decoding.checkpoint import open_checkpoint
from decoding.messages import Generate
from tests.tiny import make_checkpoint

EXIT_LAYER, DRAFT_LENGTH, NUM_LAYERS = 2, 3, 5
PROMPTS = ([7, 3, 11], [5, 2], [9, 9, 8, 2, 40, 6])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sharing")
    return make_checkpoint(made, num_layers=NUM_LAYERS, vocab=61, dtype=torch.float64)


@pytest.fixture(scope="module")
def ways(folder: Path) -> tuple[Way, ...]:
    settings = EngineSettings(
        model=str(folder),
        dtype="float64",
        device="cpu",
        num_threads=1,
        max_num_seqs=1,
        max_model_len=64,
        block_size=64,
        exit_layer=EXIT_LAYER,
        draft_length=DRAFT_LENGTH,
    )
    return make_ways(settings, exit_layer=EXIT_LAYER)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_all_ways_give_plain_decoding_s_tokens_from_the_same_drafts(
    ways: tuple[Way, ...], temperature: float
) -> None:
    asked = Asked(EXIT_LAYER, DRAFT_LENGTH, new_tokens=32, repeats=1)
    lines = measure(ways, PROMPTS, asked, temperature=temperature)
    assert [line.num_different_texts for line in lines] == [0] * 4
    assert {line.num_texts for line in lines} == {len(PROMPTS)}
    plain, weights, cache, everything = lines
    assert plain.num_drafted == 0
    assert 0 < weights.num_kept < weights.num_drafted
    assert (weights.num_drafted, weights.num_kept) == (cache.num_drafted, cache.num_kept)
    assert (weights.num_drafted, weights.num_kept) == (everything.num_drafted, everything.num_kept)
    check_computed(lines)
    assert set(worths(lines)) == {"kv", "compute", "kv_and_compute", "over_plain"}


def check_computed(lines: list[Line]) -> None:
    """Without shared computation each draft's early layers run again; a cache apart holds these once more."""
    plain, weights, cache, everything = lines
    num_timed = len(PROMPTS) * 31
    assert plain.layer_tokens_per_token == NUM_LAYERS
    again = (cache.layer_tokens_per_token - everything.layer_tokens_per_token) * num_timed
    assert again == pytest.approx(EXIT_LAYER * everything.num_drafted)
    # A draft cache apart also lacks the last draft of every run that was kept whole.
    assert weights.layer_tokens_per_token > cache.layer_tokens_per_token
    assert weights.kv_bytes_per_position * NUM_LAYERS == cache.kv_bytes_per_position * (
        NUM_LAYERS + EXIT_LAYER
    )
    assert cache.kv_bytes_per_position == everything.kv_bytes_per_position == plain.kv_bytes_per_position


class Reseeded(Way):
    """Decodes something else than it is asked for."""

    __slots__ = ()

    def decode(self, request: Generate) -> Decoded:
        return Way.decode(self, replace_fields(request, seed=request.seed ^ 1))


def reseeded(way: Way) -> Way:
    return Reseeded(**{each.name: getattr(way, each.name) for each in fields(way)})


def test_a_text_that_differs_is_counted(ways: tuple[Way, ...]) -> None:
    asked = Asked(EXIT_LAYER, DRAFT_LENGTH, new_tokens=8, repeats=1)
    lines = measure((ways[0], reseeded(ways[1])), PROMPTS, asked, temperature=0.8)
    assert lines[1].num_different_texts == len(PROMPTS)


def test_memory_counts_the_early_layers_once_more(folder: Path) -> None:
    bytes_of = memory(open_checkpoint(str(folder), revision=None), torch.float32, EXIT_LAYER)
    whole, copied = bytes_of["weight_bytes"], bytes_of["draft_weight_bytes_not_copied"]
    # Queries, keys, values and their output; three matrices of width 56; two norms.
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 56 + 2 * 32
    assert whole - copied == 4 * layer * (NUM_LAYERS - EXIT_LAYER)
    assert copied > 4 * layer * EXIT_LAYER + 4 * 2 * 61 * 32
