"""Three ways to decode with drafts of a model's first layers, which share more and more with the full model.

Knows how each runs; knows nothing of prompts, rounds or medians. The variants live here, not in the serving path.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from msgspec.structs import replace as replace_fields
from torch import Tensor

from config.settings import EngineSettings
from decoding.attention import Attention, AttentionShape, Queries
from decoding.blocks import BlockPool
from decoding.capacity import Capacity
from decoding.checkpoint import Checkpoint, open_checkpoint
from decoding.choice import FixedChoice
from decoding.cycle import Cycle
from decoding.draft_model import DraftModel
from decoding.engine import Engine
from decoding.kv_cache import slot_bytes
from decoding.messages import Drafter, Generate
from decoding.model import LlamaDecoder, Weights
from decoding.plan import Plan, Result
from decoding.planning import StepLimits
from decoding.runtime import Runtime, build_decoder
from decoding.scheduler import Scheduler


class CountingDecoder(LlamaDecoder):
    """Counts tokens times layers."""

    def __init__(self, weights: Weights, attention: Attention) -> None:
        super().__init__(weights, attention)
        self.num_layer_tokens = 0

    def run_layers(self, hidden_ND: Tensor, first: int, last: int, queries: Queries) -> Tensor:
        """As ever."""
        self.num_layer_tokens += (last - first) * len(hidden_ND)
        return super().run_layers(hidden_ND, first, last, queries)


class RefeedingCycle(Cycle):
    """Drafts by early exit into the full model's cache, then verifies like looked-up drafts, from layer 0."""

    def __init__(self, model: LlamaDecoder, attention: Attention, *, block_size: int) -> None:
        super().__init__(model, attention, block_size=block_size, clock=time.perf_counter)
        self._verifying = Cycle(model, attention, block_size=block_size, clock=time.perf_counter)

    @torch.inference_mode()
    def run(self, plan: Plan) -> Result:
        """A step of one row."""
        assert plan.num_rows == 1
        if not plan.draft_lengths_B.any():
            return self._verifying.run(plan)
        started = self._clock()
        route, slots_BT = self._routes.of(plan), self.slots(plan.blocks_BW)
        fed_N = torch.from_numpy(plan.fed_N).to(self._device)
        drafts = self._drafter.draft(plan, route, slots_BT, fed_N[route.last_fed_B])
        draft_s = self._clock() - started
        return replace(self._verifying.run(_refed(plan, drafts.ids_M)), draft_s=draft_s)


def _refed(plan: Plan, ids_M: Tensor) -> Plan:
    """The plan of one row with its drafts among what it is fed."""
    return replace(
        plan,
        fed_N=np.concatenate((plan.fed_N, ids_M.cpu().numpy())),
        num_fed_B=plan.num_fed_B + plan.draft_lengths_B,
        num_looked_up_B=plan.draft_lengths_B,
        draft_lengths_B=np.zeros_like(plan.draft_lengths_B),
    )


@dataclass(frozen=True, slots=True)
class Decoded:
    """One prompt's new tokens, and what its decoding steps took: `num_timed` tokens came in them."""

    token_ids: tuple[int, ...]
    num_timed: int
    decode_s: float
    num_drafted: int
    num_kept: int
    layer_calls: int
    layer_tokens: int


