"""Logits of many tokens are edited together as the oracle edits each alone, to the last bit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from decoding.edited_logits import Before, apply_edits
from decoding.edits import Edited, Editor, Tally
from decoding.messages import Generate, LogitEdits, SamplingParams
from tests import oracle
from tests.mixes import one_request

CPU = torch.device("cpu")
# So few that rules often forbid all of them.
VOCAB = 7


def random_edits(rng: np.random.Generator) -> LogitEdits:
    def maybe(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    def some(most: int) -> list[int]:
        return rng.integers(0, VOCAB, size=int(rng.integers(1, most))).tolist()

    words = [some(5) for _ in range(int(rng.integers(1, 5)))] + maybe([[i] for i in range(VOCAB)], [])
    return LogitEdits(
        allowed_token_ids=maybe(some(VOCAB), []),
        bad_words=maybe([words[i] for i in rng.permutation(len(words))], []),
        min_tokens=maybe(int(rng.integers(1, 12)), 0),
        logit_bias=maybe({i: float(rng.normal()) for i in some(4)}, {}),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        frequency_penalty=maybe(float(rng.normal()), 0.0),
        presence_penalty=maybe(float(rng.normal()), 0.0),
    )


def random_request(rng: np.random.Generator) -> Generate:
    prompt_ids = rng.integers(0, VOCAB, size=int(rng.integers(1, 9))).tolist()
    stops = rng.integers(0, VOCAB, size=int(rng.choice([1, 2, 60]))).tolist()
    sampling = SamplingParams(edits=random_edits(rng) if rng.random() < 0.7 else None)
    return one_request(prompt_ids=prompt_ids, stop_token_ids=stops, sampling=sampling)


def edited_row(request: Generate, new_ids: list[int]) -> Edited | None:
    """The row of a sequence that came to know its new ids one by one."""
    edits, prompt_ids = request.sampling.edits, request.prompt_ids
    if edits is None:
        return None
    editor = Editor.of(edits, num_prompt_tokens=len(prompt_ids), stop_token_ids=request.stop_token_ids)
    tally = Tally(edits, prompt_ids, ()) if editor.penalises else None
    for token_id in new_ids if tally is not None else ():
        tally.add(token_id)
    return Edited.of(editor, [*prompt_ids, *new_ids], tally)


def expected(logits_V: np.ndarray, request: Generate, new_ids: list[int]) -> np.ndarray:
    edits, before = request.sampling.edits, [*request.prompt_ids, *new_ids]
    return logits_V if edits is None else oracle.edited(logits_V, edits, before, request)


def bits(logits: np.ndarray) -> list[bytes]:
    """Of each value; the two zeros are equal."""
    return [value.tobytes() for value in (logits + 0.0).ravel()]


def stood_though_forbidden(logits_V: np.ndarray, request: Generate, new_ids: list[int]) -> bool:
    """Whether rules together forbade all."""
    edits = request.sampling.edits
    if edits is None:
        return False
    before, num_new = [*request.prompt_ids, *new_ids], len(new_ids)
    forbidden = oracle._forbidden(edits, before, num_new, request.stop_token_ids, len(logits_V))
    return set.union(set(), *forbidden) == set(range(len(logits_V)))


def test_tokens_of_many_rows_are_edited_as_each_alone() -> None:
    """Rows of known ids and drafts in all lengths, several tokens of a row or none, beside rows without edits."""
    rng, happened = np.random.default_rng(3), Counter[str]()
    for _ in range(250):
        requests = [random_request(rng) for _ in range(int(rng.integers(1, 5)))]
        known = [rng.integers(0, VOCAB, size=int(rng.integers(0, 9))).tolist() for _ in requests]
        rows_N = np.sort(rng.integers(0, len(requests), size=int(rng.integers(1, 9))))
        num_drafts_N = rng.integers(0, 5, size=len(rows_N))
        drafts_NK = rng.integers(0, VOCAB, size=(len(rows_N), int(num_drafts_N.max())))
        logits_NV = rng.normal(size=(len(rows_N), VOCAB))
        found_NV = apply_edits(
            torch.from_numpy(logits_NV.copy()),
            [edited_row(request, ids) for request, ids in zip(requests, known, strict=True)],
            Before(rows_N, num_drafts_N, torch.from_numpy(drafts_NK)),
            most_pairs=int(rng.choice([1, 7, 1000])),
        ).numpy()
        for n, row in enumerate(rows_N.tolist()):
            new_ids = [*known[row], *drafts_NK[n, : num_drafts_N[n]].tolist()]
            assert bits(found_NV[n]) == bits(expected(logits_NV[n], requests[row], new_ids))
            happened["all"] += 1
            happened["without"] += requests[row].sampling.edits is None
            happened["forbidden"] += stood_though_forbidden(logits_NV[n], requests[row], new_ids)
    assert min(happened["without"], happened["forbidden"]) > happened["all"] / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_counts_alike_whether_it_is_known_or_a_draft(dtype: torch.dtype) -> None:
    """Wherever known ids end and drafts begin, a step of drafting and a choice of verification: the same bits."""
    rng = np.random.default_rng(4)
    for _ in range(40):
        request, new_ids = random_request(rng), rng.integers(0, VOCAB, size=6).tolist()
        logits_V = torch.from_numpy(rng.normal(size=VOCAB)).to(dtype)
        found = set()
        for num_known in range(len(new_ids) + 1):
            row, drafts = edited_row(request, new_ids[:num_known]), new_ids[num_known:]
            step = Before.step(np.array([1]), [torch.tensor([draft]) for draft in drafts], CPU)
            found_1V = apply_edits(logits_V[None].clone(), [None, row], step)
            assert found_1V.dtype == (torch.float32 if row else dtype)
            found.add(b"".join(bits(found_1V[0].double().numpy())))
        assert len(found) == 1


def test_rows_without_edits_are_not_even_copied() -> None:
    logits_NV = torch.randn(2, VOCAB)
    plain = one_request()
    before = Before.step(np.arange(2), [], CPU)
    assert apply_edits(logits_NV, [None, None], before) is logits_NV
    edits = LogitEdits(frequency_penalty=1.0)
    request = one_request(sampling=SamplingParams(edits=edits))
    found_NV = apply_edits(logits_NV, [edited_row(plain, []), edited_row(request, [])], before)
    assert found_NV is logits_NV
