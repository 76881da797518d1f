"""Naive full-depth decoding of one row: what every mix of rows must reproduce.

Written apart from the engine: transformers runs the model, numpy and Python the choice rule, straight from
its documented definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from transformers import DynamicCache

from decoding.messages import Generate, LogitEdits, SamplingParams
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


def edited(logits_V: np.ndarray, edits: LogitEdits, before: list[int], request: Generate) -> np.ndarray:
    """The documented edits, one token at a time, in their order; no rule may leave nothing."""
    logits = [float(value) for value in logits_V]
    num_new = len(before) - len(request.prompt_ids)
    for forbidden in _forbidden(edits, before, num_new, request.stop_token_ids, len(logits)):
        kept = [-math.inf if i in forbidden else value for i, value in enumerate(logits)]
        if max(kept) > -math.inf:
            logits = kept
    for token_id, bias in edits.logit_bias.items():
        logits[token_id] += bias
    new = before[len(request.prompt_ids) :]
    for token_id in range(len(logits)):
        if token_id in before:
            factor = edits.repetition_penalty
            logits[token_id] = (
                logits[token_id] / factor if logits[token_id] > 0 else logits[token_id] * factor
            )
        logits[token_id] -= edits.frequency_penalty * new.count(token_id)
        logits[token_id] -= edits.presence_penalty * (token_id in new)
    return np.array(logits)


def _forbidden(
    edits: LogitEdits, before: list[int], num_new: int, stops: list[int], vocab_size: int
) -> Iterator[set[int]]:
    if edits.allowed_token_ids:
        yield set(range(vocab_size)) - set(edits.allowed_token_ids)
    for *others, last in edits.bad_words:
        if not others or before[-len(others) :] == others:
            yield {last}
    if num_new < edits.min_tokens:
        yield set(stops)


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted = logits_V - logits_V.max()
    return shifted - math.log(sum(math.exp(value) for value in shifted))


class NaiveDecoder:
    """transformers on the same weights in float64, one row, one token at a time, every layer.

    Requests that differ only in how they are drafted are decoded once.
    """

    def __init__(self, folder: Path) -> None:
        self._model = load_reference(folder, torch.float64)
        self._known: dict[bytes, tuple[list[int], list[np.ndarray]]] = {}

    def decode(self, request: Generate, *, guess: Sequence[int] = ()) -> list[int]:
        return self.decode_with_logprobs(request, guess=guess)[0]

    @torch.inference_mode()
    def prompt_logprobs(self, prompt_ids: list[int]) -> list[np.ndarray]:
        """Log-probabilities over the vocabulary of what follows each prompt token but the last."""
        logits_TV = self._model(torch.tensor([prompt_ids])).logits[0].numpy()
        return [log_softmax(logits_V) for logits_V in logits_TV[:-1]]

    def decode_with_logprobs(
        self, request: Generate, *, guess: Sequence[int] = ()
    ) -> tuple[list[int], list[np.ndarray]]:
        """The tokens, and beside each the model's own log-probabilities over the vocabulary.

        A `guess` of the tokens only saves time: what follows its first wrong one is computed anew.
        """
        key = undrafted(request)
        if key not in self._known:
            self._known[key] = self._decode(request, list(guess))
        tokens, logprobs = self._known[key]
        return [*tokens], [*logprobs]

    @torch.inference_mode()
    def _decode(self, request: Generate, guess: list[int]) -> tuple[list[int], list[np.ndarray]]:
        known = list(request.prompt_ids)
        logprobs = []
        fed, cache = [*known, *guess], DynamicCache()
        coming: list[np.ndarray] = []
        while len(known) - len(request.prompt_ids) < request.max_new_tokens:
            if not coming:
                # By place: the fourth argument's name depends on the version of transformers.
                output = self._model(torch.tensor([fed]), None, None, cache, use_cache=True)
                coming = list(output.logits[0, -1 - len(guess) :].numpy())
            logits_V = coming.pop(0)
            logprobs.append(log_softmax(logits_V))
            if request.sampling.edits is not None:
                logits_V = edited(logits_V, request.sampling.edits, known, request)
            known.append(choose(logits_V, request.sampling, request.seed, len(known)))
            fed = known[-1:]
            if known[-1] in request.stop_token_ids:
                break
            if guess and guess.pop(0) != known[-1]:
                fed, cache, guess, coming = known, DynamicCache(), [], []
        return known[len(request.prompt_ids) :], logprobs


def undrafted(request: Generate) -> bytes:
    """All of a request that its text depends on."""
    return msgspec.json.encode(
        Generate(
            sequence_id=0,
            prompt_ids=request.prompt_ids,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
        )
    )


class CachedDecoder:
    """The same for many requests that differ in little: what does not depend on how drafts are made or when a
    sequence ends is decoded once.
    """

    def __init__(self, oracle: NaiveDecoder, *, max_new_tokens: int) -> None:
        self._oracle = oracle
        self._max_new_tokens = max_new_tokens

    def decode(self, request: Generate) -> list[int]:
        """The tokens of a request for no more than `max_new_tokens`."""
        assert request.max_new_tokens <= self._max_new_tokens
        longest = msgspec.structs.replace(request, max_new_tokens=self._max_new_tokens)
        return self._oracle.decode(longest)[: request.max_new_tokens]
