"""Each observation is true where it holds, false where it does not, and silent where it cannot be asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from training.lens import Inspection, Reading
from training.observations import Finding, Verdict, observe
from training.token_text import TokenTexts

NUM_POSITIONS = 20
PROMPT_TOKENS = 12
OUTPUT = list(range(100, 100 + NUM_POSITIONS))
INPUT = [*range(50, 50 + PROMPT_TOKENS), *OUTPUT[PROMPT_TOKENS - 1 : -1]]
GENERATED = tuple(OUTPUT[PROMPT_TOKENS - 1 :])
OUTPUT_ROW, REPEATS, FORESEES, SETTLES = range(4)


def inspection(
    *,
    settled: Sequence[int] = (2,) * NUM_POSITIONS,
    num_layers: int = 4,
    tied: bool = True,
    raw: Sequence[int] = INPUT,
    generated: tuple[int, ...] = GENERATED,
) -> Inspection:
    """A checkpoint whose position i settles at row `settled[i]`; before it, rows say 0."""
    rows = np.arange(num_layers + 1)[:, None]
    top_RN = np.where(rows >= np.array(settled), np.array(OUTPUT), 0)
    reading = Reading(
        ids_N=np.array(INPUT),
        guesses_RNK=top_RN[:, :, None],
        probabilities_RNK=np.ones((*top_RN.shape, 1)),
        is_raw=False,
    )
    return Inspection(
        name="model",
        is_head_tied=tied,
        num_prompt_tokens=PROMPT_TOKENS,
        generated=generated,
        reading=reading,
        raw_embedding_N=np.array(raw),
        texts=TokenTexts(Tokenizer(models.BPE(vocab={}, merges=[]))),
    )


def finding(claim: int, *inspections: Inspection, of: int = 0) -> Finding:
    return observe(inspections)[claim].findings[of]


def mixed(num_first: int, first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [*first[:num_first], *second[num_first:]]


NOTHING = [0] * NUM_POSITIONS


def test_the_last_row_is_the_output_only_if_all_generated_tokens_agree() -> None:
    assert finding(OUTPUT_ROW, inspection()) == Finding(Verdict.TRUE, "9 of 9 generated tokens agree")
    other = inspection(generated=(*GENERATED[:-1], 0))
    assert finding(OUTPUT_ROW, other) == Finding(Verdict.FALSE, "8 of 9 generated tokens agree")
    assert finding(OUTPUT_ROW, inspection(generated=())).verdict == Verdict.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("num_repeated", "verdict"), [(20, "true"), (18, "true"), (17, "false"), (0, "false")]
)
def test_a_tied_head_repeats_the_input_at_nearly_every_position(num_repeated: int, verdict: str) -> None:
    found = finding(REPEATS, inspection(raw=mixed(num_repeated, INPUT, NOTHING)))
    assert found == Finding(Verdict(verdict), f"repeats the input at {num_repeated} of 20 positions")


@pytest.mark.parametrize(
    ("raw", "verdict"),
    [
        (NOTHING, "true"),
        (mixed(5, INPUT, NOTHING), "true"),
        (mixed(6, INPUT, NOTHING), "false"),
        (mixed(2, OUTPUT, NOTHING), "true"),
        (mixed(3, OUTPUT, NOTHING), "false"),
    ],
)
def test_an_untied_head_says_neither_input_nor_output(raw: list[int], verdict: str) -> None:
    found = finding(FORESEES, inspection(tied=False, raw=raw))
    repeats = sum(a == b for a, b in zip(raw, INPUT, strict=True))
    foresees = sum(a == b for a, b in zip(raw, OUTPUT, strict=True))
    numbers = (
        f"repeats the input at {repeats} of 20 positions, gives the output at {foresees} of 20 positions"
    )
    assert found == Finding(Verdict(verdict), numbers)


@pytest.mark.parametrize(("tied", "claim"), [(True, FORESEES), (False, REPEATS)])
def test_claims_about_the_other_kind_of_head_are_not_judged(tied: bool, claim: int) -> None:
    assert finding(claim, inspection(tied=tied)).verdict == Verdict.NOT_APPLICABLE


def test_the_checkpoint_that_settles_at_the_smallest_share_of_its_depth_settles_earliest() -> None:
    """Row 3 of 8 comes before row 2 of 4, though it is the higher row."""
    deep = inspection(num_layers=8, settled=[2, 4] * 10)
    shallow = inspection(num_layers=4, settled=[2] * 20)
    assert finding(SETTLES, shallow, deep, of=1) == Finding(
        Verdict.TRUE, "mean settling layer 3.0 of 8: 38% of the depth"
    )
    assert finding(SETTLES, shallow, deep, of=0) == Finding(
        Verdict.FALSE, "mean settling layer 2.0 of 4: 50% of the depth"
    )


def test_checkpoints_that_settle_equally_early_share_the_verdict() -> None:
    findings = observe([inspection(), inspection(), inspection(settled=[3] * 20)])[SETTLES].findings
    assert [found.verdict for found in findings] == [Verdict.TRUE, Verdict.TRUE, Verdict.FALSE]


def test_one_checkpoint_alone_settles_neither_early_nor_late() -> None:
    assert finding(SETTLES, inspection()).verdict == Verdict.NOT_APPLICABLE
