"""What a sweep found: a hump is told from noise, and words, plots and profiles say what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.sweep_plots import draw_curves, draw_grids
from benchmarks.sweep_report import PROFILES, Circumstances, in_words, write_profile
from benchmarks.sweep_table import ALL_DOMAINS, Row, Shape, Table
from config.errors import SettingsError
from config.profiles import Profile, known_profiles

ROW = Row(
    domain="tests",
    exit_layer=1,
    draft_length=1,
    speed_ups=(1.0,),
    tokens_per_s=100.0,
    plain_tokens_per_s=100.0,
    predicted_speed_up=1.0,
    acceptance_rate=0.5,
    tokens_per_cycle=1.5,
    draft_step_ms=1.0,
    verify_ms=4.0,
    plain_step_ms=5.0,
    drafted=10,
    kept=5,
    tokens_compared=20,
    tokens_different=0,
)
FACTS = Circumstances(
    date="2030-01-31",
    hardware={"device": "a machine", "threads": 1},
    settings={"dtype": "float32", "temperature": 0.0, "new_tokens": 96},
    is_complete=True,
)


def row(exit_layer: int, draft_length: int, *speed_ups: float, domain: str = "tests") -> Row:
    return replace(ROW, exit_layer=exit_layer, draft_length=draft_length, speed_ups=speed_ups, domain=domain)


def table(*rows: Row) -> Table:
    domains = tuple(dict.fromkeys(each.domain for each in rows))
    return Table(checkpoint="some-checkpoint", num_layers=8, domains=domains, rows=rows)


@pytest.mark.parametrize(
    ("speed_ups", "noise", "rises", "falls"),
    [
        ((1.0, 1.3, 1.1), 0.01, True, True),
        ((1.3, 1.2, 1.0), 0.01, False, True),
        ((1.0, 1.2, 1.3), 0.01, True, False),
        ((1.1, 1.11, 1.1), 0.01, False, False),
        ((1.0, 1.3, 1.25), 0.03, True, False),
        ((1.0, 1.3, 1.25), 0.02, True, True),
        ((1.0, 1.01, 1.0), None, True, True),
        ((1.2,), 0.01, False, False),
    ],
)
def test_hump_needs_both_ends_lower_than_the_best_by_two_deviations(speed_ups, noise, rises, falls):
    shape = Shape(exit_layers=tuple(range(1, len(speed_ups) + 1)), speed_ups=speed_ups, noise=noise)
    assert (shape.rises, shape.falls, shape.is_hump) == (rises, falls, rises and falls)


@pytest.mark.parametrize(
    ("speed_ups", "words"),
    [
        ((1.0, 1.3, 1.1), "The hump appears: rise, sweet spot at exit layer 4, fall ("),
        ((0.7, 0.9, 0.6), "all of it below break-even"),
        ((1.3, 1.2, 1.0), "its rise is missing"),
        ((1.0, 1.2, 1.3), "its fall is missing"),
        ((1.1, 1.1, 1.1), "rise and fall are both missing"),
    ],
)
def test_words_say_which_part_of_the_hump_is_missing(speed_ups, words):
    assert words in Shape(exit_layers=(2, 4, 8), speed_ups=speed_ups, noise=0.01).in_words()


def test_two_exit_layers_show_no_hump():
    shape = Shape(exit_layers=(1, 2), speed_ups=(1.0, 1.3), noise=0.01)
    assert not shape.is_hump
    assert "cannot show a hump" in shape.in_words()


def test_noise_pools_the_variances_between_repeats_of_the_curve():
    curve = [row(1, 1, 0.9, 1.1), row(2, 1, 1.2, 1.2), row(3, 1, 1.0, 1.0)]
    # Sample variances are 0.02, 0 and 0; their mean's root is the pooled deviation.
    assert Shape.of(curve).noise == pytest.approx((0.02 / 3) ** 0.5)
    assert Shape.of([*curve, row(4, 1, 1.0)]).noise is None


def test_curve_takes_the_fastest_draft_length_of_each_exit_layer_in_order():
    rows = [row(3, 1, 1.0), row(3, 2, 1.4), row(1, 1, 1.1), row(1, 2, 0.9)]
    curve = table(*rows).curve("tests")
    assert [(r.exit_layer, r.draft_length) for r in curve] == [(1, 1), (3, 2)]


def test_means_weigh_domains_alike_and_leave_out_settings_that_a_domain_lacks():
    rows = [row(1, 1, 1.0, 1.2), row(1, 1, 1.4, 1.6, domain="prose"), row(2, 1, 9.0, 9.0)]
    (mean,) = table(*rows).of(ALL_DOMAINS)
    assert mean.speed_ups == pytest.approx((1.2, 1.4))
    assert mean.speed_up == pytest.approx(1.3)
    assert (mean.drafted, mean.kept, mean.domain) == (20, 10, ALL_DOMAINS)
    assert mean.acceptance_rate == pytest.approx(0.5)


def test_written_profile_is_one_that_serve_would_read(tmp_path: Path):
    found = table(row(2, 1, 1.1), row(4, 3, 1.25))
    path = write_profile("my-checkpoint", found, FACTS, tmp_path)
    profile = Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert (profile.checkpoints, profile.exit_layer, profile.draft_length) == (("my-checkpoint",), 4, 3)
    assert all(part in profile.source for part in ("2030-01-31", "a machine", "1.25 times"))


def test_profile_of_a_checkpoint_that_drafts_too_slowly_switches_drafting_off(tmp_path: Path):
    found = table(row(2, 1, 0.7), row(4, 3, 0.96))
    path = write_profile("slow", found, FACTS, tmp_path)
    profile = Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert (profile.exit_layer, profile.draft_length) == (4, 0)
    assert "Use draft length 0" in in_words(found)


def test_profile_tells_acceptance_by_exit_layer_where_single_drafts_were_measured(tmp_path: Path):
    rows = row(2, 1, 1.1), row(4, 1, 1.2), row(4, 3, 1.4), row(6, 3, 1.3)
    rates = (0.61234, 0.8, 0.7, 0.75)
    found = table(*(replace(each, acceptance_rate=rate) for each, rate in zip(rows, rates, strict=True)))
    path = write_profile("known", found, FACTS, tmp_path)
    profile = Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert profile.acceptances == {2: 0.612, 4: 0.8}
    assert profile.acceptance == 0.8


def test_profile_replaces_its_own_file_and_no_other(tmp_path: Path):
    found = table(row(2, 1, 1.1))
    write_profile("mine", found, FACTS, tmp_path)
    assert write_profile("mine", found, FACTS, tmp_path) == tmp_path / "mine.yaml"
    (tmp_path / "mine.yaml").rename(tmp_path / "family.yaml")
    with pytest.raises(SettingsError, match=r"family\.yaml already speaks"):
        write_profile("Mine", found, FACTS, tmp_path)
    with pytest.raises(SettingsError, match="last part"):
        write_profile("../elsewhere", found, FACTS, tmp_path)


def test_profiles_go_by_default_where_serve_looks_for_them():
    held = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(PROFILES.glob("*.yaml"))]
    assert held
    assert tuple(map(Profile.model_validate, held)) == known_profiles()


def test_plots_are_drawn_with_and_without_a_twin(tmp_path: Path):
    found = table(*(row(layer, length, 0.3 * layer) for layer in (1, 2, 4) for length in (1, 2)))
    twin = replace(found, checkpoint="twin")
    for tables in ([found], [found, twin]):
        for draw in (draw_curves, draw_grids):
            draw(tables, tmp_path / "plot.png")
            assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
