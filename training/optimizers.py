"""Optimizers of a run: Muon for the matrices inside layers, AdamW for everything else.

Knows parameters by name and shape; knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from training.recipe import Optimizer

_ADAMW_BETAS = (0.9, 0.95)


def make_optimizers(model: nn.Module, chosen: Optimizer) -> list[torch.optim.Optimizer]:
    """Optimizers over the trainable parameters of `model`.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both. Norms, embedding and
    head get no weight decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if p.ndim == 2 and ".layers." in f".{name}"]
    is_inner = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in is_inner]
    rate, decay = chosen.learning_rate, chosen.weight_decay
    if chosen.name == "adamw":
        groups = [{"params": inner, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=_ADAMW_BETAS)]
    optimizers: list[torch.optim.Optimizer] = []
    if inner:
        optimizers.append(
            torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=_ADAMW_BETAS))
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the rate of the step that comes."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
