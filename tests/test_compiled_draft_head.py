"""Compiled drafts are among the tokens seen last, and no text depends on it."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from msgspec.structs import replace

from config.settings import BUNDLED_CHECKPOINT
from decoding.compiled_draft_head import num_drafted_tokens
from tests.compiled_engines import WHOLE, engine, needs_compiler, requests, text


@needs_compiler
def test_drafts_are_among_the_tokens_seen_last() -> None:
    """Against an ordered dictionary; columns are those of the whole head, and a token is found by its own id."""
    loaded = engine(compile_layers=True, draft_vocab_size=100)
    model = loaded.runtime.model
    head = model.draft_head
    assert head is not None
    held = OrderedDict.fromkeys(reversed(range(128)))
    assert head.token_ids == set(held)
    rng = np.random.default_rng(3)
    for _ in range(200):
        seen = rng.integers(0, 4096, size=int(rng.integers(1, 40)))
        assert model.see is not None
        model.see(seen)
        for token in seen.tolist():
            if token not in held:
                held.popitem(last=False)
            held[token] = None
            held.move_to_end(token)
        assert head.token_ids == set(held)
    asked = [replace(r, max_new_tokens=24, draft_length=4, traces_drafts=False) for r in requests(4, 8)]
    plain = [text(loaded.generate([replace(r, draft_length=0)])[r.sequence_id]) for r in asked]
    events = loaded.generate(asked)
    assert [text(events[number]) for number in range(4)] == plain
    assert sum(event.kept for number in range(4) for event in events[number]) > 5


@needs_compiler
def test_a_head_of_few_tokens_drafts_what_the_whole_one_would_among_them() -> None:
    few, whole = (engine(compile_layers=True, draft_vocab_size=size) for size in (512, WHOLE))
    assert few.runtime.model.draft_head is not None
    assert whole.runtime.model.draft_head is None
    asked = [replace(r, max_new_tokens=24, draft_length=1, traces_drafts=True) for r in requests(8, 9)]
    drafted: list[dict[tuple[int, int], int]] = [{}, {}]
    for loaded, by_place in zip((few, whole), drafted, strict=True):
        for number, events in loaded.generate(asked).items():
            place = 0
            for event in events:
                by_place |= {
                    (number, place + ahead): each for ahead, each in enumerate(event.drafted_ids or ())
                }
                place += len(event.token_ids)
    # Where one draft is another, the next ones are of other places.
    common = drafted[0].keys() & drafted[1].keys()
    assert len(common) > 40
    assert sum(drafted[0][each] == drafted[1][each] for each in common) > len(common) / 2


@needs_compiler
@pytest.mark.parametrize("wants_more", [False, True])
def test_tokens_are_seen_beside_a_draft_model_and_by_rows_that_want_more(wants_more: bool) -> None:
    """Neither runs in one call."""
    settings = {} if wants_more else {"draft_model": str(BUNDLED_CHECKPOINT)}
    loaded = engine(compile_layers=True, **settings)
    ids = list(range(3000, 3040))
    (asked,) = (replace(each, prompt_ids=ids, logprobs=1 if wants_more else None) for each in requests(1, 1))
    tokens = text(loaded.generate([asked])[0])
    assert {*ids, *tokens} <= loaded.runtime.model.draft_head.token_ids
    if not wants_more:
        assert loaded.runtime.draft_model.draft_head is None


@needs_compiler
def test_ids_that_are_no_tokens_are_refused() -> None:
    loaded = engine(compile_layers=True)
    for wrong in (-1, 4096):
        with pytest.raises(ValueError, match="token ids must be from 0 to 4095"):
            loaded.submit(replace(requests(1, 1)[0], prompt_ids=[5, wrong]))
    assert not loaded.has_work


@pytest.mark.parametrize(
    ("asked", "vocab_size", "expected"),
    [
        (None, 4096, 1024),
        (None, 49152, 6144),
        (None, 128256, 8192),
        (None, 1000, None),
        (100, 4096, 128),
        (4096, 4096, None),
        (4090, 4096, None),
    ],
)
def test_how_many_tokens_drafts_are_among(asked: int | None, vocab_size: int, expected: int | None) -> None:
    assert num_drafted_tokens(asked, vocab_size) == expected
