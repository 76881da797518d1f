"""What answers look like, for the document at `/openapi.json`.

Knows shapes of JSON; knows nothing of how answers are made, or of what a request may hold.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from server.openai_types import AnswerMetrics, Usage

Ending = Literal["stop", "length"]


class ErrorObject(TypedDict):
    """Why a request is not served; `param` names the field at fault, when one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """Every refusal's body."""

    error: ErrorObject


class CompletionLogprobs(TypedDict):
    """Four lists side by side, one entry for each token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class RankedLogprob(TypedDict):
    """How probable a token was at a position of the prompt; rank 1 is the most probable."""

    logprob: float
    rank: int
    decoded_token: str


class TracedCycle(TypedDict):
    """What a cycle drafted, and how many of its drafts were kept."""

    drafted_ids: list[int]
    drafted_tokens: list[str]
    kept: int
    exit_layer: int
    drafter: str


class CompletionChoice(TypedDict):
    """One continuation of one prompt; what stands there only on request may be missing."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Ending
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, RankedLogprob] | None]]
    draft_trace: NotRequired[list[TracedCycle]]


class CompletionAnswer(TypedDict):
    """A complete answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    metrics: AnswerMetrics
    system_fingerprint: None


class ChatToken(TypedDict):
    """A token, how probable it was, and its UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredChatToken(ChatToken):
    """A token of the answer beside the most probable ones."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(TypedDict):
    """One entry for each token of the answer."""

    content: list[ScoredChatToken]


class AssistantMessage(TypedDict):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    """One answer to a conversation; what stands there only on request may be missing."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Ending
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    draft_trace: NotRequired[list[TracedCycle]]


class ChatAnswer(TypedDict):
    """A complete answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: AnswerMetrics
    system_fingerprint: None
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, RankedLogprob] | None]]


class ModelCard(TypedDict):
    """One name that requests may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    """All such names."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(TypedDict):
    """Ids of a text, and how many fit."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(TypedDict):
    """The text of ids."""

    prompt: str


class LayerExpectations(TypedDict):
    """What is expected of drafts at one exit layer, from so many first drafts that are remembered.

    `acceptance` is per position, of the first few: how likely a draft is kept if all before it were.
    `draft_step_ms` is what one draft of each row takes, for every entry of `num_rows`.
    """

    exit_layer: int
    num_first_drafts: float
    acceptance: list[float]
    draft_step_ms: list[float]


class LastChoice(TypedDict):
    """What was chosen last where requests left it open; the draft length is the mean of the rows."""

    exit_layer: int
    draft_length: float


class ControllerState(TypedDict):
    """What choices rest on now: exit layers that were tried, and times of steps, for every entry of `num_rows`.

    A plain step gives each row a token without drafts, and the host's time is what it takes beside the model's;
    drafting takes `drafting_ms` beside draft steps and verifying.
    `last_choice` is null before the first.
    """

    last_choice: LastChoice | None
    exit_layers: list[LayerExpectations]
    num_rows: list[int]
    plain_step_ms: list[float]
    host_ms: list[float]
    drafting_ms: list[float]
    lookup_acceptance: list[float]


class ServerInfoAnswer(TypedDict):
    """What is served, and within which bounds.

    `controller` is null where nothing is left to choose, and until the worker has first been heard.
    """

    version: str
    model: str
    served_model_names: list[str]
    has_chat_template: bool
    revision: str | None
    dtype: str
    device: str
    tensor_parallel_size: int
    is_compiled: bool
    num_layers: int
    vocab_size: int
    allowed_exit_layers: list[int]
    default_exit_layer: int | Literal["auto"]
    default_draft_length: int | Literal["auto"]
    default_drafter: str
    first_exit_layer: int
    first_draft_length: int
    has_draft_model: bool
    scheduling_policy: str
    is_drafting_worthwhile: bool
    controller: ControllerState | None
    default_sampling: dict[str, object]
    limits: dict[str, int]
    kv_cache: dict[str, int]
    worker_pid: int | None
    models: dict[str, str]


class HealthAnswer(TypedDict):
    """How the server is, and each of its models; while one loads, how far it is."""

    status: str
    models: NotRequired[dict[str, str]]
    stage: NotRequired[str]
    fraction: NotRequired[float]
