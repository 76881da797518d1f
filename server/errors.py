"""Every refusal a client can meet, and its shape on the wire: `{"error": {message, type, param, code}}`.

Knows statuses and words; knows nothing of when to raise them. What a client sent is never echoed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope


class ApiError(Exception):
    """A request that is not served. `param` names the request field at fault, when one is.

    `rejection` is the label it is counted under when nothing had been let in yet.
    """

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = None
    rejection: ClassVar[str | None] = "invalid"
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's error object; also what a stream ends with when it fails midway."""
        return error_body(self.message, kind=self.type, param=self.param, code=self.code)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the refusal."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class InvalidRequest(ApiError):
    """A parameter has a value that cannot be served."""


class UnsupportedParameter(ApiError):
    """A parameter that OpenAI or its peers know and this server does not offer."""

    code = "unsupported_parameter"
    rejection = "unsupported"

    def __init__(self, name: str) -> None:
        super().__init__(f"`{name}` is not supported; leave it out", param=name)


class PromptTooLong(ApiError):
    """The prompt leaves no room for one new token."""

    code = "context_length_exceeded"
    rejection = "context"

    def __init__(self, *, what: str, limit_tokens: int, param: str = "prompt") -> None:
        super().__init__(f"the prompt has {what}; at most {limit_tokens} tokens fit", param=param)


class AnswerTooLong(ApiError):
    """Prompt and `max_tokens` together exceed the context."""

    code = "context_length_exceeded"
    rejection = "context"

    def __init__(
        self, *, prompt_tokens: int, max_tokens: int, context_tokens: int, param: str = "max_tokens"
    ) -> None:
        super().__init__(
            f"{param} {max_tokens} does not fit: the context is {context_tokens} tokens and the prompt "
            f"has {prompt_tokens}; ask for at most {context_tokens - prompt_tokens}",
            param=param,
        )


class ModelNotFound(ApiError):
    """No worker serves the model that was named."""

    status = 404
    code = "model_not_found"
    rejection = "model"

    def __init__(self, asked: str, *, served: Sequence[str]) -> None:
        names = ", ".join(f"`{name}`" for name in served)
        verb = "is" if len(served) == 1 else "are"
        super().__init__(f"model `{asked[:100]}` is not served here; {names} {verb}", param="model")


class Unauthorized(ApiError):
    """The request bears no key, or none of this server's; which of the two is not said."""

    status = 401
    code = "invalid_api_key"
    rejection = "unauthorized"

    def __init__(self) -> None:
        super().__init__("a valid API key is needed, sent as `Authorization: Bearer KEY`")

    @property
    def headers(self) -> dict[str, str]:
        """How to ask instead."""
        return {"WWW-Authenticate": "Bearer"}


class QueueFull(ApiError):
    """As many sequences wait as the operator allows."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    rejection = "queue_full"
    retry_after_s = 1

    def __init__(self, *, num_open: int, limit: int) -> None:
        super().__init__(f"{num_open} sequences are running or waiting of at most {limit}; try again later")


class Unavailable(ApiError):
    """The worker cannot take requests: it is loading, gone or shutting down."""

    status = 503
    type = "server_error"
    code = "unavailable"
    rejection = "unavailable"
    retry_after_s = 1


class Draining(Unavailable):
    """The server finishes what it has and takes nothing new."""

    code = "draining"
    rejection = "draining"

    def __init__(self) -> None:
        super().__init__("the server is shutting down and takes no new requests")


class QueueTimeout(ApiError):
    """The request waited too long for a place in the batch; nothing of it was decoded."""

    status = 503
    type = "server_error"
    code = "queue_timeout"
    rejection = None
    retry_after_s = 1

    def __init__(self, *, timeout_s: float) -> None:
        super().__init__(f"no place in the batch came free within {timeout_s:g} s; try again later")


class RequestTimeout(ApiError):
    """The whole answer took longer than the operator allows."""

    status = 504
    type = "server_error"
    code = "request_timeout"
    rejection = None

    def __init__(self, *, timeout_s: float) -> None:
        super().__init__(f"the answer was not complete within {timeout_s:g} s; ask for less")

    @property
    def headers(self) -> dict[str, str]:
        """The same again would take as long: OpenAI's clients heed this and do not retry."""
        return {"x-should-retry": "false"}


