"""What the document at `/openapi.json` says of answers: their statuses, shapes and headers.

Knows how FastAPI takes such descriptions; which route answers what is in `routes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from typing import Any, Final

from server.answer_types import ErrorAnswer, HealthAnswer
from server.errors import (
    ApiError,
    Draining,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    QueueTimeout,
    RequestTimeout,
    Unauthorized,
    Unavailable,
    WorkerLost,
)

# As FastAPI has it.
Responses = dict[int | str, dict[str, Any]]

# Whatever else a request does wrong, a method that is not allowed among it.
_ANY_FAULT: Final[Responses] = {"4XX": {"description": "The request is at fault.", "model": ErrorAnswer}}
_TOO_LARGE: Final[Responses] = {
    413: {"description": "The body is larger than the operator allows.", "model": ErrorAnswer}
}
_STREAM: Final = {
    "text/event-stream": {"example": 'data: {"choices": [{"index": 0, "text": "…"}]}\n\ndata: [DONE]\n\n'}
}


def refused(*errors: type[ApiError]) -> Responses:
    """The statuses of these refusals, each explained by what their classes say of themselves."""
    by_status = attrgetter("status")
    grouped = groupby(sorted(errors, key=by_status), by_status)
    return {status: _refusal(list(those)) for status, those in grouped} | _ANY_FAULT


def answered(shape: type) -> Responses:
    """200 with a JSON body of this shape."""
    return {200: {"description": "The answer.", "model": shape}}


def looks(shape: type, *errors: type[ApiError]) -> Responses:
    """The answers of a route that only looks."""
    return answered(shape) | refused(Unauthorized, Unavailable, *errors)


def works(shape: type, *errors: type[ApiError]) -> Responses:
    """The answers of a route that takes a body and does something with it."""
    usual = (InvalidRequest, Unauthorized, ModelNotFound, Unavailable, Draining)
    return answered(shape) | refused(*usual, *errors) | _TOO_LARGE


def generates(shape: type) -> Responses:
    """The answers of a route that decodes: at once, or as server-sent events if the request asks for a stream."""
    responses = works(shape, QueueFull, QueueTimeout, RequestTimeout, WorkerLost)
    return responses | {200: {**responses[200], "content": _STREAM}}


def is_healthy() -> Responses:
    """200, or 503 with the reason."""
    not_now = {503: {"description": "Not now, and why.", "model": HealthAnswer}}
    return answered(HealthAnswer) | not_now | _ANY_FAULT


def plain_text() -> Responses:
    """200 with text that Prometheus reads."""
    text = {"description": "Every sample.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {200: text} | refused(Unauthorized)


def _refusal(errors: list[type[ApiError]]) -> dict[str, Any]:
    description = " Or: ".join(_first_line(error) for error in errors)
    refusal: dict[str, Any] = {"description": description, "model": ErrorAnswer}
    if headers := _headers(errors):
        refusal["headers"] = headers
    return refusal


def _first_line(error: type[ApiError]) -> str:
    assert error.__doc__ is not None
    return error.__doc__.partition("\n")[0]


def _headers(errors: Iterable[type[ApiError]]) -> dict[str, Any]:
    if all(error.retry_after_s is None for error in errors):
        return {}
    return {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
