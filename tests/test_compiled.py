"""Compiled layers compute what the others do, whatever tokens are beside a token, and never change a text."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor

from config.settings import BUNDLED_CHECKPOINT
from decoding.compiled_drafting import CompiledDrafter
from decoding.coupling import choose
from decoding.drafting import EarlyExitDrafter
from decoding.engine import Engine
from decoding.logits import Sampling
from decoding.messages import Generate, SamplingParams
from decoding.panels import PanelLinear
from decoding.ragged import Ragged
from tests.compiled_engines import engine, needs_compiler, text
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """What is compiled here is compiled anew."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
    patch.undo()


def hidden_after(loaded: Engine, last: int, counts: list[int], starts: list[int], ids: Tensor) -> Tensor:
    """Hidden states after `last` layers of rows that stand in slots of their own."""
    model, attention = loaded.runtime.model, loaded.runtime.model.attention
    tokens = Ragged.of(np.array(counts))
    slots_BT = np.arange(len(counts))[:, None] * 32 + np.arange(32)
    arrangement = attention.arrange(tokens, np.zeros(len(counts), dtype=np.int64))
    queries = attention.queries(arrangement, slots_BT, np.array(starts))
    return model.run_layers(model.embed(ids), 0, last, queries)


@needs_compiler
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_width", [16, 32, 64, 80, 128])
def test_layers_and_head_equal_the_others(tmp_path: Path, stored: torch.dtype, head_width: int) -> None:
    """One long part, then one token and three more, after every number of layers."""
    folder = make_checkpoint(tmp_path, head_dim=head_width, hidden=64, mlp=96)
    _store_as(folder, stored)
    plain, fast = engine(folder, dtype="float64"), engine(folder, compile_layers=True)
    assert fast.runtime.model.weights.layers[0].qkv.panels.dtype == stored
    ids = torch.arange(40) % 50
    with torch.inference_mode():
        for counts, starts in (([20, 20], [0, 0]), ([1, 3], [20, 20])):
            fed = ids[: sum(counts)]
            for last in range(1, plain.runtime.model.num_layers + 1):
                expected, found = (hidden_after(each, last, counts, starts, fed) for each in (plain, fast))
                assert _error(found, expected) < 1e-5
                logits = [each.runtime.model.logits(h) for each, h in ((plain, expected), (fast, found))]
                assert _error(logits[1], logits[0]) < 1e-5


@needs_compiler
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (4, 4), (5, 1), (14, 2)])
def test_heads_that_share_keys_attend_as_each_alone(tmp_path: Path, heads: int, kv_heads: int) -> None:
    """More of them than are taken at once, or fewer; contexts end within a vector of positions or at its end."""
    hidden = 16 * heads * (5 if heads == 1 else 1)
    folder = make_checkpoint(tmp_path, heads=heads, kv_heads=kv_heads, head_dim=16, hidden=hidden, mlp=336)
    plain, fast = engine(folder, dtype="float64"), engine(folder, compile_layers=True)
    ids, last = torch.arange(60) % 50, plain.runtime.model.num_layers
    with torch.inference_mode():
        for counts, starts in (([15, 16, 17], [0, 0, 0]), ([1, 7, 3], [15, 16, 17]), ([2, 1], [22, 17])):
            expected, found = (
                hidden_after(each, last, counts, starts, ids[: sum(counts)]) for each in (plain, fast)
            )
            assert _error(found, expected) < 1e-5


@needs_compiler
@pytest.mark.parametrize("head_width", [16, 32, 64, 80, 128])
def test_layers_and_head_in_bfloat16_are_near_the_others(tmp_path: Path, head_width: int) -> None:
    """Products of bfloat16 where the CPU has them; contexts of even and odd lengths. A number in another one's
    place would be off by as much as numbers are large.
    """
    folder = make_checkpoint(tmp_path, head_dim=head_width, hidden=64, mlp=96)
    _store_as(folder, torch.bfloat16)
    plain, fast = (
        engine(folder, dtype="float64"),
        engine(folder, compile_layers=True, dtype="bfloat16", draft_vocab_size=64),
    )
    ids = torch.arange(41) % 50
    with torch.inference_mode():
        for counts, starts in (([20, 21], [0, 0]), ([1, 3], [20, 21]), ([9], [20])):
            fed, last = ids[: sum(counts)], plain.runtime.model.num_layers
            expected, found = (hidden_after(each, last, counts, starts, fed) for each in (plain, fast))
            assert 1e-6 < _distance(found, expected) < 0.03
            logits = [each.runtime.model.logits(h) for each, h in ((plain, expected), (fast, found))]
            assert _distance(logits[1], logits[0]) < 0.03


