"""The log: one line for each request that ended, and how every line is written.

Knows fields and formats. No prompt, no text and no key is ever among them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

from starlette.types import Scope

from config.setting_types import LogFormat, LogLevel

_log = logging.getLogger("layerskip.access")

_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_FIELDS: Final = "layerskip_fields"
_OUTCOME: Final = "layerskip.outcome"
# What is asked many times a minute and says the same each time.
_UNLOGGED: Final = ("/health", "/metrics", "/ping")


@dataclass(frozen=True, slots=True)
class AnswerSummary:
    """What an answer came to, over all its choices. None where nothing came, or nothing was drafted."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    exit_layer: int | str
    draft_length: int | str
    acceptance: float | None
    ttft_ms: float | None
    finish_reason: str


class Outcome(Protocol):
    """An answer that can say what it came to, also when it was cut short."""

    @property
    def summary(self) -> AnswerSummary:
        """What it came to so far."""


def note_outcome(scope: Scope, outcome: Outcome) -> None:
    """For a route: what its answer came to belongs on the request's line."""
    scope[_OUTCOME] = outcome


def log_request(scope: Scope, *, request_id: str, status: int, total_ms: float, remark: str | None) -> None:
    """Write a request's line, unless it is one of those that never have one: no query, no body."""
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace").partition("?")[0]
    if path.startswith(_UNLOGGED):
        return
    fields: dict[str, object] = {
        "id": request_id,
        "method": scope["method"],
        "route": path,
        "status": status,
        "total_ms": total_ms,
    }
    outcome: Outcome | None = scope.get(_OUTCOME)
    if outcome is not None:
        fields |= {name: value for name, value in asdict(outcome.summary).items() if value is not None}
    if remark is not None:
        fields["remark"] = remark
    fields = {name: round(value, 3) if isinstance(value, float) else value for name, value in fields.items()}
    _log.info("%s", _as_text(fields), extra={_FIELDS: fields})


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object; whatever a client sent stays inside its string."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        line |= getattr(record, _FIELDS, None) or {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Send every log line of the process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format is LogFormat.JSON else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _as_text(fields: Mapping[str, object]) -> str:
    """`GET /path 200 1.5 ms id=…`, and the rest as it comes."""
    rest = {
        key: value for key, value in fields.items() if key not in {"method", "route", "status", "total_ms"}
    }
    head = f"{fields['method']} {fields['route']} {fields['status']} {fields['total_ms']} ms"
    return " ".join([head, *(f"{key}={value}" for key, value in rest.items())])
