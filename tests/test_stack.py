"""Layer dropout and early-exit loss of one micro-batch, against transformers and against statistics."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from training.schedules import dropout_depth
from training.stack import Batch, SkippingStack, Weighing, draw_runs, exit_hiddens

NUM_LAYERS = 4


def make_model(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def make_batch(num_samples: int = 6, num_tokens: int = 10) -> Batch:
    ids = torch.randint(96, (num_samples, num_tokens + 1), generator=torch.Generator().manual_seed(5))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(NUM_LAYERS, num_samples, dtype=torch.bool))


@torch.no_grad()
def exit_logits(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's logits by transformers alone: the hidden states it returns, through its norm and head."""
    hiddens = model(input_ids=ids_BT, output_hidden_states=True).hidden_states
    early = [model.lm_head(model.model.norm(hidden)) for hidden in hiddens[1:-1]]
    # The last one it returns has been through the norm already.
    return [*early, model.lm_head(hiddens[-1])]


def test_each_exit_s_loss_is_the_cross_entropy_of_its_logits():
    model, batch = make_model(), make_batch()
    weights = {0: 0.1, 2: 0.3, 3: 0.6}
    losses = SkippingStack(model)(batch, Weighing(weights))
    expected = {
        layer: F.cross_entropy(exit_logits(model, batch.ids_BT)[layer].flatten(0, 1), batch.next_BT.flatten())
        for layer in weights
    }
    for layer in weights:
        assert losses.of_exit[layer].item() == pytest.approx(float(expected[layer]), abs=1e-5)
    assert losses.total.item() == pytest.approx(
        sum(weights[layer] * float(expected[layer]) for layer in weights), abs=1e-5
    )


def test_a_sample_that_skips_layers_computes_what_a_model_without_them_would():
    model, batch = make_model(), make_batch(num_samples=3)
    runs = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    logits = {}
    hiddens = exit_hiddens(model, batch.ids_BT, runs)
    logits = model.lm_head(model.model.norm(hiddens[3]))
    whole = list(model.model.layers)
    for sample in range(3):
        model.model.layers = torch.nn.ModuleList(
            layer for layer, is_run in zip(whole, runs[:, sample], strict=True) if is_run
        )
        model.config.num_hidden_layers = len(model.model.layers)
        alone = model(input_ids=batch.ids_BT[sample : sample + 1], use_cache=False).logits[0]
        torch.testing.assert_close(logits[sample], alone, atol=1e-5, rtol=1e-5)


def test_a_skipped_sample_skips_the_computation():
    model, batch = make_model(), make_batch()
    seen = []
    model.model.layers[2].register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[0]))
    runs = batch.runs_LB.clone()
    runs[2, :4] = False
    SkippingStack(model)(Batch(batch.ids_BT, batch.next_BT, runs), Weighing({3: 1.0}))
    runs[2] = False
    SkippingStack(model)(Batch(batch.ids_BT, batch.next_BT, runs), Weighing({3: 1.0}))
    assert seen == [2]


def test_samples_skip_layers_as_often_as_the_schedule_says():
    num_samples, p_max = 10_000, 0.3
    dropout_L = [p_max * dropout_depth(layer, NUM_LAYERS) for layer in range(NUM_LAYERS)]
    runs_LB = draw_runs(dropout_L, num_samples, torch.Generator().manual_seed(11))
    for layer, probability in enumerate(dropout_L):
        skipped = int((~runs_LB[layer]).sum())
        five_sigma = 5 * math.sqrt(num_samples * probability * (1 - probability))
        assert abs(skipped - num_samples * probability) <= five_sigma
    # Samples draw for themselves: two layers are skipped together as often as chance has it.
    both = int((~runs_LB[2] & ~runs_LB[3]).sum())
    expected = dropout_L[2] * dropout_L[3]
    assert abs(both - num_samples * expected) <= 5 * math.sqrt(num_samples * expected * (1 - expected))
    # The bound can be missed: the same counts refute another p_max.
    assert abs(int((~runs_LB[3]).sum()) - num_samples * 0.4) > 5 * math.sqrt(num_samples * 0.24)


def test_self_distillation_aims_an_early_exit_at_the_last_layer_s_own_distribution():
    model, batch = make_model(), make_batch()
    losses = SkippingStack(model)(batch, Weighing({1: 0.5, 3: 0.5}, self_distillation=1.0))
    logits = exit_logits(model, batch.ids_BT)
    soft = F.cross_entropy(logits[1].flatten(0, 1), logits[3].softmax(-1).flatten(0, 1))
    hard = F.cross_entropy(logits[3].flatten(0, 1), batch.next_BT.flatten())
    assert losses.total.item() == pytest.approx(0.5 * float(soft) + 0.5 * float(hard), abs=1e-5)


def test_self_distillation_leaves_the_last_layer_s_own_gradient_alone():
    model, batch = make_model(), make_batch()
    own, distilled = [
        torch.autograd.grad(
            SkippingStack(model)(batch, Weighing({1: 0.5, 3: 0.5}, self_distillation=share)).total,
            model.model.layers[3].mlp.down_proj.weight,
        )[0]
        for share in (0.0, 1.0)
    ]
    torch.testing.assert_close(own, distilled)


def test_a_teacher_replaces_its_share_of_the_last_layer_s_target():
    model, batch = make_model(), make_batch()
    teacher = torch.randn(6, 10, 96, generator=torch.Generator().manual_seed(9))
    losses = SkippingStack(model)(batch, Weighing({3: 1.0}, teacher_share=0.25, teacher_BTV=teacher))
    logits = exit_logits(model, batch.ids_BT)[3].flatten(0, 1)
    soft = F.cross_entropy(logits, teacher.softmax(-1).flatten(0, 1))
    hard = F.cross_entropy(logits, batch.next_BT.flatten())
    assert losses.total.item() == pytest.approx(0.25 * float(soft) + 0.75 * float(hard), abs=1e-5)
