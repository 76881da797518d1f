"""What a step takes of an accelerator's memory beside weights and cache: measured before the cache is made.

Knows the largest step that the settings allow; knows nothing of requests.

Shapes: B rows, N tokens, V vocabulary, T cache positions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from config.settings import EngineSettings
from decoding.attention import Attention, context_classes
from decoding.capacity import Capacity
from decoding.coupling import choose
from decoding.logits import Sampling
from decoding.messages import SamplingParams
from decoding.model import LlamaDecoder
from decoding.ragged import Ragged

BuildDecoder = Callable[[Capacity], tuple[LlamaDecoder, Attention]]
"""Makes the model with a cache of this capacity."""


def activation_bytes(settings: EngineSettings, build: BuildDecoder, device: torch.device) -> int:
    """The most that a step allocates on this device; 0 on a CPU, which says nothing of it."""
    if device.type != "cuda":
        return 0
    model, attention = build(least_capacity(settings))
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step(settings, model, attention)
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    del model, attention
    torch.cuda.empty_cache()
    return taken


@torch.inference_mode()
def run_largest_step(settings: EngineSettings, model: LlamaDecoder, attention: Attention) -> int:
    """As many tokens as a step may hold, in as many rows as there may be; as many choose, through every filter, as
    may do so. Returns how many choose. The cache needs room for all.
    """
    counts_B = _counts(settings)
    size = settings.block_size
    blocks_B = -(-counts_B // size)
    slots_BT = (np.cumsum(blocks_B) - blocks_B)[:, None] * size + np.arange(size * blocks_B.max())
    arrangement = attention.arrange(Ragged.of(counts_B), context_classes(counts_B))
    queries = attention.queries(arrangement, slots_BT, np.zeros_like(counts_B))
    ids_N = torch.zeros(int(counts_B.sum()), dtype=torch.int64, device=model.device)
    hidden_ND = model.run_layers(model.embed(ids_N), 0, model.num_layers, queries)
    ids_N = ids_N[: len(counts_B) * (1 + settings.max_draft_length)]
    filtered = SamplingParams(top_k=50, top_p=0.9, min_p=0.01)
    sampling = Sampling.of([filtered], [0], model.device).take(ids_N)
    return len(choose(model.logits(hidden_ND[: len(ids_N)]), sampling, ids_N))


def _counts(settings: EngineSettings) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Tokens of each row [B], as even as they come."""
    num_tokens, num_rows = settings.max_num_batched_tokens, settings.max_num_seqs
    return np.array([len(part) for part in np.array_split(np.arange(num_tokens), num_rows)], dtype=np.int64)


def least_capacity(settings: EngineSettings) -> Capacity:
    """What a cache must hold for the largest step."""
    counts_B, size = _counts(settings), settings.block_size
    # Tables are as wide as the longest row, also that of the last.
    num_blocks = int((-(-counts_B // size)).sum() + -(-counts_B.max() // size))
    return Capacity(max_model_len=int(counts_B.max()), block_size=size, num_blocks=num_blocks)
