"""Steps in one call of compiled code are those that go part by part; rows stop where they are told to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from decoding.choice import Choice, DraftingRow, FixedChoice, Seen
from decoding.compiled_cycle import CompiledCycle
from decoding.compiled_rows import PlacedColumns
from decoding.confidence import EDGES
from decoding.coupling import choose
from decoding.engine import Engine
from decoding.logits import Sampling, process
from decoding.messages import Drafter, SamplingParams
from decoding.noise import gumbel_noise
from decoding.plan import Plan, Result
from tests.compiled_engines import WHOLE, engine, needs_compiler, requests, with_chooser

CPU = torch.device("cpu")


def run_by_parts(loaded: Engine) -> None:
    """From now on it leaves nothing to one call."""
    cycle = loaded.runtime.cycle
    assert isinstance(cycle, CompiledCycle)
    loaded._stepper._runner = cycle.by_parts


class Both:
    """Runs each plan by parts and in one call, which must come to the same."""

    def __init__(self, cycle: CompiledCycle) -> None:
        self._cycle = cycle
        self.plans: list[Plan] = []

    def run(self, plan: Plan) -> Result:
        expected, found = self._cycle.by_parts.run(plan), self._cycle.run(plan)
        assert found.chosen == expected.chosen
        self.plans.append(plan)
        return found


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drafter", [Drafter.EARLY_EXIT, Drafter.HYBRID])
def test_one_call_does_what_the_parts_do(dtype: str, drafter: Drafter) -> None:
    """Prompts in chunks beside rows that decode, drafts of all lengths, looked-up ones among them."""
    loaded = engine(
        compile_layers=True, dtype=dtype, draft_vocab_size=WHOLE, max_num_batched_tokens=40, max_num_seqs=8
    )
    loaded._stepper._runner = both = Both(loaded.runtime.cycle)
    for seed in range(3):
        # Texts that repeat themselves are found; none goes beyond the context.
        asked = [
            replace(each, prompt_ids=(each.prompt_ids * (1 + each.sequence_id % 3))[:100])
            for each in requests(9, seed, drafter=drafter)
        ]
        loaded.generate(asked)
        loaded.check_integrity()
    assert sum(plan.draft_lengths_B.sum() for plan in both.plans) > 60
    assert any(plan.num_fed_B.max() > 4 for plan in both.plans)
    assert any(not plan.chooses_B.all() for plan in both.plans)
    assert any(plan.num_looked_up_B.any() for plan in both.plans) is (drafter is Drafter.HYBRID)


@needs_compiler
def test_layers_are_run_once_a_step_whatever_rows_there_are() -> None:
    loaded = engine(compile_layers=True)
    model = loaded.runtime.model
    for each in requests(4, 0, draft_length=3):
        loaded.submit(replace(each, max_new_tokens=20))
    while loaded.has_work:
        before = model.num_layer_calls
        decoded = loaded.step().decoded
        drafted = max((event.drafted for event in decoded), default=0)
        assert model.num_layer_calls - before == model.num_layers + 4 * drafted


def graded(logits_MV: torch.Tensor, sampling: Sampling, positions_M: torch.Tensor) -> list[int]:
    """By the published rule: how far the chosen token's noised score is above the next one's."""
    chosen_M = choose(logits_MV, sampling, positions_M)
    # Nothing is filtered where nothing is drawn.
    is_greedy_M1 = (sampling.temperatures_N <= 0)[:, None]
    scores_MV = torch.where(is_greedy_M1, logits_MV, process(logits_MV, sampling))
    noise_MV = gumbel_noise(sampling.keys_2N, positions_M, logits_MV.shape[1], dtype=scores_MV.dtype)
    noise_MV.masked_fill_(is_greedy_M1, 0.0)
    noised_MV = scores_MV + noise_MV
    best_M2 = noised_MV.topk(2, dim=1).values
    assert torch.equal(noised_MV.argmax(1), chosen_M)
    return np.searchsorted(EDGES, (best_M2[:, 0] - best_M2[:, 1]).numpy(), side="right").tolist()


@needs_compiler
def test_surveys_in_one_call_find_what_parts_find_and_how_sure_it_was() -> None:
    class Surveyor(FixedChoice):
        def __init__(self) -> None:
            super().__init__(exit_layer=1, draft_length=0)
            self.seen: list[dict[int, list[Seen]]] = []

        def choose(self, rows: Sequence[DraftingRow], **kinds: object) -> Choice:
            return Choice(1, (0,) * len(rows), (2, 5, 9))

        def surveyed(self, seen: Mapping[int, Sequence[Seen]]) -> None:
            self.seen.append({layer: list(of_rows) for layer, of_rows in seen.items()})

    found = []
    for by_parts in (False, True):
        loaded, chooser = engine(compile_layers=True, draft_vocab_size=WHOLE), Surveyor()
        if by_parts:
            run_by_parts(loaded)
        asked = [replace(each, exit_layer=None, draft_length=None) for each in requests(6, 4)]
        with_chooser(loaded, chooser).generate(asked)
        found.append(chooser.seen)
    kept = [[[row.is_kept for row in of] for each in seen for of in each.values()] for seen in found]
    assert kept[0] == kept[1]
    assert {is_kept for of in kept[0] for is_kept in of} == {True, False}
    grades = {row.grade for each in found[0] for of in each.values() for row in of}
    assert None not in grades
    assert len(grades) > 6
    assert all(row.grade is None for each in found[1] for of in each.values() for row in of)


@needs_compiler
def test_grades_are_those_of_margins_by_the_published_rule() -> None:
    """Of the first drafts of rows, whose exit hiddens are computed part by part."""
    loaded = engine(compile_layers=True, draft_vocab_size=WHOLE)
    model, plans = loaded.runtime.model, []

    class Watcher:
        def run(self, plan: Plan) -> Result:
            result = loaded.runtime.cycle.run(plan)
            plans.append((plan, result))
            return result

    loaded._stepper._runner = Watcher()
    asked = [replace(each, max_new_tokens=8, draft_length=1) for each in requests(9, 7)]
    loaded.generate(asked)
    compared = 0
    for plan, result in plans:
        own = np.flatnonzero(plan.draft_lengths_B)
        if not result.grades or not len(own):
            continue
        route = loaded.runtime.cycle.by_parts._routes.of(plan)
        slots_BT = loaded.runtime.cycle.by_parts.slots(plan.blocks_BW)
        with torch.inference_mode():
            drafter = loaded.runtime.cycle.by_parts._drafter
            lasts = torch.from_numpy(plan.fed_N)[route.last_fed_B]
            exits_MD = drafter.draft(plan, route, slots_BT, lasts).exits_MD
            logits_MV = model.logits(exits_MD)
        positions_M = torch.from_numpy(plan.num_computed_B[: len(own)] + 1)
        sampling = plan.sampling.first(len(own))
        if sampling.any_sampled:
            assert graded(logits_MV, sampling, positions_M) == [
                grades[0] for grades in result.grades[: len(own)]
            ]
            compared += len(own)
    assert compared > 15


def test_columns_are_kept_for_orders_that_come_back() -> None:
    params = [SamplingParams(temperature=0.5), SamplingParams(temperature=0.9)]
    there, back = Sampling.of(params, [1, 2], CPU), Sampling.of(params[::-1], [2, 1], CPU)
    cycle = CompiledCycle.__new__(CompiledCycle)
    cycle._columns = OrderedDict()
    first = cycle._placed(there)
    assert isinstance(first, PlacedColumns)
    assert cycle._placed(back) is not first
    assert cycle._placed(there) is first
    for _ in range(20):
        cycle._placed(Sampling.of(params, [1, 2], CPU))
    assert len(cycle._columns) == 8
