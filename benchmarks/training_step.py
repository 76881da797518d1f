"""Times a training step with layer dropout and early-exit loss against one without, in turns.

The paper says that dropout makes training faster; what it saves depends on how well a device runs smaller batches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.report import hardware
from training.recipe import Recipe
from training.runs import new_model
from training.schedules import dropout_depth
from training.stack import Batch, SkippingStack, Weighing, draw_runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Time forward and backward of one micro-batch for each way, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipe", default="python-8m")
    parser.add_argument("--p-max", type=float, nargs="+", default=[0.1, 0.2, 0.5])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    recipe = Recipe.find(options.recipe)
    sizes, stage = recipe.architecture, recipe.stages[0]
    if sizes is None:
        parser.error("--recipe: needs one with an architecture")
    torch.manual_seed(0)
    stack = SkippingStack(new_model(sizes, recipe.data.vocab_size), compiles=recipe.compile_layers)
    stack.to(options.device)
    last = sizes.num_layers - 1
    exits = recipe.exit_weights(0, num_layers=sizes.num_layers)
    ways = {"ordinary": (0.0, {last: 1.0}), "exit loss": (0.0, exits)}
    ways |= {f"exit loss, p_max {p_max:g}": (p_max, exits) for p_max in options.p_max}
    ids = torch.randint(recipe.data.vocab_size, (stage.micro_batch, stage.sequence_tokens + 1))
    ids = ids.to(options.device)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 2):
        for name, (p_max, weights) in ways.items():
            dropout_L = [p_max * dropout_depth(layer, sizes.num_layers) for layer in range(sizes.num_layers)]
            runs_LB = draw_runs(dropout_L, stage.micro_batch, generator).to(options.device)
            batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), runs_LB)
            took = _timed(
                stack, batch, Weighing(weights, recipe.early_exit.self_distillation), options.device
            )
            # The first two rounds compile and warm up.
            if turn >= 2:
                seconds[name].append(took)
    ordinary = median(seconds["ordinary"])
    document = {
        "benchmark": "training_step",
        "hardware": hardware(),
        "recipe": recipe.name,
        "tokens": stage.micro_batch * stage.sequence_tokens,
        "seconds": {name: median(took) for name, took in seconds.items()},
        "of_ordinary": {name: median(took) / ordinary for name, took in seconds.items()},
    }
    print(json.dumps(document, ensure_ascii=False))


def _timed(stack: SkippingStack, batch: Batch, weighing: Weighing, device: str) -> float:
    started = time.perf_counter()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        losses = stack(batch, weighing)
    losses.total.backward()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    stack.zero_grad(set_to_none=True)
    return took


if __name__ == "__main__":
    main()
