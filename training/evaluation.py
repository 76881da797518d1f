"""What each exit of a checkpoint knows: loss and agreement with the last layer on held-out text.

Knows hidden states and ids; knows nothing of training or of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from training.stack import exit_hiddens


@dataclass(frozen=True, slots=True)
class ExitQuality:
    """One exit layer E on held-out text: mean cross-entropy in nats, and how often its first choice is the last
    layer's.
    """

    exit_layer: int
    loss: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All exits, shallow first, the last being the model itself; `bits_per_byte` is the model's own."""

    exits: tuple[ExitQuality, ...]
    num_tokens: int
    bits_per_byte: float

    def as_json(self) -> dict[str, Any]:
        """For a file beside the checkpoint."""
        return {
            "num_tokens": self.num_tokens,
            "loss": self.exits[-1].loss,
            "bits_per_byte": self.bits_per_byte,
            "loss_of_exit": [round(e.loss, 4) for e in self.exits],
            "agreement_of_exit": [round(e.agreement, 4) for e in self.exits],
        }


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, windows: Sequence[Tensor], *, bytes_per_token: float) -> Evaluation:
    """Run `windows`, each [T + 1] ids, through the model, and every layer's output through final norm and head."""
    num_layers = model.config.num_hidden_layers
    losses, agreeing, num_tokens = [0.0] * num_layers, [0] * num_layers, 0
    was_training = model.training
    model.eval()
    for window in windows:
        window_T = window.to(model.device)
        ids_1T, next_T = window_T[None, :-1], window_T[1:]
        hiddens = exit_hiddens(model, ids_1T)
        final_T = _logits(model, hiddens[-1]).argmax(-1)
        # One exit's logits at a time: those of all would fill the memory where the vocabulary is large.
        for index, hidden_1TD in enumerate(hiddens):
            logits_TV = _logits(model, hidden_1TD)
            losses[index] += float(F.cross_entropy(logits_TV, next_T, reduction="sum"))
            agreeing[index] += int((logits_TV.argmax(-1) == final_T).sum())
        num_tokens += len(next_T)
    model.train(was_training)
    exits = tuple(
        ExitQuality(index + 1, losses[index] / num_tokens, agreeing[index] / num_tokens)
        for index in range(num_layers)
    )
    return Evaluation(exits, num_tokens, exits[-1].loss / math.log(2) / bytes_per_token)


def _logits(model: LlamaForCausalLM, hidden_1TD: Tensor) -> Tensor:
    logits_TV: Tensor = model.lm_head(model.model.norm(hidden_1TD))[0].float()
    return logits_TV