class WorkerLost(ApiError):
    """The worker died while it decoded this request, and no other will."""

    status = 500
    type = "server_error"
    code = "worker_lost"
    rejection = None


class WorkerLostTwice(WorkerLost):
    """The worker died while it decoded this request, and another when it decoded this request alone."""

    def __init__(self) -> None:
        super().__init__("the worker died while it decoded this request, and once more when it did so alone")

    @property
    def headers(self) -> dict[str, str]:
        """The same again would kill again: OpenAI's clients heed this and do not retry."""
        return {"x-should-retry": "false"}


class OutOfMemory(ApiError):
    """The device had no memory for a step with this request, the newest of those that ran; others went on."""

    status = 503
    type = "server_error"
    code = "out_of_memory"
    rejection = None
    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("the device's memory ran out while it decoded this request; try again later")


class SlowReader(ApiError):
    """The client took its stream so slowly that it was dropped."""

    status = 408
    type = "server_error"
    code = "slow_reader"
    rejection = None


def error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


Refusal = Callable[[ApiError, Scope], Response]
"""Makes, and counts, the answer to a request that is not let in."""


class ErrorAnswers:
    """Answers every failure of an application in the one shape. `count` is told why a request was refused."""

    def __init__(self, *, count: Callable[[str, Scope], None]) -> None:
        self._count = count

    def register(self, app: FastAPI) -> None:
        """Answer for `app` from now on."""
        app.add_exception_handler(ApiError, self._answer_api_error)
        app.add_exception_handler(RequestValidationError, self._answer_validation_error)
        app.add_exception_handler(HTTPException, self._answer_http_error)
        app.add_exception_handler(Exception, self._answer_bug)

    def answer(self, error: ApiError, scope: Scope) -> JSONResponse:
        """The answer to a request that is refused; counts it."""
        if error.rejection is not None:
            self._count(error.rejection, scope)
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    async def _answer_api_error(self, request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return self.answer(error, request.scope)

    async def _answer_validation_error(self, request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param, message = _describe(first["type"], first["loc"], first["msg"])
        return await self._answer_api_error(request, InvalidRequest(message, param=param))

    async def _answer_http_error(self, request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        body = error_body(str(error.detail), kind="invalid_request_error")
        headers = _allowed_methods(request) if error.status_code == 405 else None
        return JSONResponse(body, status_code=error.status_code, headers=headers or error.headers)

    async def _answer_bug(self, _: Request, __: Exception) -> JSONResponse:
        """Say nothing of the inside; the traceback is in the log, under the request's id."""
        body = error_body("internal error", kind="server_error", code="internal_error")
        return JSONResponse(body, status_code=500)


def _allowed_methods(request: Request) -> dict[str, str]:
    """What may be done with a path, by all its routes: Starlette names the methods of one."""
    described = request.app.openapi()["paths"].get(request.scope["path"])
    return {"Allow": ", ".join(map(str.upper, described))} if described else {}


def _describe(kind: str, location: Sequence[int | str], message: str) -> tuple[str | None, str]:
    """The field at fault and a sentence about it, from the first of pydantic's errors."""
    if kind == "json_invalid":
        return None, "the body is not valid JSON"
    fields = [str(part) for part in location if part != "body"]
    if not fields:
        return None, "the body must be a JSON object, sent with `Content-Type: application/json`"
    reason = message.removeprefix("Value error, ")
    return fields[0], f"`{fields[0]}`: {reason[0].lower()}{reason[1:]}"
