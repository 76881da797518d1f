"""What a code-completion checkpoint writes, and how much of it its early exits would have written.

On beginnings of functions and classes from text that was held out of training (`--run`, a folder of
`layerskip train`): the share of sampled completions that parse as Python up to their last full statement, how
varied they are, and the acceptance rate of greedy drafts by exit layer. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import codeop
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding.engine import Engine
from decoding.messages import Decoded, Generate, SamplingParams, sequence_seed

_SHOWN = (
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self",
    'import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(description="Count words")\n',
    "def read_lines(path):\n    with open(",
    "    def test_",
)
_PROMPT_LINES = 3
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what followed it."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    drafted: int
    kept: int


@dataclass(frozen=True, slots=True)
class Writer:
    """An engine, its tokenizer, and ids that never repeat."""

    engine: Engine
    tokenizer: Tokenizer
    sequence_ids: Iterator[int]
    new_tokens: int

    def complete(
        self, prompts: Sequence[str], *, temperature: float, exit_layer: int, draft_length: int
    ) -> list[Completion]:
        """Continue each prompt, up to an end of text."""
        requests = {next(self.sequence_ids): prompt for prompt in prompts}
        ids = {key: self.tokenizer.encode(prompt).ids for key, prompt in requests.items()}
        events = self.engine.generate(
            Generate(
                sequence_id=key,
                prompt_ids=ids[key],
                max_new_tokens=self.new_tokens,
                sampling=SamplingParams(temperature=temperature, top_p=0.95 if temperature else 1.0),
                seed=sequence_seed(7, prompt_index=index, choice_index=0),
                stop_token_ids=self.engine.ready.text.eos_token_ids,
                exit_layer=exit_layer,
                draft_length=draft_length,
            )
            for index, key in enumerate(requests)
        )
        return [self._completion(requests[key], ids[key], events[key]) for key in requests]

    def _completion(self, prompt: str, prompt_ids: list[int], events: list[Decoded]) -> Completion:
        new = [token for event in events for token in event.token_ids]
        whole = self.tokenizer.decode([*prompt_ids, *new])
        return Completion(
            prompt=prompt,
            text=whole[len(prompt) :],
            token_ids=tuple(new),
            drafted=sum(event.drafted for event in events),
            kept=sum(event.kept for event in events),
        )


def parses_to_last_statement(text: str) -> bool:
    """Whether `text`, its last line left out as unfinished, is Python that is whole or only lacks its end."""
    lines = text[: text.rfind("\n") + 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            codeop.compile_command(lines, symbol="exec")
        except (SyntaxError, ValueError, OverflowError):
            return False
    return True


def distinct_share(texts: Sequence[Sequence[int]], *, n: int = 4) -> float:
    """Distinct n-grams over all n-grams, within each text; the mean over texts that have any."""
    grams_of = [[tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)] for ids in texts]
    shares = [len(set(grams)) / len(grams) for grams in grams_of if grams]
    return sum(shares) / len(shares)


def held_out_prompts(run: Path, num_prompts: int) -> list[str]:
    """Beginnings of top-level functions and classes, spread evenly over the held-out text of a training run."""
    tokenizer = Tokenizer.from_file(str(run / "texts" / "tokenizer.json"))
    ids = np.load(run / "texts" / "held_out.npy")
    lines = tokenizer.decode(ids.tolist(), skip_special_tokens=True).splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if line.startswith(("def ", "class "))]
    chosen = [starts[int(place)] for place in np.linspace(0, len(starts) - 1, num_prompts)]
    return ["".join(lines[start : start + _PROMPT_LINES]) for start in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, judge, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT))
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--exit-layers", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    engine = Engine.load(EngineSettings(model=options.model, max_num_seqs=_BATCH))
    tokenizer = Tokenizer.from_str(engine.ready.text.tokenizer_json)
    writer = Writer(engine, tokenizer, count(), options.new_tokens)
    prompts = held_out_prompts(options.run, options.prompts)
    sampled = writer.complete(prompts, temperature=options.temperature, exit_layer=1, draft_length=0)
    for shown in writer.complete(_SHOWN, temperature=0.0, exit_layer=1, draft_length=0):
        print(f"--- {shown.prompt!r}\n{shown.prompt}{shown.text}\n")
    acceptance = {}
    for exit_layer in options.exit_layers:
        greedy = writer.complete(
            prompts, temperature=0.0, exit_layer=exit_layer, draft_length=options.draft_length
        )
        acceptance[exit_layer] = sum(c.kept for c in greedy) / sum(c.drafted for c in greedy)
    document = {
        "benchmark": "completions",
        "model": Path(options.model).name,
        "num_prompts": len(prompts),
        "new_tokens": options.new_tokens,
        "temperature": options.temperature,
        "parsing": sum(parses_to_last_statement(c.prompt + c.text) for c in sampled) / len(sampled),
        "distinct_4_grams": distinct_share([c.token_ids for c in sampled]),
        "distinct_4_grams_greedy": distinct_share([c.token_ids for c in greedy]),
        "draft_length": options.draft_length,
        "acceptance_rate": acceptance,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
