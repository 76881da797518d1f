"""The tiny checkpoint in float64, and what naive decoding answers to a completion's body.

Knows what parameters are documented to mean; knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from decoding.messages import Generate, LogitEdits, SamplingParams, sequence_seed
from tests.oracle import NaiveDecoder
from tests.tiny import make_checkpoint

Body = dict[str, object]

NUM_LAYERS, VOCAB, END = 5, 97, 0
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}"
FLAGS = {
    "dtype": "float64",
    "num_threads": "1",
    "max_n": "4",
    "block_size": "4",
    "num_blocks": "2048",
    "max_num_batched_tokens": "64",
}


@dataclass
class Tiny:
    """The tiny checkpoint in float64: its folder, its tokenizer and its oracle."""

    folder: Path
    tokenizer: Tokenizer = field(init=False)
    oracle: NaiveDecoder = field(init=False)

    def __post_init__(self) -> None:
        make_checkpoint(self.folder, num_layers=NUM_LAYERS, vocab=VOCAB, dtype=torch.float64)
        (self.folder / "chat.jinja").write_text(CHAT_TEMPLATE)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.oracle = NaiveDecoder(self.folder)

    @property
    def flags(self) -> list[str]:
        flags = {"model": self.folder, "chat_template": self.folder / "chat.jinja"} | FLAGS
        return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def naive_requests(tiny: Tiny, body: Body) -> Iterator[Generate]:
    """What a completion asks for, one sequence after another, as the parameters are documented."""
    given = body["prompt"]
    several = isinstance(given, list) and not isinstance(given[0], int)
    keep_last = body.get("truncate_prompt_tokens") or 0
    stops = [*body.get("stop_token_ids", ()), *([] if body.get("ignore_eos") else [END])]
    for prompt_index, prompt in enumerate(given if several else [given]):
        ids = tiny.ids(prompt) if isinstance(prompt, str) else prompt
        for choice_index in range(body.get("n", 1)):
            yield Generate(
                sequence_id=0,
                prompt_ids=ids[-keep_last:],
                max_new_tokens=body["max_tokens"],
                sampling=SamplingParams(
                    temperature=body["temperature"],
                    top_k=body.get("top_k", 0),
                    top_p=body.get("top_p", 1.0),
                    min_p=body.get("min_p", 0.0),
                    edits=naive_edits(tiny, body),
                ),
                seed=sequence_seed(body["seed"], prompt_index=prompt_index, choice_index=choice_index),
                stop_token_ids=stops,
                exit_layer=1,
                draft_length=0,
            )


def naive_edits(tiny: Tiny, body: Body) -> LogitEdits:
    words = [spelled for word in body.get("bad_words", ()) for spelled in (word, f" {word.lstrip()}")]
    return LogitEdits(
        allowed_token_ids=body.get("allowed_token_ids", []),
        bad_words=[tiny.ids(word) for word in words],
        min_tokens=body.get("min_tokens", 0),
        logit_bias={int(name): bias for name, bias in body.get("logit_bias", {}).items()},
        repetition_penalty=body.get("repetition_penalty", 1.0),
        frequency_penalty=body.get("frequency_penalty", 0.0),
        presence_penalty=body.get("presence_penalty", 0.0),
    )


def naive_cut(tiny: Tiny, body: Body, ids: list[int]) -> tuple[list[int], str]:
    """The ids up to the one that completes a stop string behind `min_tokens`, and why they end there."""
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
    for count in range(body.get("min_tokens", 0) + 1, len(ids) + 1):
        before, text = tiny.text(ids[: count - 1]), tiny.text(ids[:count])
        if any(text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in stops):
            return ids[:count], "stop"
    ends = [*body.get("stop_token_ids", ()), *([] if body.get("ignore_eos") else [END])]
    return ids, "stop" if ids and ids[-1] in ends else "length"
