"""Naive full-depth decoding of one row: what every mix of rows must reproduce.

Written apart from the engine: transformers runs the model, numpy and Python the choice rule, straight from
its documented definition.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from decoding.messages import Generate, SamplingParams
from tests.tiny import load_reference

MASK = 0xFFFFFFFF


def mix(x: int) -> int:
    x ^= x >> 15
    x = (x * 0x2C1B3C6D) & MASK
    x ^= x >> 12
    x = (x * 0x297A2D39) & MASK
    return x ^ (x >> 15)


def noise_word(seed: int, position: int, token_id: int) -> int:
    """The 32 bits of (seed, position, token id), as the contract defines them."""
    low, high = seed & MASK, (seed >> 32) & 0x7FFFFFFF
    first = mix(((mix(mix(low) ^ high)) + position) & MASK)
    second = mix((mix(mix(high ^ 0x1E3779B9) ^ low) + position) & MASK)
    return mix(((mix(token_id) ^ first) + second) & MASK)


def gumbel(seed: int, position: int, vocab_size: int) -> np.ndarray:
    words = np.array(
        [noise_word(seed, position, token_id) for token_id in range(vocab_size)], dtype=np.float64
    )
    return -np.log(-np.log1p(-(words + 0.5) * 2.0**-32))


def processed(logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Scaled logits with dropped tokens at −∞: temperature, then min-p, top-k, top-p."""
    scores = logits_V / params.temperature
    kept = np.ones(len(scores), dtype=bool)
    if params.min_p > 0:
        kept &= np.exp(scores - scores.max()) >= params.min_p
    if params.top_k > 0:
        kth = sorted(scores[kept], reverse=True)[: params.top_k][-1]
        kept &= scores >= kth
    if params.top_p < 1:
        order = [i for i in np.argsort(-scores, kind="stable") if kept[i]]
        weights = np.exp(scores[order] - scores.max())
        total, mass, last = weights.sum(), 0.0, 0
        for last, weight in enumerate(weights):  # noqa: B007
            mass += weight / total
            if mass >= params.top_p:
                break
        kept &= scores >= scores[order[last]]
    return np.where(kept, scores, -math.inf)


def choose(logits_V: np.ndarray, params: SamplingParams, seed: int, position: int) -> int:
    if params.temperature == 0:
        return int(logits_V.argmax())
    return int((processed(logits_V, params) + gumbel(seed, position, len(logits_V))).argmax())


class NaiveDecoder:
    """transformers on the same weights in float64, one row, one token at a time, every layer."""

    def __init__(self, folder: Path) -> None:
        self._model = load_reference(folder, torch.float64)

    @torch.inference_mode()
    def decode(self, request: Generate) -> list[int]:
        known = list(request.prompt_ids)
        fed, cache = known, None
        while len(known) - len(request.prompt_ids) < request.max_new_tokens:
            output = self._model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            known.append(choose(output.logits[0, -1].numpy(), request.sampling, request.seed, len(known)))
            fed = known[-1:]
            if known[-1] in request.stop_token_ids:
                break
        return known[len(request.prompt_ids) :]
