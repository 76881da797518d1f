"""What the operator and the loaded model allow of a request that is well formed.

Pure: a request goes in, and either what was asked for comes out or the refusal that names the range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from config.server_settings import ServerSettings
from config.setting_types import SchedulingPolicy
from decoding.messages import Drafter, Limits, LogitEdits, SamplingParams
from server.errors import AnswerTooLong, InvalidRequest
from server.openai_params import GenerationParams

_MAX_STOP_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True)
class Speculation:
    """How a request's drafts are made; None leaves it to the worker."""

    exit_layer: int | None
    draft_length: int | None
    drafter: Drafter = Drafter.EARLY_EXIT


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """New tokens a request asks for under the name `param`, and what it gets if it asks for none.

    `default` None is all that the context has room for.
    """

    asked: int | None
    default: int | None
    param: str = "max_tokens"


def check_counts(request: GenerationParams, settings: ServerSettings) -> None:
    """Bound prompts, choices and what stops them; check streaming options. Raises InvalidRequest."""
    num_prompts, num_choices = request.num_prompts, request.num_choices
    _at_most(num_choices, settings.max_n, "n")
    _at_most(num_prompts, settings.max_prompts, "prompt")
    if num_prompts * num_choices > settings.max_sequences_per_request:
        most = settings.max_sequences_per_request
        raise InvalidRequest(
            f"prompts times `n` may be at most {most}, not {num_prompts * num_choices}", param="n"
        )
    if request.best_of is not None and request.best_of != num_choices:
        raise InvalidRequest(f"`best_of` must equal `n` ({num_choices})", param="best_of")
    _at_most(len(request.stop_token_ids or ()), _MAX_STOP_TOKENS, "stop_token_ids")
    _at_most(len(request.stop_strings), settings.max_stop_strings, "stop")
    if any(len(stop) > settings.max_stop_string_chars for stop in request.stop_strings):
        most = settings.max_stop_string_chars
        raise InvalidRequest(f"a stop string may have at most {most} characters", param="stop")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("`prompt_logprobs` is not available in a stream", param="prompt_logprobs")


def resolve_priority(request: GenerationParams, settings: ServerSettings) -> int:
    """Which number a request has in line, 0 if it names none. Raises InvalidRequest where none is looked at."""
    priority = request.priority or 0
    if priority and settings.scheduling_policy is not SchedulingPolicy.PRIORITY:
        raise InvalidRequest(
            "`priority` must be 0 on a server that was not started with `--scheduling-policy priority`",
            param="priority",
        )
    return priority


def or_auto(chosen: int | None) -> int | str:
    """How an answer calls what a request asked for."""
    return "auto" if chosen is None else chosen


def resolve_speculation(request: GenerationParams, limits: Limits) -> Speculation:
    """Exit layer and draft length, the server's where the request names none. Raises InvalidRequest."""
    exit_layer, draft_length = request.exit_layer, request.draft_length
    if request.drafter is Drafter.MODEL and not limits.has_draft_model:
        raise InvalidRequest(
            '`drafter` "model" needs a server that was started with a draft model', param="drafter"
        )
    if exit_layer is not None and exit_layer not in limits.allowed_exit_layers:
        allowed = ", ".join(map(str, limits.allowed_exit_layers))
        raise InvalidRequest(f'`exit_layer` must be one of {allowed} or "auto"', param="exit_layer")
    if draft_length is not None and not 0 <= draft_length <= limits.max_draft_length:
        raise InvalidRequest(
            f'`draft_length` must be 0 to {limits.max_draft_length} or "auto"', param="draft_length"
        )
    return Speculation(
        exit_layer=limits.default_exit_layer if exit_layer is None else exit_layer,
        draft_length=limits.default_draft_length if draft_length is None else draft_length,
        drafter=request.drafter or limits.default_drafter,
    )


def resolve_sampling(
    request: GenerationParams, defaults: SamplingParams, edits: LogitEdits | None = None
) -> SamplingParams:
    """The request's sampling parameters, the checkpoint's where it names none."""
    top_k = defaults.top_k if request.top_k is None else max(request.top_k, 0)
    return SamplingParams(
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_k=top_k,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        edits=edits,
    )


def resolve_max_tokens(budget: TokenBudget, *, prompt_tokens: int, context_tokens: int) -> int:
    """New tokens allowed: by default the budget's or what is left. Raises AnswerTooLong for more than that."""
    room = context_tokens - prompt_tokens
    if budget.asked is None:
        return room if budget.default is None else min(budget.default, room)
    if budget.asked > room:
        raise AnswerTooLong(
            prompt_tokens=prompt_tokens,
            max_tokens=budget.asked,
            context_tokens=context_tokens,
            param=budget.param,
        )
    return budget.asked


def resolve_truncation(request: GenerationParams, budget: TokenBudget, *, context_tokens: int) -> int | None:
    """How many last tokens of a prompt to keep; None keeps all. Raises InvalidRequest."""
    asked = request.truncate_prompt_tokens
    if asked is None:
        return None
    if asked == -1:
        num_new = budget.asked if budget.asked is not None else budget.default
        return max(1, context_tokens - (1 if num_new is None else num_new))
    if not 1 <= asked <= context_tokens:
        raise InvalidRequest(
            f"`truncate_prompt_tokens` must be 1 to {context_tokens}, or -1 for what the context has room for",
            param="truncate_prompt_tokens",
        )
    return asked


def _at_most(count: int, limit: int, param: str) -> None:
    if count > limit:
        raise InvalidRequest(f"`{param}`: {count} are more than the {limit} allowed", param=param)
