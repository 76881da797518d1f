"""The kinds of values that settings have.

Knows how each is written by an operator; knows nothing of what a setting is for.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode


class Loader(StrEnum):
    """How weights reach the device."""

    SAFETENSORS = "safetensors"
    ACCELERATE = "accelerate"


class LoadFormat(StrEnum):
    """Where weights come from: `auto` reads the checkpoint's, `dummy` draws some of the same sizes."""

    AUTO = "auto"
    DUMMY = "dummy"


class AttentionKind(StrEnum):
    """What computes attention; `auto` is Triton's kernels where they run and gathered contexts elsewhere."""

    AUTO = "auto"
    GATHER = "gather"
    TRITON = "triton"


class ExitPolicy(StrEnum):
    """What rows of one step do that ask for different exit layers."""

    EXACT = "exact"
    PROMOTE = "promote"


class SchedulingPolicy(StrEnum):
    """Which of the waiting requests is next."""

    FCFS = "fcfs"
    PRIORITY = "priority"


class LogLevel(StrEnum):
    """The least severe log line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How a log line is written: for people, or as one JSON object."""

    TEXT = "text"
    JSON = "json"


_ORIGIN: Final = re.compile(r"\*|https?://[^/\s*]+")
_LEAST_SILENCE_S: Final = 2.0
_BEARER_KEY: Final = re.compile(r"[!-~]+", re.ASCII)


def _split_commas(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def is_bearer_key(text: str) -> bool:
    """Whether a text can be sent as a key in a header."""
    return _BEARER_KEY.fullmatch(text) is not None


def _check_key(key: SecretStr) -> SecretStr:
    if not is_bearer_key(key.get_secret_value()):
        raise ValueError("a key is made of printable ASCII characters other than space and comma")
    return key


def _check_origin(origin: str) -> str:
    if not _ORIGIN.fullmatch(origin):
        raise ValueError("must be * or origins such as https://example.org")
    return origin


def _check_silence(seconds: float) -> float:
    if 0 < seconds < _LEAST_SILENCE_S:
        raise ValueError(f"must be 0 or at least {_LEAST_SILENCE_S:g}: an idle worker is heard every second")
    return seconds


# For settings that are lists, which flags and variables hold as text.
COMMA_LIST: Final = (NoDecode, BeforeValidator(_split_commas))

ApiKey = Annotated[SecretStr, AfterValidator(_check_key)]
Silence = Annotated[float, AfterValidator(_check_silence)]
Origin = Annotated[str, AfterValidator(_check_origin)]
ModelNames = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), *COMMA_LIST]
