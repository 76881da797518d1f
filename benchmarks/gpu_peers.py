"""Decodes the same drawn weights with transformers, plain and with `assistant_early_exit`, and with this engine.

Knows how to drive both; knows nothing of grids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Final

import torch
from transformers import LlamaForCausalLM

from benchmarks.closed_loop import AUTO, Drafting
from benchmarks.contenders import draft_always, request_for, run_to_end
from benchmarks.gpu_cycles import Work, load_engine, plain_of
from benchmarks.gpu_device import Device, Row
from benchmarks.gpu_segments import calibrate
from benchmarks.gpu_shapes import Shape
from benchmarks.timing import Job, Prompt, Sampled
from decoding.checkpoint import open_checkpoint
from decoding.tensor_files import DrawnTensors

_ACCEPTANCE: Final = 0.8
_DRAFT_LENGTH: Final = 4
_WARM_UP_TOKENS: Final = 4

Tokens = tuple[int, ...]
Decode = Callable[[Tokens, int], Tokens]


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts to complete one at a time, each by so many tokens."""

    prompts: tuple[Tokens, ...]
    tokens: int


def measure_peers(
    shape: Shape, device: Device, dtype: torch.dtype, texts: Texts, probe: int
) -> Iterator[Row]:
    """Tokens per second of each, and where its texts part from our plain ones."""
    scale, _ = calibrate(shape, device, dtype, acceptance=_ACCEPTANCE, num_tokens=probe)
    exit_layer = shape.exit_layers[0]
    drawn = DrawnTensors(late_from=exit_layer, late_scale=scale)
    device.forget()
    plain: tuple[Tokens, ...] = ()
    plain_speed = 0.0
    for name, decode in _contenders(shape, device, dtype, drawn, scale):
        decode(texts.prompts[0], _WARM_UP_TOKENS)
        found, speeds = [], []
        for prompt in texts.prompts:
            started = time.perf_counter()
            found.append(decode(prompt, texts.tokens))
            speeds.append(texts.tokens / (time.perf_counter() - started))
        plain, plain_speed = plain or tuple(found), plain_speed or median(speeds)
        yield {
            "shape": shape.name,
            "dtype": str(dtype).removeprefix("torch."),
            "contender": name,
            "tokens_per_s": round(median(speeds), 2),
            "over_ours_plain": round(median(speeds) / plain_speed, 4),
            "texts": len(found),
            "texts_equal": sum(one == other for one, other in zip(found, plain, strict=True)),
            "tokens_before_parting": [_equal(one, other) for one, other in zip(found, plain, strict=True)],
        }


def _equal(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _contenders(
    shape: Shape, device: Device, dtype: torch.dtype, drawn: DrawnTensors, scale: float
) -> Iterator[tuple[str, Decode]]:
    """Ours first, plain before all."""
    exit_layer = shape.exit_layers[0]
    yield from _ours(shape, device, dtype, exit_layer, scale)
    device.forget()
    model = transformers_model(shape, device, dtype, drawn)
    draft_always(model.generation_config, _DRAFT_LENGTH)
    yield "transformers plain", _transformers(model)
    assisted = _transformers(model, assistant_early_exit=exit_layer)
    yield f"transformers E={exit_layer} γ={_DRAFT_LENGTH}", assisted
    del model, assisted
    device.forget()


def _ours(
    shape: Shape, device: Device, dtype: torch.dtype, exit_layer: int, scale: float
) -> Iterator[tuple[str, Decode]]:
    work = Work(context=64, cycles=64, batches=(1,))
    engine = load_engine(shape, device, work, dtype=str(dtype).removeprefix("torch."), late_scale=scale)
    ids = count()

    def decode(drafting: Drafting) -> Decode:
        def run(prompt_ids: Tokens, num_tokens: int) -> Tokens:
            # Prompts are shorter than a block, so that no prefix is found again.
            job = Job((Prompt(0, prompt_ids),), num_tokens, Sampled(0.0, 1.0))
            chosen = {"exit_layer": drafting.exit_layer, "draft_length": drafting.draft_length}
            return run_to_end(engine, [request_for(job.prompts[0], job, next(ids), **chosen)]).token_ids[0]

        return run

    yield "ours γ=0", decode(plain_of(engine))
    static = Drafting(exit_layer, _DRAFT_LENGTH)
    yield f"ours {static.name}", decode(static)
    yield "ours auto", decode(AUTO)


def transformers_model(
    shape: Shape, device: Device, dtype: torch.dtype, drawn: DrawnTensors
) -> LlamaForCausalLM:
    """transformers' own model with the very weights that the engine draws for these names."""
    checkpoint = open_checkpoint(str(shape.folder), revision=None)
    with device.torch:
        model = LlamaForCausalLM._from_config(checkpoint.config, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn.read_into(name, weight)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _transformers(model: LlamaForCausalLM, **assistance: object) -> Decode:
    def run(prompt_ids: Tokens, num_tokens: int) -> Tokens:
        ids_1T = torch.tensor([prompt_ids], device=model.device)
        out_1T = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=num_tokens,
            do_sample=False,
            **assistance,
        )
        return tuple(out_1T[0, len(prompt_ids) :].tolist())

    return run
