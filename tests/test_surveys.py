"""A survey says of a draft that was not made what would have become of it, and changes no text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from decoding.choice import Choice, DraftingRow, ExitLayers, FixedChoice, Seen
from decoding.engine import Engine
from decoding.messages import Drafter, Generate, LogitEdits, SamplingParams
from tests.choosers import NUM_LAYERS
from tests.mixes import Lab, make_lab, one_request

LAYERS = tuple(range(1, NUM_LAYERS))
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=0.0, edits=LogitEdits(frequency_penalty=0.7, repetition_penalty=1.3)),
    SamplingParams(temperature=1.2, top_k=9, edits=LogitEdits(bad_words=[[3, 11], [9]], min_tokens=5)),
)


class Surveyor(FixedChoice):
    """Drafts nothing, and surveys these exit layers at every step."""

    def __init__(self, layers: ExitLayers) -> None:
        super().__init__(exit_layer=1, draft_length=0)
        self.layers = layers
        self.found: list[dict[int, list[bool]]] = []

    def choose(
        self,
        rows: Sequence[DraftingRow],
        *,
        among: ExitLayers = (),
        num_others: int = 0,
        can_stop: bool = False,
    ) -> Choice:
        return Choice(1, (0,) * len(rows), self.layers)

    def surveyed(self, seen: Mapping[int, Sequence[Seen]]) -> None:
        self.found.append({layer: [row.is_kept for row in of_rows] for layer, of_rows in seen.items()})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Its later layers add little, so that exits agree often, but not always."""
    return make_lab(tmp_path_factory.mktemp("surveyed"))


def engine(lab: Lab, chooser: FixedChoice | None = None) -> Engine:
    return lab.fresh_engine(block_size=4, num_blocks=512, max_num_seqs=8, budget=64, chooser=chooser)


def open_request(index: int, **changes: object) -> Generate:
    asked = {"sequence_id": index, "sampling": SAMPLINGS[index], "seed": index, "max_new_tokens": 40}
    return one_request(**asked | {"exit_layer": None, "draft_length": None} | changes)


def survey(lab: Lab, requests: list[Generate], layers: ExitLayers = LAYERS) -> list[dict[int, list[bool]]]:
    chooser = Surveyor(layers)
    under_test = engine(lab, chooser)
    events = under_test.generate(requests)
    under_test.check_integrity()
    for request in requests:
        tokens = [t for event in events[request.sequence_id] for t in event.token_ids]
        assert tokens == lab.oracle.decode(request)
        assert not any(event.drafted for event in events[request.sequence_id])
    return chooser.found


def test_what_a_survey_finds_is_what_becomes_of_drafts(lab: Lab) -> None:
    seen: Counter[bool] = Counter()
    for index in range(len(SAMPLINGS)):
        found = survey(lab, [open_request(index)])
        for layer in LAYERS:
            drafting = open_request(index, exit_layer=layer, draft_length=1)
            num_tokens = 0
            for event in engine(lab).generate([drafting])[index]:
                if event.drafted:
                    # The first token comes of the prompt, where nobody drafts.
                    agreed = found[num_tokens - 1][layer]
                    assert agreed == [bool(event.kept)]
                    seen[agreed[0]] += 1
                num_tokens += len(event.token_ids)
    assert min(seen[True], seen[False]) > 40


def test_rows_together_are_surveyed_as_each_alone(lab: Lab) -> None:
    requests = [open_request(index) for index in range(len(SAMPLINGS))]
    together = survey(lab, requests, layers=(2, 3))
    alone = [each for request in requests for each in survey(lab, [request], layers=(2, 3))]
    for layer in (2, 3):
        counts = [
            Counter(kept for found in several for kept in found[layer]) for several in (together, alone)
        ]
        # Beside others a row's last step, too, is one in which somebody might draft.
        assert (counts[0] - counts[1]).total() <= len(requests)
        assert not counts[1] - counts[0]
        assert counts[1].total() == len(requests) * 38


def test_only_steps_in_which_nobody_drafts_are_surveyed_and_only_early_exits(lab: Lab) -> None:
    others = [
        open_request(1, drafter=Drafter.NONE),
        open_request(2, exit_layer=2, draft_length=3, max_new_tokens=8),
    ]
    chooser = Surveyor(LAYERS)
    events = engine(lab, chooser).generate([open_request(0), *others])
    num_drafting = sum(event.drafted > 0 for event in events[2])
    assert num_drafting >= 2
    assert len(chooser.found) <= 38 - num_drafting
    assert all(len(each[layer]) == 1 for each in chooser.found[num_drafting:] for layer in LAYERS)


def test_a_survey_runs_no_layer_twice(lab: Lab) -> None:
    model = lab.engines[4].runtime.model
    counts = []
    for layers in ((), LAYERS):
        before = model.num_layer_calls
        survey(lab, [open_request(0)], layers)
        counts.append(model.num_layer_calls - before)
    assert counts[0] == counts[1]


def test_a_text_is_the_same_with_surveys_at_any_layer(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, transparent_from=2)
    for layers in ((1,), (4,), (1, 3)):
        found = survey(lab, [open_request(0)], layers)
        assert all(each[layer] == [layer >= 2] or layer < 2 for each in found for layer in layers)
