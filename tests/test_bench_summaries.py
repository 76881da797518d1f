"""How benchmarks reduce what they measured, on numbers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.load import Burst
from benchmarks.load_client import Ask, Exchange
from benchmarks.long_prompt import largest_gap_s
from benchmarks.serve_report import Level, Pairing, Side, as_text
from benchmarks.summaries import Percentiles, Ratio, bootstrap_lower_bound


def whole(sent_s: float, *arrivals_s: float, num_tokens: int, drafted: int = 0, kept: int = 0) -> Exchange:
    """An exchange that ends half a second after its last run of tokens."""
    return Exchange(
        sent_s, list(arrivals_s), arrivals_s[-1] + 0.5, num_tokens=num_tokens, drafted=drafted, kept=kept
    )


def test_percentiles_of_a_hundred_numbers():
    found = Percentiles.of([float(value) for value in range(101)][::-1])
    assert found == Percentiles(count=101, p50=50.0, p95=95.0, p99=99.0, longest=100.0)
    assert Percentiles.of([]) is None


def test_lower_bound_of_equal_samples_is_their_value():
    assert bootstrap_lower_bound([1.25] * 15) == 1.25


def test_lower_bound_lies_below_the_median_and_holds_about_as_often_as_it_says():
    # 400 sets of 15 from a normal around 1: the bound exceeds the true median in 5 % of them, up to five sigma.
    random = np.random.default_rng(3)
    sets = random.normal(1.0, 0.1, size=(400, 15))
    bounds = np.array([bootstrap_lower_bound(samples.tolist()) for samples in sets])
    assert (bounds <= np.median(sets, axis=1)).all()
    num_wrong = int((bounds > 1.0).sum())
    assert 0 < num_wrong < 400 * 0.05 + 5 * (400 * 0.05 * 0.95) ** 0.5


def test_ratio_is_taken_pair_by_pair():
    # Together they would say 1.0; a machine that slowed down to a tenth in the second pair hides nothing.
    found = Ratio.of([200.0, 20.0, 200.0], [100.0, 10.0, 100.0])
    assert (found.num_pairs, found.median, found.lower_bound, found.lowest) == (3, 2.0, 2.0, 2.0)


def test_an_exchange_tells_first_token_gaps_and_time_a_token():
    found = whole(10.0, 10.5, 11.0, 12.5, num_tokens=5)
    assert found.ttft_s == 0.5
    assert found.gaps_s == [0.5, 1.5]
    assert found.end_to_end_s == 3.0
    # Two seconds for the four tokens after the first.
    assert found.per_token_s == 0.5
    assert Exchange(1.0).ttft_s is None
    assert Exchange(1.0).per_token_s is None


def test_a_side_counts_whole_answers_only_and_names_errors():
    failed = Exchange(0.0, [1.0], 2.0, error="HTTP 429")
    side = Side("auto", [Burst((whole(0.0, 1.0, num_tokens=8, drafted=4, kept=3), failed), wall_s=2.0)])
    side.bursts.append(Burst((whole(0.0, 1.0, num_tokens=8, drafted=4, kept=1),), wall_s=2.0))
    assert side.tokens_per_s == 4.0
    assert side.acceptance_rate == 0.5
    assert side.errors == {"HTTP 429": 1}


def test_table_of_a_pairing_names_both_sides():
    auto = Side("auto", [Burst((whole(0.0, 1.0, 2.0, num_tokens=8, drafted=8, kept=6),), wall_s=2.0)])
    plain = Side("plain", [Burst((whole(0.0, 1.0, 2.0, num_tokens=8),), wall_s=4.0)])
    lines = as_text([Pairing(Level("concurrency", 4), auto, plain)]).splitlines()
    assert lines[-2].split()[:7] == ["4", "at", "once", "auto", "4.0", "2.00", "0.75"]
    assert lines[-1].split()[:5] == ["4", "at", "once", "plain", "2.0"]


def test_the_largest_gap_is_one_that_touches_the_span():
    steady, held = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 3.5, 4.0]
    assert largest_gap_s([steady, held], 1.0, 2.0) == 3.0
    assert largest_gap_s([steady], 1.5, 2.5) == 1.0
    # Long waits that were over before, or began after, do not count.
    assert largest_gap_s([[0.0, 1.0, 2.0, 3.0, 9.0]], 0.5, 1.5) == 1.0
    assert largest_gap_s([[0.0, 5.0, 6.0, 7.0]], 5.5, 6.5) == 1.0


@pytest.mark.parametrize(("draft_length", "sent"), [(None, "auto"), (0, 0)])
def test_what_is_asked_for(draft_length: int | None, sent: object):
    body = Ask("def f(", 8, draft_length).body()
    assert body["draft_length"] == sent
    assert ("exit_layer" in body) is (draft_length is None)
    assert body["ignore_eos"] is True
