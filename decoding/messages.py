"""What crosses the link between the API process and a worker: frozen values that msgspec encodes.

Knows token ids, not text; imports no torch, so that the API process may import it.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Final

import msgspec

from decoding.reports import Beliefs, CycleTimes

SEED_BITS: Final = 63


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class Drafter(StrEnum):
    """Who proposes drafts: the model's own early exit, a look at what the sequence already holds, that look
    first and early exit where it finds nothing, a separate draft model, or nobody.
    """

    EARLY_EXIT = "early_exit"
    LOOKUP = "lookup"
    HYBRID = "hybrid"
    MODEL = "model"
    NONE = "none"


class LogitEdits(msgspec.Struct, frozen=True):
    """What is done to logits before temperature and filters, in the order of these fields.

    `allowed_token_ids` empty allows all. Each of `bad_words` is a list of ids whose last may not follow the
    others. Before `min_tokens` new tokens, no stop token is chosen. Presence and frequency count new tokens,
    repetition the prompt's too.
    """

    allowed_token_ids: list[int] = []
    bad_words: list[list[int]] = []
    min_tokens: int = 0
    logit_bias: dict[int, float] = {}
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is chosen from the full model's logits.

    `temperature` 0 means argmax. `top_k` 0, `top_p` 1 and `min_p` 0 switch their filter off. `edits` is None where
    none is asked for.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    edits: LogitEdits | None = None


class Generate(msgspec.Struct, frozen=True, tag=True):
    """One sequence to decode. A request with `n` choices or several prompts is several of these.

    `seed` is the sequence's own (see `sequence_seed`). `stop_token_ids` holds every id that ends the
    sequence, end-of-sequence included unless the caller ignores it. `prompt_ids` is not empty and
    `len(prompt_ids) + max_new_tokens` fits the context; the API process has checked both. With `max_new_tokens` 0
    the prompt is computed and the sequence ends without a token.

    `logprobs` and `prompt_logprobs` ask for log-probabilities of new tokens and of the prompt's, each beside
    those of this many most probable ones; None asks for none. `exit_layer` and `draft_length` None leave the
    choice to the worker, step by step. `traces_drafts` asks for the ids of all drafts.

    Of those that wait the one of lowest `priority` is admitted first, of several the oldest; 0 is the usual one.
    `resumed_ids` are new tokens that a worker reported before it died: the sequence goes on behind them. What it
    computes is shared with sequences of the same `cache_salt` only.
    """

    sequence_id: int
    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: list[int]
    exit_layer: int | None = None
    draft_length: int | None = None
    drafter: Drafter = Drafter.EARLY_EXIT
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    traces_drafts: bool = False
    priority: int = 0
    cache_salt: str = ""
    resumed_ids: list[int] = []

    def resumed(self, reported_ids: list[int]) -> Generate:
        """The same sequence where it goes on behind `reported_ids`; nothing that came with them comes again.

        With no ids it begins anew.
        """
        if not reported_ids:
            return self
        return msgspec.structs.replace(self, resumed_ids=list(reported_ids), prompt_logprobs=None)


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop these sequences and free their KV blocks. Unknown or ended ids are ignored; no event follows."""

    sequence_ids: list[int]


Command = Generate | Abort


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """How probable a token was to the full model, before edits, temperature and filters; natural logarithm.

    `rank` is 1 for the most probable token. `top_ids` are the most probable tokens, best first, with
    `top_logprobs`.
    """

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class Decoded(msgspec.Struct, frozen=True):
    """What one cycle gave one sequence.

    `token_ids` are new and in order; a stop token that ended the sequence is the last of them. `drafted`
    and `kept` count this cycle's drafts of this sequence, made by `drafter`; drafts by early exit were made at
    `exit_layer`. `finish_reason` is set on the sequence's last event and only there. `queued_s` and
    `num_cached_tokens` (prompt tokens whose KV came from the prefix cache) are set on its first and only there.

    `logprobs` are those of `token_ids`, if asked for. `prompt_logprobs` come with the first event, from the
    prompt's second token on: the first has nothing before it. `drafted_ids` are this cycle's drafts, kept ones
    first, if a trace was asked for.
    """

    sequence_id: int
    token_ids: list[int]
    drafted: int
    kept: int
    exit_layer: int
    drafter: Drafter = Drafter.EARLY_EXIT
    finish_reason: FinishReason | None = None
    queued_s: float | None = None
    num_cached_tokens: int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    drafted_ids: list[int] | None = None


