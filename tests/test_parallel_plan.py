"""Whatever a plan says, the ranks it is sent to read the same; what they know already is not sent again."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import numpy as np
import torch

from decoding.edits import Edited, Editor, Tally
from decoding.logits import Sampling
from decoding.messages import LogitEdits, SamplingParams
from decoding.parallel_plan import PlanReader, PlanWriter
from decoding.plan import Following, Plan, PromptScoring, Wanted

CPU = torch.device("cpu")


def random_editor(rng: np.random.Generator) -> Editor:
    some = rng.integers(0, 50, size=3).tolist()
    edits = LogitEdits(
        allowed_token_ids=some if rng.random() < 0.5 else [],
        bad_words=[some, some[:1]] if rng.random() < 0.5 else [],
        min_tokens=int(rng.integers(0, 3)),
        logit_bias={7: 0.1, 9: -3.5} if rng.random() < 0.5 else {},
        frequency_penalty=float(rng.normal()),
    )
    return Editor.of(edits, num_prompt_tokens=int(rng.integers(1, 9)), stop_token_ids=some)


def random_edited(rng: np.random.Generator, editor: Editor) -> Edited:
    token_ids = rng.integers(0, 50, size=12).tolist()
    tally = Tally(editor.asked, token_ids[:5], token_ids[5:]) if rng.random() < 0.7 else None
    return Edited.of(editor, token_ids, tally)


def random_wanted(rng: np.random.Generator) -> Wanted | None:
    if rng.random() < 0.5:
        return None
    scoring = PromptScoring(int(rng.integers(0, 9)), rng.integers(0, 50, size=4), 2)
    return Wanted(
        num_top=int(rng.integers(0, 5)) if rng.random() < 0.5 else None,
        prompt=scoring if rng.random() < 0.5 else None,
        drafts=bool(rng.random() < 0.5),
    )


def random_plan(rng: np.random.Generator) -> Plan:
    num_rows = int(rng.integers(1, 6))

    def ints() -> np.ndarray:
        return rng.integers(0, 2**40, size=num_rows)

    params = [SamplingParams(temperature=float(t), top_k=3) for t in rng.choice([0, 0.5], size=num_rows)]
    seeds = rng.integers(0, 2**63 - 1, size=num_rows).tolist()
    follows = Following(ints(), ints(), ints()) if rng.random() < 0.5 else None
    edited = [random_edited(rng, random_editor(rng)) if rng.random() < 0.6 else None for _ in range(num_rows)]
    return Plan(
        sequence_ids=tuple(rng.permutation(20)[:num_rows].tolist()),
        fed_N=rng.integers(0, 50, size=int(rng.integers(1, 30))),
        **{name: ints() for name in ("num_fed_B", "num_looked_up_B", "num_computed_B")},
        **{name: ints() for name in ("draft_lengths_B", "exit_layers_B", "model_lengths_B")},
        following=follows,
        chooses_B=rng.random(num_rows) < 0.5,
        blocks_BW=rng.integers(0, 99, size=(num_rows, int(rng.integers(1, 9)))),
        sampling=Sampling.of(params, seeds, CPU),
        edited=tuple(edited),
        wanted=tuple(random_wanted(rng) for _ in range(num_rows)),
        surveyed=tuple(rng.integers(1, 9, size=int(rng.integers(0, 3))).tolist()),
    )


def next_plan(plan: Plan, rng: np.random.Generator) -> Plan:
    """The same rows a step later: other tokens, the same parameters; some of those with edits may be new."""
    edited = [
        row and random_edited(rng, row.editor if rng.random() < 0.7 else random_editor(rng))
        for row in plan.edited
    ]
    return replace(plan, fed_N=plan.fed_N + 1, edited=tuple(edited))


def assert_same(found: object, expected: object) -> None:
    """Equal values of equal kinds, all the way down."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_plans_are_read_as_they_were_written() -> None:
    """Many in a row, of the same rows and of others, by one reader from one writer."""
    rng = np.random.default_rng(5)
    writer, reader = PlanWriter(), PlanReader(CPU)
    plan = random_plan(rng)
    for _ in range(150):
        assert_same(reader.read(writer.write(plan)), plan)
        plan = random_plan(rng) if rng.random() < 0.4 else next_plan(plan, rng)


def test_what_stays_is_sent_once_and_stays_where_it_is() -> None:
    rng = np.random.default_rng(2)
    plan = random_plan(rng)
    while not any(plan.edited):
        plan = random_plan(rng)
    later = replace(plan, fed_N=plan.fed_N + 1)
    writer, reader = PlanWriter(), PlanReader(CPU)
    frames = [writer.write(plan), writer.write(later)]
    assert len(frames[1]) < len(frames[0])
    first, second = map(reader.read, frames)
    assert second.sampling is first.sampling
    for before, after in zip(first.edited, second.edited, strict=True):
        assert before is None or before.editor is after.editor


def test_a_plan_that_was_read_may_be_written_to() -> None:
    """Torch takes arrays as they are, and warns of those that are not its own to write to."""
    plan = PlanReader(CPU).read(writer_frame())
    torch.from_numpy(plan.fed_N).add_(1)
    plan.blocks_BW[0, 0] = 5


def writer_frame() -> bytes:
    return PlanWriter().write(random_plan(np.random.default_rng(1)))