def _distance(found: Tensor, expected: Tensor) -> float:
    """As a share of the whole length."""
    return float((found - expected).norm() / expected.norm())


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def _store_as(folder: Path, dtype: torch.dtype) -> None:
    """The same weights as this dtype holds them, in float32."""
    path = folder / "model.safetensors"
    save_file(
        {name: each.to(dtype).float() for name, each in load_file(path).items()}, path, {"format": "pt"}
    )


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_is_the_same_to_the_bit_whatever_is_beside_it(tmp_path: Path, dtype: str) -> None:
    loaded = engine(make_checkpoint(tmp_path, head_dim=16, mlp=48), compile_layers=True, dtype=dtype)
    last = loaded.runtime.model.num_layers
    with torch.inference_mode():
        alone = hidden_after(loaded, last, [1], [0], torch.tensor([7]))
        for others in (1, 2, 3, 4, 5, 6, 13):
            ids = torch.cat((torch.tensor([7]), torch.arange(others)))
            together = hidden_after(loaded, last, [1] * (1 + others), [0] * (1 + others), ids)
            assert torch.equal(together[:1], alone)
            assert not torch.equal(together[1:2], alone)


@needs_compiler
@pytest.mark.parametrize("bad", [13, 14])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_later_token_that_is_no_number_leaves_earlier_ones_as_they_are(
    tmp_path: Path, dtype: str, bad: int
) -> None:
    """A draft that will be refused, of whose row others are computed in the same call."""
    loaded = engine(make_checkpoint(tmp_path, head_dim=16, mlp=48), compile_layers=True, dtype=dtype)
    model = loaded.runtime.model
    tokens = Ragged.of(np.array([20]))
    arrangement = model.attention.arrange(tokens, np.zeros(1, dtype=np.int64))
    queries = model.attention.queries(arrangement, np.arange(32)[None], np.array([0]))
    with torch.inference_mode():
        hidden_ND = model.embed(torch.arange(20))
        expected = model.run_layers(hidden_ND, 0, model.num_layers, queries)[:bad]
        hidden_ND[bad] = torch.nan
        found = model.run_layers(hidden_ND, 0, model.num_layers, queries)
    assert torch.equal(found[:bad], expected)
    assert found[bad].isnan().any()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.8)])
def test_texts_of_mixed_batches_are_those_of_plain_decoding(dtype: str, temperatures: tuple[float]) -> None:
    """The bundled checkpoint; compiled sums have one order, so that even bfloat16 leaves no choice to chance."""
    loaded = engine(BUNDLED_CHECKPOINT, compile_layers=True, dtype=dtype)
    rng = random.Random(8)
    requests = [
        Generate(
            sequence_id=number,
            prompt_ids=[rng.randrange(5, 4000) for _ in range(rng.randrange(1, 20))],
            max_new_tokens=24,
            sampling=SamplingParams(temperature=rng.choice(temperatures), top_p=0.9),
            seed=number,
            stop_token_ids=[],
            exit_layer=rng.choice([None, 3, 6]),
            draft_length=rng.choice([None, 1, 4]),
        )
        for number in range(12)
    ]
    together = loaded.generate(requests)
    drafted = sum(event.drafted for events in together.values() for event in events)
    kept = sum(event.kept for events in together.values() for event in events)
    assert 0 < kept < drafted
    loaded.check_integrity()
    for request in requests:
        plain = _plain(request)
        assert text(loaded.generate([plain])[plain.sequence_id]) == text(together[request.sequence_id])


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_made_in_one_call_are_those_made_step_by_step(dtype: str) -> None:
    """Rows of all draft lengths, greedy and sampled, at one exit layer or several."""
    loaded = engine(BUNDLED_CHECKPOINT, compile_layers=True, dtype=dtype, draft_vocab_size=4096)
    cycle, model = loaded.runtime.cycle.by_parts, loaded.runtime.model
    fast, steps = cycle._drafter, EarlyExitDrafter(model, model.attention)
    assert isinstance(fast, CompiledDrafter)
    rng, num_drafted = random.Random(9), 0
    for is_mixed in (False, False, True):
        requests = [
            Generate(
                sequence_id=number,
                prompt_ids=[rng.randrange(5, 4000) for _ in range(rng.randrange(1, 20))],
                max_new_tokens=16,
                sampling=SamplingParams(temperature=rng.choice([0, 0.9]), top_p=rng.choice([1.0, 0.9])),
                seed=number,
                stop_token_ids=[],
                exit_layer=rng.choice([3, 6]) if is_mixed else 4,
                draft_length=number % 5,
                traces_drafts=True,
            )
            for number in range(9)
        ]
        found = []
        for drafter in (fast, steps):
            cycle._drafter = drafter
            # Nothing that the other run computed is found again.
            salted = [replace(request, cache_salt=f"{is_mixed} {len(found)}") for request in requests]
            events = loaded.generate(salted)
            found.append({i: [(e.token_ids, e.drafted_ids, e.kept) for e in of] for i, of in events.items()})
        assert found[0] == found[1]
        num_drafted += sum(event.drafted for of in events.values() for event in of)
    assert num_drafted > 200


