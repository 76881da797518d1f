"""An engine without a model: it repeats the prompt, and misbehaves when the prompt or the settings say so.

It stands where `decoding.engine.Engine` stands, in the real worker process behind the real server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from config.errors import StartupError
from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding.messages import (
    Decoded,
    FinishReason,
    Generate,
    Limits,
    Load,
    Ready,
    SamplingParams,
    StepReport,
    TextAssets,
    TokenLogprob,
)
from decoding.reports import CycleTimes

NUM_BLOCKS = 256
END_OF_TEXT = 0
CHAT_TEMPLATE = """\
{% for message in messages %}
{% if message.content == 'refuse me' %}{{ raise_exception('no such words') }}{% endif %}
<{{ message.role }}{{ ' ' + message.name if message.name else '' }}>{{ message.content | trim }}</>
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def load(settings: EngineSettings, progress: Callable[[str, float], None]) -> ScriptedEngine:
    """The name of the model is the script of its start."""
    script = Path(settings.model).name
    progress("script", 0.5)
    if script == "refused":
        raise StartupError("refused: this checkpoint\nis refused; pass another")
    if script == "fleeting" and not Path(settings.model).exists():
        raise StartupError(f"{script}: no such checkpoint")
    if script == "crashes":
        raise RuntimeError("a bug while loading")
    if script == "slow":
        time.sleep(60)
    while script == "held" and not Path(settings.model, "released").exists():
        time.sleep(0.01)
    return ScriptedEngine(settings)


@dataclass
class Script:
    """One sequence: what it will say, and how far it is."""

    request: Generate
    answer: list[int]
    text: str
    num_said: int = 0
    steps: int = 0


