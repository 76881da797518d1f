"""In float32, on the bundled checkpoint: what parts from plain decoding, and how near probabilities are."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from benchmarks.ties import BOUND, compare
from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding.engine import Engine
from decoding.messages import Generate, SamplingParams


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tokens", "most"), [(2_000, 1), pytest.param(8_000, 3, marks=pytest.mark.exhaustive)]
)
def test_float32_parts_from_plain_decoding_only_at_ties(num_tokens: int, most: int) -> None:
    found = compare(BUNDLED_CHECKPOINT, num_tokens=num_tokens)
    assert 0 < found.num_kept < found.num_drafted
    assert found.worst_margin <= BOUND
    assert len(found.divergences) <= most


def test_log_probabilities_are_those_of_scoring_the_text_with_transformers() -> None:
    """Prompt and answer, drafted and sampled in one batch, scored again in one pass by another implementation."""
    engine = Engine.load(EngineSettings(dtype="float32", num_threads=1))
    tokenizer = Tokenizer.from_str(engine.ready.text.tokenizer_json)
    texts = ["def fibonacci(n):\n", "class Stack:\n    def __init__(self", "import os\n\n\ndef main():\n    "]
    rows = [
        Generate(
            sequence_id=i,
            prompt_ids=tokenizer.encode(text).ids,
            max_new_tokens=40,
            sampling=SamplingParams(temperature=0.7 * (i > 0)),
            seed=i,
            stop_token_ids=[],
            exit_layer=2 + i,
            draft_length=3,
            logprobs=0,
            prompt_logprobs=0,
        )
        for i, text in enumerate(texts)
    ]
    reference = LlamaForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32).eval()
    for row, events in zip(rows, engine.generate(rows).values(), strict=True):
        assert 0 < sum(e.kept for e in events) < sum(e.drafted for e in events)
        ids = torch.tensor([*row.prompt_ids, *(t for event in events for t in event.token_ids)])
        with torch.inference_mode():
            scored_TV = reference(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = scored_TV.gather(-1, ids[1:, None])[:, 0]
        given = [*(events[0].prompt_logprobs or []), *(p for event in events for p in event.logprobs or [])]
        found = torch.tensor([logprob.logprob for logprob in given])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
