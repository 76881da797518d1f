"""Who may ask: bearer keys, and the gate in front of every route that needs one.

Knows keys and the Authorization header; knows nothing of routes but the few that are open to all.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from config.errors import SettingsError
from config.server_settings import ServerSettings
from config.setting_types import is_bearer_key
from server.errors import Refusal, Unauthorized

_log = logging.getLogger("layerskip.auth")

# What tells a load balancer whether to send requests here, and the page that asks its reader for a key: nothing
# about requests, nor what is served.
OPEN_PATHS: Final = frozenset({"/", "/health", "/health/live", "/health/ready", "/ping"})


# Where the routes behind the gate find whether a request bears a key, or none is needed.
BEARS_KEY: Final = "layerskip.bears_key"


class ApiKeys:
    """The keys that open this server, as digests; none given means that it is open to all."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def chosen(cls, settings: ServerSettings) -> Self:
        """Keys of the settings and of their file. Raises SettingsError, which never shows a key."""
        keys = [key.get_secret_value() for key in settings.api_key or ()]
        return cls(keys + (_read_keys(settings.api_key_file) if settings.api_key_file else []))

    @property
    def are_needed(self) -> bool:
        """Whether a request must bear a key."""
        return bool(self._digests)

    def admit(self, authorization: str) -> bool:
        """Whether an Authorization header bears a key. Takes the same time whichever it is, or none."""
        scheme, _, key = authorization.partition(" ")
        asked = _digest(key.strip())
        # A list and no generator: every digest is compared, also after one that fits.
        fits = [hmac.compare_digest(asked, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(fits)


class KeyGate:
    """Lets a request pass that bears a key, or asks for a path that is open; `refuse` answers all others."""

    def __init__(self, app: ASGIApp, *, keys: ApiKeys, refuse: Refusal) -> None:
        self._app = app
        self._keys = keys
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; other scopes pass unchanged."""
        if scope["type"] == "http":
            scope[BEARS_KEY] = self._bears_key(scope)
        # Decided on the path the router will see: one put together with the Host header can be forged.
        if scope["type"] != "http" or scope[BEARS_KEY] or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
        else:
            await self._refuse(Unauthorized(), scope)(scope, receive, send)

    def _bears_key(self, scope: Scope) -> bool:
        if not self._keys.are_needed:
            return True
        given = Headers(scope=scope).getlist("authorization")
        return len(given) == 1 and self._keys.admit(given[0])


def warn_if_open(settings: ServerSettings, keys: ApiKeys) -> None:
    """Say so in the log when anyone who reaches this machine may use it."""
    if not keys.are_needed and not _is_loopback(settings.host):
        _log.warning(
            "listening on %s without a key: whoever reaches this port may use it; pass --api-key-file",
            settings.host,
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read_keys(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"api-key-file {path}: cannot be read; pass a text file, one key a line"
        ) from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        # An empty file must not open the server to all.
        raise SettingsError(f"api-key-file {path}: holds no key; write one a line")
    if not all(map(is_bearer_key, keys)):
        raise SettingsError(f"api-key-file {path}: a key is made of printable ASCII characters but no space")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
