"""Asks a running server over HTTP, as a client does.

Knows URLs, keys and the parts of answers that commands need; knows nothing of how they are made.
"""

from __future__ import annotations

import http.client
import json
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import IO, Final, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

_TIMEOUT_S: Final = 600.0
# A server that is loading or full says when to come back; so often is it believed.
_MAX_WAITS: Final = 30
_MAX_WAIT_S: Final = 5.0

Body = Mapping[str, object]


class ClientError(Exception):
    """The server does not answer as one of ours does."""


class RequestLimits(msgspec.Struct, frozen=True):
    """Bounds of a request."""

    max_model_len: int
    max_draft_length: int
    max_n: int
    max_sequences_per_request: int
    max_stop_strings: int


class ServerInfo(msgspec.Struct, frozen=True):
    """What is served, and within which bounds."""

    model: str
    vocab_size: int
    allowed_exit_layers: list[int]
    limits: RequestLimits


class AnswerChoice(msgspec.Struct, frozen=True):
    """One text of an answer, and why it ended."""

    index: int
    text: str
    finish_reason: str


class DraftCounts(msgspec.Struct, frozen=True):
    """How the drafts of an answer fared."""

    num_draft_tokens: int
    num_accepted_draft_tokens: int


class _Metrics(msgspec.Struct, frozen=True):
    speculative_decoding: DraftCounts


class Answer(msgspec.Struct, frozen=True):
    """A complete answer."""

    choices: list[AnswerChoice]
    metrics: _Metrics

    @property
    def num_drafted(self) -> int:
        """Tokens drafted."""
        return self.metrics.speculative_decoding.num_draft_tokens

    @property
    def num_refused(self) -> int:
        """Drafts that did not stand."""
        return self.num_drafted - self.metrics.speculative_decoding.num_accepted_draft_tokens


_Shape = TypeVar("_Shape", ServerInfo, Answer)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key goes to the server that was named and to no other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Follow nothing."""


class ApiClient:
    """One server. May be used by several threads. Everything it raises is a ClientError."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._api_key = api_key
        if not _is_address(self._url):
            raise ClientError(f"{url} is no address of a server; pass http://HOST:PORT")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ClientError("a key holds printable ASCII characters only; mend --api-key")
        self._opener = urllib.request.build_opener(_NoRedirects)

    def server_info(self, model: str | None = None) -> ServerInfo:
        """What the server serves; of several models the one of this name, else the first."""
        query = "" if model is None else f"?model={quote(model, safe='')}"
        return self._ask(f"/server_info{query}", None, ServerInfo)

    def complete(self, body: Body) -> Answer:
        """The answer to a completion request."""
        return self._ask("/v1/completions", body, Answer)

    def curl(self, body: Body) -> str:
        """The command line that sends a completion request; the key is left to the shell."""
        key = ' -H "Authorization: Bearer $LAYERSKIP_API_KEY"' if self._api_key is not None else ""
        return (
            f"curl {shlex.quote(self._url + '/v1/completions')} -H 'Content-Type: application/json'{key} "
            f"-d {shlex.quote(json.dumps(body))}"
        )

    def _ask(self, path: str, body: Body | None, shape: type[_Shape]) -> _Shape:
        for _ in range(_MAX_WAITS):
            try:
                with self._opener.open(self._request(path, body), timeout=_TIMEOUT_S) as response:
                    return self._read(response.read(), shape)
            except urllib.error.HTTPError as error:
                with error:
                    self._wait_or_raise(error, path, body)
            except (OSError, http.client.HTTPException) as error:
                raise ClientError(f"{self._url} cannot be reached: {_reason(error)}") from error
        raise ClientError(f"{self._url} is still busy after {_MAX_WAITS} tries")

    def _request(self, path: str, body: Body | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        payload = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self._url + path, data=payload, headers=headers)

    def _read(self, content: bytes, shape: type[_Shape]) -> _Shape:
        try:
            return msgspec.json.decode(content, type=shape)
        except msgspec.DecodeError as error:
            raise ClientError(f"{self._url} is no layerskip server, or another version: {error}") from error

    def _wait_or_raise(self, error: urllib.error.HTTPError, path: str, body: Body | None) -> None:
        """Return when it is time to ask again."""
        wait_s = error.headers.get("Retry-After", "")
        if error.code in {429, 503} and wait_s.isdecimal():
            time.sleep(min(float(wait_s), _MAX_WAIT_S))
            return
        if error.code == 401:
            complaint = "wants a key" if self._api_key is None else "refuses this key"
            raise ClientError(f"{self._url} {complaint}; pass --api-key")
        if body is None:
            raise ClientError(f"{self._url} is no layerskip server: {path} is answered with {error.code}")
        raise ClientError(f"refused with {error.code}: {_message(error)}\n{self.curl(body)}")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.netloc) and url.isprintable() and " " not in url


def _message(error: urllib.error.HTTPError) -> str:
    """What a refusal says, be it ours or a stranger's."""
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return str(error.reason)


def _reason(error: OSError | http.client.HTTPException) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)