@dataclass
class ScriptedEngine:
    """Runs every sequence from its start, or from where it is resumed; a prompt that begins with `!` is a command.

    Served as `chat`, it has a chat template; every token is as probable as `scripted_logprob` says.

    `!slow` takes 20 ms a step, `!die` ends the process at its third step, `!hang` never returns from it,
    `!raise` raises there, `!full` is dropped there for want of memory, `!choke` ends it when it takes the prompt,
    and `!end` ends with a stop token after four tokens.
    """

    settings: EngineSettings
    tokenizer: Tokenizer = field(init=False)
    ready: Ready = field(init=False)
    running: dict[int, Script] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = (BUNDLED_CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8")
        self.tokenizer = Tokenizer.from_str(text)
        self.ready = scripted_ready(self.settings, text)
        self.num_checks = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def check_integrity(self) -> None:
        self.num_checks += 1

    def submit(self, request: Generate) -> None:
        text = self.tokenizer.decode(request.prompt_ids)
        if text.startswith("!choke"):
            os._exit(8)
        prompt_ids = request.prompt_ids
        answer = (prompt_ids * (request.max_new_tokens // len(prompt_ids) + 1))[: request.max_new_tokens]
        if text.startswith("!end") and END_OF_TEXT in request.stop_token_ids:
            answer = [*answer[:4], END_OF_TEXT]
        ends = [index for index, said in enumerate(answer) if said in request.stop_token_ids]
        answer = answer[: ends[0] + 1] if ends else answer
        self.running[request.sequence_id] = Script(request, answer, text, num_said=len(request.resumed_ids))

    def abort(self, sequence_ids: Iterable[int]) -> None:
        for sequence_id in sequence_ids:
            self.running.pop(sequence_id, None)

    def step(self) -> StepReport:
        dropped = [
            each
            for each, script in self.running.items()
            if script.steps == 2 and script.text.startswith("!full")
        ]
        self.abort(dropped)
        decoded = [self._advance(script) for script in list(self.running.values())]
        times = CycleTimes(draft_s=0.001, verify_s=0.002, host_s=0.0005, num_tokens=len(decoded))
        return StepReport(decoded=decoded, load=self._load(), times=times, out_of_memory=dropped)

    def report(self) -> StepReport:
        return StepReport(decoded=[], load=self._load())

    def _load(self) -> Load:
        used = 4 * len(self.running)
        return Load(num_running=len(self.running), num_used_blocks=used, num_free_blocks=NUM_BLOCKS - used)

    def _advance(self, script: Script) -> Decoded:
        script.steps += 1
        obey(script)
        is_first = script.num_said == 0 and script.steps == 1
        num_left = len(script.answer) - script.num_said
        drafted = 0 if is_first else min(script.request.draft_length, num_left - 1)
        kept = min(drafted, script.steps % 3)
        said = script.answer[script.num_said : script.num_said + kept + 1]
        script.num_said += len(said)
        finish = None
        if script.num_said == len(script.answer):
            is_stop = bool(said) and said[-1] in script.request.stop_token_ids
            finish = FinishReason.STOP if is_stop else FinishReason.LENGTH
            del self.running[script.request.sequence_id]
        return Decoded(
            sequence_id=script.request.sequence_id,
            token_ids=said,
            drafted=drafted,
            kept=kept,
            exit_layer=script.request.exit_layer,
            finish_reason=finish,
            queued_s=0.001 if is_first else None,
            num_cached_tokens=1 if is_first else None,
            logprobs=scripted_logprobs(said, script.request.logprobs),
            prompt_logprobs=scripted_logprobs(script.request.prompt_ids[1:], script.request.prompt_logprobs)
            if is_first
            else None,
            drafted_ids=drafts(said, drafted=drafted, kept=kept) if script.request.traces_drafts else None,
        )


def scripted_logprob(token_id: int, num_top: int) -> TokenLogprob:
    """A token of even id is the most probable one; of odd id the third, whatever it is asked beside."""
    rank = 3 if token_id % 2 else 1
    ranked = [token_id + place - rank for place in range(1, max(num_top, rank) + 1)]
    values = [-0.25 * place - token_id % 8 for place in range(1, len(ranked) + 1)]
    return TokenLogprob(values[rank - 1], rank, ranked[:num_top], values[:num_top])


def scripted_logprobs(token_ids: list[int], num_top: int | None) -> list[TokenLogprob] | None:
    if num_top is None:
        return None
    return [scripted_logprob(token_id, num_top) for token_id in token_ids]


def drafts(said: list[int], *, drafted: int, kept: int) -> list[int]:
    """Ids of a cycle's drafts: kept ones were said, the others were not."""
    return [*said[:kept], *(said[kept] + 1 + place for place in range(drafted - kept))]


def obey(script: Script) -> None:
    if script.text.startswith("!slow"):
        time.sleep(0.02)
    if script.steps < 3:
        return
    if script.text.startswith("!die"):
        os._exit(7)
    if script.text.startswith("!raise"):
        raise RuntimeError("a bug in a step")
    while script.text.startswith("!hang"):
        time.sleep(1)


def scripted_ready(settings: EngineSettings, tokenizer_json: str) -> Ready:
    return Ready(
        model=settings.model,
        revision=None,
        dtype="float32",
        device="cpu",
        limits=scripted_limits(settings),
        text=TextAssets(
            tokenizer_json,
            eos_token_ids=[END_OF_TEXT],
            special_token_ids=[0],
            chat_template=CHAT_TEMPLATE if Path(settings.model).name == "chat" else None,
        ),
        sampling=SamplingParams(),
    )


def scripted_limits(settings: EngineSettings) -> Limits:
    return Limits(
        num_layers=16,
        vocab_size=4096,
        max_model_len=settings.max_model_len or 512,
        max_num_seqs=settings.max_num_seqs,
        block_size=16,
        num_blocks=NUM_BLOCKS,
        allowed_exit_layers=[2, 4, 8],
        first_exit_layer=4,
        first_draft_length=3,
        default_exit_layer=4,
        default_draft_length=3,
        max_draft_length=settings.max_draft_length,
    )