@dataclass(frozen=True, slots=True)
class Way:
    """A way of decoding one prompt at a time; `drafts` False is plain decoding. `models` are all that compute."""

    name: str
    engine: Engine
    models: tuple[CountingDecoder, ...]
    kv_bytes_per_position: int
    dtype: torch.dtype
    drafter: Drafter = Drafter.EARLY_EXIT
    drafts: bool = True

    def decode(self, request: Generate) -> Decoded:
        """Decode to the end. The step that computes the prompt is not timed."""
        changed = {"drafter": self.drafter} | ({} if self.drafts else {"draft_length": 0})
        self.engine.submit(replace_fields(request, **changed))
        events = self.engine.step().decoded
        while not events:
            events = self.engine.step().decoded
        assert not events[0].num_cached_tokens
        calls, tokens = self._counts()
        started = time.perf_counter()
        while self.engine.has_work:
            events += self.engine.step().decoded
        decode_s = time.perf_counter() - started
        token_ids = tuple(token_id for event in events for token_id in event.token_ids)
        later = self._counts()
        return Decoded(
            token_ids=token_ids,
            num_timed=len(token_ids) - len(events[0].token_ids),
            decode_s=decode_s,
            num_drafted=sum(event.drafted for event in events),
            num_kept=sum(event.kept for event in events),
            layer_calls=later[0] - calls,
            layer_tokens=later[1] - tokens,
        )

    def _counts(self) -> tuple[int, int]:
        return sum(m.num_layer_calls for m in self.models), sum(m.num_layer_tokens for m in self.models)


def make_ways(settings: EngineSettings, *, exit_layer: int) -> tuple[Way, Way, Way, Way]:
    """Plain decoding, then sharing weights, KV too, and computation too: one copy of the weights, caches apart.

    Raises StartupError.
    """
    loaded = Engine.load(settings)
    checkpoint = open_checkpoint(settings.model, revision=settings.revision)
    limits = loaded.ready.limits
    capacity = Capacity(limits.max_model_len, limits.block_size, limits.num_blocks)
    weights = loaded.runtime.model.weights
    early = replace(weights, layers=weights.layers[:exit_layer])

    def decoder(of_weights: Weights) -> tuple[CountingDecoder, Attention]:
        _, attention = build_decoder(settings, checkpoint, capacity, of_weights)
        return CountingDecoder(of_weights, attention), attention

    def way(name: str, cycle: Cycle, *models: CountingDecoder, drafter: Drafter, drafts: bool = True) -> Way:
        engine = _engine(loaded, Runtime(models[0], cycle), settings, follows=len(models) > 1)
        dtype = weights.embedding_VD.dtype
        num_layers = sum(model.num_layers for model in models)
        return Way(name, engine, models, _kv_bytes(checkpoint, num_layers, dtype), dtype, drafter, drafts)

    (plain, own), (full, apart), (shared, kv) = (decoder(weights) for _ in range(3))
    drafting, drafting_attention = decoder(early)
    clock, size = time.perf_counter, capacity.block_size
    usual = Cycle(plain, own, block_size=size, clock=clock)
    two_models = Cycle(
        full, apart, block_size=size, clock=clock, draft_model=DraftModel(drafting, drafting_attention)
    )
    refeeding = RefeedingCycle(shared, kv, block_size=size)
    by_exit = Drafter.EARLY_EXIT
    return (
        way("plain", usual, plain, drafter=Drafter.NONE, drafts=False),
        way("weights", two_models, full, drafting, drafter=Drafter.MODEL),
        way("weights+kv", refeeding, shared, drafter=by_exit),
        way("weights+kv+compute", usual, plain, drafter=by_exit),
    )


def _engine(loaded: Engine, runtime: Runtime, settings: EngineSettings, *, follows: bool) -> Engine:
    limits = loaded.ready.limits
    scheduler = Scheduler(
        BlockPool(num_blocks=limits.num_blocks, block_size=limits.block_size),
        StepLimits(
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            model_draft_length=settings.draft_length if follows else None,
        ),
        FixedChoice(exit_layer=limits.first_exit_layer, draft_length=limits.first_draft_length),
        device=runtime.model.device,
        clock=time.perf_counter,
    )
    return Engine(loaded.ready, runtime, scheduler, clock=time.perf_counter)


def _kv_bytes(checkpoint: Checkpoint, num_layers: int, dtype: torch.dtype) -> int:
    sizes = checkpoint.shape
    heads = AttentionShape(sizes.num_heads, sizes.num_kv_heads, sizes.head_width)
    return slot_bytes(num_layers=num_layers, slot_width=heads.slot_width, dtype=dtype)
