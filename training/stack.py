"""A Llama model as LayerSkip trains it: samples skip layers, and exits have a loss.

Knows layers, hidden states and losses of one micro-batch; knows no optimizer, data or schedule over time.

Shapes: B samples, T tokens of each, D model width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: ids, the ids that follow them, and which samples run in which layer."""

    ids_BT: Tensor
    next_BT: Tensor
    runs_LB: Tensor


@dataclass(frozen=True, slots=True)
class Weighing:
    """How the loss is put together: a weight for each exit (layer index → weight, the last layer's included),
    the share of an early exit's target that is the last layer's own prediction, and the share of the last layer's
    target that is `teacher_BTV`, the logits of an untouched model.
    """

    exits: Mapping[int, float]
    self_distillation: float = 0.0
    teacher_share: float = 0.0
    teacher_BTV: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Losses:
    """The weighed loss, and each exit's own cross-entropy with the text."""

    total: Tensor
    of_exit: Mapping[int, Tensor]


class _ExitLoss(NamedTuple):
    """Cross-entropy with the text, the loss that trains, and the logits. A tuple, which compilers see through."""

    entropy: Tensor
    loss: Tensor
    logits_BTV: Tensor


class SkippingStack(nn.Module):
    """Runs a transformers Llama layer by layer. The model stays an ordinary one and is saved as such."""

    def __init__(self, model: LlamaForCausalLM, *, compiles: bool = False) -> None:
        super().__init__()
        self.model = model
        if compiles:
            # All layers are the same code, so one compilation serves them; batches shrink when samples skip.
            for layer in model.model.layers:
                layer.compile(dynamic=None)
        self._exit_loss = torch.compile(_exit_loss, dynamic=None) if compiles else _exit_loss

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.model.model.layers)

    def forward(self, batch: Batch, weighing: Weighing) -> Losses:
        """The loss of one micro-batch (equation 3): every exit through the model's own final norm and head."""
        hiddens = exit_hiddens(self.model, batch.ids_BT, batch.runs_LB)
        last = self.num_layers - 1
        final = self._loss_at(
            hiddens[last], batch.next_BT, weighing.teacher_BTV, share=weighing.teacher_share
        )
        of_exit = {last: final.entropy}
        total = weighing.exits[last] * final.loss
        own_BTV = final.logits_BTV.detach() if weighing.self_distillation else None
        for layer, weight in weighing.exits.items():
            if layer != last:
                early = self._loss_at(
                    hiddens[layer], batch.next_BT, own_BTV, share=weighing.self_distillation
                )
                of_exit[layer] = early.entropy
                total = total + weight * early.loss
        return Losses(total, {layer: entropy.detach() for layer, entropy in of_exit.items()})

    def _loss_at(
        self, hidden_BTD: Tensor, next_BT: Tensor, target_BTV: Tensor | None, *, share: float
    ) -> _ExitLoss:
        return self._exit_loss(
            self.model.model.norm, self.model.lm_head, hidden_BTD, next_BT, target_BTV, share
        )


def exit_hiddens(model: LlamaForCausalLM, ids_BT: Tensor, runs_LB: Tensor | None = None) -> list[Tensor]:
    """What leaves each layer, [B, T, D]; samples that `runs_LB` leaves out of a layer pass it by unchanged."""
    core = model.model
    hidden_BTD = core.embed_tokens(ids_BT)
    positions_1T = torch.arange(ids_BT.shape[1], device=hidden_BTD.device)[None]
    rotations = core.rotary_emb(hidden_BTD, position_ids=positions_1T)
    everyone_L = [True] * len(core.layers) if runs_LB is None else runs_LB.all(1).tolist()
    found: list[Tensor] = []
    for index, layer in enumerate(core.layers):
        if everyone_L[index]:
            hidden_BTD = _run(layer, hidden_BTD, rotations)
        else:
            assert runs_LB is not None
            running = runs_LB[index].nonzero()[:, 0]
            if len(running):
                through_BTD = _run(layer, hidden_BTD.index_select(0, running), rotations)
                hidden_BTD = hidden_BTD.index_copy(0, running, through_BTD)
        found.append(hidden_BTD)
    return found


def draw_runs(dropout_L: list[float], num_samples: int, generator: torch.Generator) -> Tensor:
    """Which samples run in which layer, [L, B]: sample b skips layer l with probability `dropout_L[l]`."""
    uniform_LB = torch.rand(len(dropout_L), num_samples, generator=generator)
    return uniform_LB >= torch.tensor(dropout_L)[:, None]


def _run(layer: nn.Module, hidden_BTD: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    out = layer(hidden_BTD, attention_mask=None, position_embeddings=rotations)
    assert isinstance(out, Tensor)
    return out


def _exit_loss(
    norm: nn.Module,
    head: nn.Module,
    hidden_BTD: Tensor,
    next_BT: Tensor,
    target_BTV: Tensor | None,
    share: float,
) -> _ExitLoss:
    """The loss of one exit, of which `share` is cross-entropy with the softmax of `target_BTV`."""
    logits_BTV = head(norm(hidden_BTD)).float()
    entropy = F.cross_entropy(logits_BTV.flatten(0, 1), next_BT.flatten())
    if target_BTV is None:
        return _ExitLoss(entropy, entropy, logits_BTV)
    soft = F.cross_entropy(logits_BTV.flatten(0, 1), target_BTV.float().softmax(-1).flatten(0, 1))
    return _ExitLoss(entropy, (1 - share) * entropy + share * soft, logits_BTV)