class Load(msgspec.Struct, frozen=True):
    """How full the worker is after a step; gauges, except the counters named `total`.

    `chosen_exit_layer` and `chosen_draft_length` (the rows' mean) are the latest choice where rows left it open, 0
    before the first; `is_drafting_worthwhile` turns false once no draft was found to pay.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions_total: int = 0
    num_out_of_memory_total: int = 0
    prefix_cache_queried_tokens_total: int = 0
    prefix_cache_hit_tokens_total: int = 0
    chosen_exit_layer: int = 0
    chosen_draft_length: float = 0.0
    is_drafting_worthwhile: bool = True


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """Sent after every step, and when idle after aborts and once a second; `times` is None without a step.

    `num_taken` counts the sequences that the worker was given and has survived taking, since it started.
    `out_of_memory` are sequences that were dropped, because the device's memory ran out; nothing follows of them.
    `running_ids` are those that have a place in the batch; None where all are of one priority: the oldest have it.
    `beliefs` come once a second at most, and only where something is chosen; until they do, the last ones stand.
    """

    decoded: list[Decoded]
    load: Load
    times: CycleTimes | None = None
    num_taken: int = 0
    out_of_memory: list[int] = []
    running_ids: list[int] | None = None
    beliefs: Beliefs | None = None


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress before `Ready`; `fraction` is 0..1 within `stage`."""

    stage: str
    fraction: float


class Limits(msgspec.Struct, frozen=True):
    """What the loaded checkpoint and the KV cache allow; requests are validated against it.

    `max_draft_length` bounds a request's `draft_length`; `allowed_exit_layers` is sorted and not empty;
    `num_blocks * block_size` is the number of KV tokens. Requests that name no exit layer, draft length or drafter
    get the default; where it is None the worker chooses, and begins with the first. Only with a draft model may
    they ask for its drafts.
    """

    num_layers: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    allowed_exit_layers: list[int]
    first_exit_layer: int
    first_draft_length: int
    default_exit_layer: int | None
    default_draft_length: int | None
    max_draft_length: int
    has_draft_model: bool = False
    default_drafter: Drafter = Drafter.EARLY_EXIT


class TextAssets(msgspec.Struct, frozen=True):
    """What the API process needs to turn text into ids and back, so that it never loads transformers.

    `eos_token_ids` holds every end-of-sequence id of the generation config and the tokenizer.
    """

    tokenizer_json: str
    eos_token_ids: list[int]
    special_token_ids: list[int]
    chat_template: str | None


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker serves. `sampling` holds the checkpoint's own defaults from its generation config. The model is
    spread over `tensor_parallel_size` devices, `device` the first; on a CPU its layers may be compiled.
    """

    model: str
    revision: str | None
    dtype: str
    device: str
    limits: Limits
    text: TextAssets
    sampling: SamplingParams
    draft_model: str | None = None
    tensor_parallel_size: int = 1
    is_compiled: bool = False

    @property
    def devices(self) -> str:
        """Where the model runs, in words."""
        if self.is_compiled:
            return f"{self.device}, compiled"
        if self.tensor_parallel_size == 1:
            return self.device
        return f"{self.tensor_parallel_size} × {self.device.partition(':')[0]}"

    def serves_like(self, other: Ready) -> bool:
        """Whether what the other worker began this one may go on with, as far as can be seen."""

        def seen(ready: Ready) -> tuple[object, ...]:
            limits = ready.limits
            return ready.revision, ready.dtype, ready.text, limits.num_layers, limits.vocab_size

        return seen(self) == seen(other) and self.limits.max_model_len >= other.limits.max_model_len


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker could not start, through a fault the operator can mend; `message` is one line.

    Unless it `may_pass`, another start would fail, too.
    """

    message: str
    may_pass: bool = False


Event = Loading | Ready | Failed | StepReport


def sequence_seed(request_seed: int, *, prompt_index: int, choice_index: int) -> int:
    """The seed of one sequence of a request: a stable hash, the same in every process and version 1.

    Returns an integer of `SEED_BITS` bits. Part of the public sampling contract: the same request seed
    gives the same text on every server.
    """
    digest = hashlib.blake2b(
        b"layerskip-seed-v1:%d:%d:%d" % (request_seed, prompt_index, choice_index), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)
