"""Other programs on the same weights: transformers with a draft model or continuous batching, and llama.cpp.

Knows how to drive each; knows nothing of rounds or medians. Each is optional; llama.cpp is the package
llama-cpp-python.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from benchmarks.contenders import SEED, choice_of, draft_always, generate, load_transformers
from benchmarks.timing import Contender, Job, Run

if TYPE_CHECKING:
    from llama_cpp import Llama

_PAGE: Final = 64
_NO_TOKEN: Final = -1
"""Ends no text."""


@dataclass(frozen=True, slots=True)
class TransformersDrafted:
    """`generate(assistant_model=…)`: a separate model drafts. It decodes one prompt at a time only."""

    model: LlamaForCausalLM
    draft_model: LlamaForCausalLM
    draft_length: int
    every: int = 2

    @property
    def name(self) -> str:
        return f"transformers draft model γ={self.draft_length}"

    def run(self, job: Job) -> Run:
        """One `generate()` call; the draft length is read from the draft model, not from arguments."""
        draft_always(self.draft_model.generation_config, self.draft_length)
        return generate(self.model, job, assistant_model=self.draft_model)


@dataclass(frozen=True, slots=True)
class TransformersContinuous:
    """`generate_batch()`, with a cache of just the size that the work needs: it attends to all of it."""

    model: LlamaForCausalLM
    rows: int
    num_blocks: int
    every: int = 2
    name: str = "transformers continuous batching"

    @classmethod
    def load(cls, folder: str, *, dtype: str, rows: int, longest: int) -> Self:
        """For so many rows of up to so many tokens, prompt and answer."""
        model = load_transformers(folder, revision=None, dtype=getattr(torch, dtype))
        return cls(model, rows, rows * -(-longest // _PAGE))

    def run(self, job: Job) -> Run:
        """Greedy or sampled, from a noise of its own."""
        settings = GenerationConfig(
            max_new_tokens=job.new_tokens,
            eos_token_id=_NO_TOKEN,
            pad_token_id=0,
            **choice_of(job.sampled),
        )
        batching = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=self.num_blocks,
            max_batch_tokens=_PAGE * 4,
            max_requests_per_batch=self.rows,
            use_cuda_graph=False,
            allow_block_sharing=False,
            seed=SEED,
        )
        started = time.perf_counter()
        found = self.model.generate_batch(
            [list(prompt.token_ids) for prompt in job.prompts],
            generation_config=settings,
            continuous_batching_config=batching,
            progress_bar=False,
        )
        wall_s = time.perf_counter() - started
        texts = tuple(tuple(each.generated_tokens) for each in found.values())
        assert len(texts) == len(job.prompts)
        assert all(len(text) == job.new_tokens for text in texts)
        return Run(texts, wall_s)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp on the same weights at the same precision, one prompt at a time."""

    llama: Llama
    every: int = 2
    name: str = "llama.cpp"

    def run(self, job: Job) -> Run:
        """Each prompt evaluated from nothing, then token by token."""
        texts = []
        started = time.perf_counter()
        for prompt in job.prompts:
            self.llama.reset()
            texts.append(self._complete(list(prompt.token_ids), job))
        return Run(tuple(texts), time.perf_counter() - started)

    def _complete(self, prompt_ids: list[int], job: Job) -> tuple[int, ...]:
        sampled = job.sampled
        greedy = not sampled.temperature
        tokens = self.llama.generate(
            prompt_ids,
            temp=sampled.temperature,
            top_k=1 if greedy else 0,
            top_p=1.0 if greedy else sampled.top_p,
            min_p=0.0,
            repeat_penalty=1.0,
            reset=True,
        )
        return tuple(int(token) for token, _ in zip(tokens, range(job.new_tokens), strict=False))


@contextmanager
def llama_cpp(folder: str, *, dtype: str, threads: int, context: int) -> Iterator[LlamaCpp]:
    """llama.cpp with the checkpoint written as a GGUF file for as long as it is used. Raises ImportError."""
    from llama_cpp import Llama

    from benchmarks.gguf_export import write_gguf

    with tempfile.TemporaryDirectory(prefix="layerskip-gguf-") as temporary:
        path = Path(temporary) / "model.gguf"
        write_gguf(folder, path, dtype=dtype)
        llama = Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, seed=SEED, verbose=False
        )
        try:
            yield LlamaCpp(llama)
        finally:
            llama.close()


@dataclass(frozen=True, slots=True)
class Peers:
    """Those that are asked for; draft models are scanned over draft lengths, of which the best is a finalist."""

    drafted: tuple[TransformersDrafted, ...] = ()
    continuous: TransformersContinuous | None = None
    llama: LlamaCpp | None = None

    def finalists(self, batch: int) -> list[Contender]:
        """Who decodes batches of this size at its best: one prompt at a time, or many together."""
        chosen = self.llama if batch == 1 else self.continuous
        return [] if chosen is None else [chosen]


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """What is asked for beside transformers' plain and early-exit decoding, and for texts of which size."""

    model: str
    dtype: str
    threads: int
    rows: int
    longest: int
    draft_model: str | None = None
    draft_lengths: tuple[int, ...] = ()
    continuous_batching: bool = False
    llama_cpp: bool = False


@contextmanager
def open_peers(asked: PeerRequest, model: LlamaForCausalLM) -> Iterator[Peers]:
    """Load what is asked for; `model` is the checkpoint in transformers. Raises ImportError without llama.cpp."""
    drafted: tuple[TransformersDrafted, ...] = ()
    if asked.draft_model is not None:
        draft_model = load_transformers(asked.draft_model, revision=None, dtype=getattr(torch, asked.dtype))
        drafted = tuple(TransformersDrafted(model, draft_model, length) for length in asked.draft_lengths)
    continuous = None
    if asked.continuous_batching:
        continuous = TransformersContinuous.load(
            asked.model, dtype=asked.dtype, rows=asked.rows, longest=asked.longest
        )
    with ExitStack() as opened:
        llama = None
        if asked.llama_cpp:
            llama = opened.enter_context(
                llama_cpp(asked.model, dtype=asked.dtype, threads=asked.threads, context=asked.longest)
            )
        yield Peers(drafted, continuous, llama)
