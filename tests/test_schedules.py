"""The recipe's formulas against values worked out by hand from arXiv 2404.16710, equations 1 to 6."""

from pathlib import Path

import pytest

import training.recipe
from training.recipe import EarlyExit, LayerDropout, Recipe, RecipeError, Stage
from training.schedules import (
    Curriculum,
    ExitScale,
    OverTime,
    dropout_depth,
    dropout_time,
    exit_scale,
    exit_weights,
    gradual,
    learning_rate_factor,
    rotational,
)


def test_dropout_grows_with_depth_from_0_to_1():
    # D(l) = 2^(l / 4) − 1 for five layers.
    assert [dropout_depth(layer, 5) for layer in range(5)] == pytest.approx(
        [0.0, 0.189207115, 0.414213562, 0.681792831, 1.0], abs=1e-9
    )
    assert dropout_depth(0, 1) == 0.0


def test_dropout_grows_over_time_only_from_scratch():
    assert [dropout_time(step, 11, OverTime.EXPONENTIAL) for step in (0, 5, 10)] == pytest.approx(
        [0.0, 0.414213562, 1.0], abs=1e-9
    )
    assert {dropout_time(step, 11, OverTime.CONSTANT) for step in (0, 5, 10)} == {1.0}


def test_exits_weigh_the_sum_of_depths_and_the_last_its_depth_more():
    # L = 4, e_scale = 0.5: 0, 0.5 · 1, 0.5 · (1 + 2), then 3 + 0.5 · (1 + 2).
    scales = [exit_scale(layer, 4, 0.5) for layer in range(4)]
    assert scales == [0.0, 0.5, 1.5, 4.5]


def test_exit_weights_are_normalised_and_leave_out_what_weighs_nothing():
    weights = exit_weights(4, lambda layer: exit_scale(layer, 4, 0.5), lambda _layer: True)
    assert weights == pytest.approx({1: 0.5 / 6.5, 2: 1.5 / 6.5, 3: 4.5 / 6.5})
    assert sum(weights.values()) == pytest.approx(1.0)


def test_without_early_exit_loss_the_last_layer_weighs_exactly_1():
    assert exit_weights(4, lambda layer: exit_scale(layer, 4, 0.0), lambda _layer: True) == {3: 1.0}


def test_uniform_scale_gives_every_early_exit_the_same_weight():
    assert [exit_scale(layer, 4, 0.25, ExitScale.UNIFORM) for layer in range(4)] == [0.25, 0.25, 0.25, 1.0]


def test_rotation_takes_every_third_layer_and_moves_on_by_one_each_step():
    on = [[layer for layer in range(8) if rotational(layer, step, 3)] for step in range(4)]
    assert on == [[0, 3, 6], [1, 4, 7], [2, 5], [0, 3, 6]]


def test_gradual_enables_one_more_layer_every_tenth_step_from_the_last_down():
    # T / 2L = 80 / 8 = 10.
    def on(step: int) -> list[int]:
        return [layer for layer in range(4) if gradual(layer, step, num_layers=4, num_steps=80)]

    assert [on(step) for step in (0, 9, 10, 19, 20, 30, 79)] == [
        [3],
        [3],
        [2, 3],
        [2, 3],
        [1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]


def test_learning_rate_rises_stays_and_falls_to_nearly_nothing():
    factors = [learning_rate_factor(step, 10, num_warmup=3, decay_share=0.4) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])


_STAGES = "stages: [{until: 1, sequence_tokens: 8, micro_batch: 1}]"


def _recipe(**changes: object) -> Recipe:
    whole = {
        "name": "r",
        "num_steps": 11,
        "batch_tokens": 64,
        "stages": [Stage(until=1, sequence_tokens=8, micro_batch=4)],
    }
    return Recipe.model_validate({**whole, **changes})


def test_a_recipe_multiplies_depth_time_and_p_max():
    recipe = _recipe(layer_dropout=LayerDropout(p_max=0.2))
    assert recipe.dropout(2, 5, num_layers=5) == pytest.approx(0.2 * 0.414213562 * 0.414213562)


def test_the_last_layer_has_a_loss_at_every_step_of_every_curriculum():
    for curriculum in Curriculum:
        recipe = _recipe(early_exit=EarlyExit(curriculum=curriculum, rotation=4, e_scale=1.0, deepest=2))
        for step in range(11):
            weights = recipe.exit_weights(step, num_layers=6)
            assert 5 in weights
            assert set(weights) <= {0, 1, 5}


def test_the_batch_is_filled_by_micro_batches():
    recipe = _recipe()
    assert recipe.num_micro_batches(0) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "name: x\nnum_steps: 0\nbatch_tokens: 1\nstages: [{until: 1, sequence_tokens: 8, micro_batch: 1}]",
            "num_steps",
        ),
        (
            "name: x\nnum_steps: 1\nbatch_tokens: 1\nstages: [{until: 0.5, sequence_tokens: 8, micro_batch: 1}]",
            "until",
        ),
        (
            "name: x\nx: 3\nnum_steps: 1\nbatch_tokens: 1\n" + _STAGES,
            "x",
        ),
        ("[1, 2]", "mapping"),
        ("{", "cannot be read"),
    ],
)
def test_a_recipe_that_cannot_be_followed_says_which_key(tmp_path, text, complaint):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=complaint) as caught:
        Recipe.find(str(path))
    assert "\n" not in str(caught.value)


def test_a_recipe_changes_another_one_key_by_key(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "based_on: python-8m\nname: mine\nlayer_dropout: {p_max: 0.0}\nearly_exit: {e_scale: 0.0}\n",
        encoding="utf-8",
    )
    mine, theirs = Recipe.find(str(tmp_path / "mine.yaml")), Recipe.find("python-8m")
    assert mine.layer_dropout.p_max == 0.0
    assert mine.layer_dropout.over_time is theirs.layer_dropout.over_time
    assert mine.architecture == theirs.architecture
    assert mine.exit_weights(0, num_layers=16) == {15: 1.0}


def test_every_bundled_recipe_can_be_followed():
    names = sorted(path.stem for path in (Path(training.recipe.__file__).parent / "recipes").glob("*.yaml"))
    assert "python-8m" in names
    for name in names:
        assert Recipe.find(name).name == name