def _plain(request: Generate) -> Generate:
    changed = {"sequence_id": request.sequence_id + 100, "exit_layer": 3, "draft_length": 0}
    return Generate(**{name: getattr(request, name) for name in request.__struct_fields__} | changed)


@needs_compiler
@pytest.mark.parametrize("has_ties", [False, True])
def test_the_choice_is_that_of_the_published_rule(has_ties: bool) -> None:
    """400 random batches: greedy rows, top-p, min-p, no filter, tokens that are ruled out."""
    model = engine(BUNDLED_CHECKPOINT, compile_layers=True).runtime.model
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    seen = set()
    for _ in range(400):
        logits_NV = torch.randn(rng.choice([1, 3]), rng.choice([20, 64, 1000, 4096]), generator=generator)
        logits_NV *= rng.choice([0.1, 1, 4, 8])
        if has_ties:
            logits_NV = (logits_NV * 2).round() / 2
        if rng.random() < 0.2:
            logits_NV[:, ::3] = -torch.inf
        params = [
            SamplingParams(
                temperature=rng.choice([0, 0.01, 0.3, 0.8, 1.5]),
                top_p=rng.choice([1e-9, 0.1, 0.95, 1.0]),
                min_p=rng.choice([0, 0, 0.05]),
                top_k=rng.choice([0, 0, 1, 9, 200]),
            )
            for _ in logits_NV
        ]
        sampling = Sampling.of(params, [rng.randrange(1 << 62) for _ in params], torch.device("cpu"))
        positions_N = torch.tensor([rng.randrange(5000) for _ in params])
        chosen_N = model.choose(logits_NV, sampling, positions_N)
        assert torch.equal(chosen_N, choose(logits_NV, sampling, positions_N))
        seen |= set(chosen_N.tolist())
    assert len(seen) > 100


@needs_compiler
def test_more_choices_than_rows_of_a_greedy_batch_are_all_greedy() -> None:
    """Nothing of such a batch's columns is read: they say the same of all, and there may be fewer than choices."""
    model = engine(BUNDLED_CHECKPOINT, compile_layers=True).runtime.model
    sampling = Sampling.of([SamplingParams(temperature=0.0)], [3], torch.device("cpu"))
    for _ in range(20):
        logits_NV = torch.randn(64, 100)
        chosen_N = model.choose(
            logits_NV, sampling.take(torch.zeros(64, dtype=torch.int64)), torch.arange(64)
        )
        assert torch.equal(chosen_N, logits_NV.argmax(-1))


@pytest.mark.parametrize("num_outputs", [16, 20, 200])
def test_panels_hold_the_matrix(num_outputs: int) -> None:
    for weight_OI in (torch.randn(num_outputs, 24), torch.randn(num_outputs, 24).bfloat16().float()):
        x_NI = torch.randn(3, 24)
        linear, expected_NO = PanelLinear(weight_OI), x_NI @ weight_OI.t()
        torch.testing.assert_close(linear(x_NI), expected_NO)
        linear.store_as(torch.float32)
        torch.testing.assert_close(linear(x_NI), expected_NO)
