"""What the operator may choose of the API process: where it listens, what it lets in, how long things may take.

Knows ranges; knows nothing of checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from config.setting_types import (
    COMMA_LIST,
    ApiKey,
    LogFormat,
    LogLevel,
    ModelNames,
    Origin,
    SchedulingPolicy,
    Silence,
)


class ServerSettings(BaseModel, frozen=True, extra="forbid"):
    """What the API process needs: where it listens and what it lets in."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    served_model_name: ModelNames | None = Field(
        default=None,
        description="Names that requests may use; answers and metrics have the first; unset: from the checkpoint.",
    )
    chat_template: Path | None = Field(
        default=None, description="Jinja file that makes chats prompts; unset: the checkpoint's own."
    )
    max_queued_requests: int = Field(
        default=512, ge=0, description="Sequences waiting beyond max_num_seqs before requests get 429."
    )
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024, description="Largest request body, in bytes.")
    max_n: int = Field(default=16, ge=1, description="Most choices for one prompt.")
    max_prompts: int = Field(default=64, ge=1, description="Most prompts in one request.")
    max_sequences_per_request: int = Field(
        default=64, ge=1, description="Most prompts times choices in one request."
    )
    max_stop_strings: int = Field(default=4, ge=0, description="Most stop strings in one request.")
    max_stop_string_chars: int = Field(default=256, ge=1, description="Longest stop string, in characters.")
    api_key: Annotated[tuple[ApiKey, ...] | None, *COMMA_LIST] = Field(
        default=None, description="Keys of which every request must bear one; unset: none needed."
    )
    api_key_file: Path | None = Field(default=None, description="File with such keys, one a line.")
    cors_origins: Annotated[tuple[Origin, ...] | None, *COMMA_LIST] = Field(
        default=None, description="Web origins whose pages may read answers, or *; unset: none."
    )
    scheduling_policy: SchedulingPolicy = Field(
        default=SchedulingPolicy.FCFS,
        description="fcfs, first come, first served; priority, lowest `priority` of a request first.",
    )
    queue_timeout_s: float = Field(
        default=60.0, gt=0, description="Longest wait for a place in the batch, in seconds, before 503."
    )
    request_timeout_s: float | None = Field(
        default=None, gt=0, description="Longest time for a whole answer, in seconds, before 504; unset: any."
    )
    step_timeout_s: Silence = Field(
        default=300.0,
        ge=0,
        description="Seconds after which a worker whose step does not end is restarted; 0: never.",
    )
    slow_reader_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=86400,
        description="Seconds after which a client that reads nothing is dropped.",
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="Seconds that running requests have after SIGTERM."
    )
    log_level: LogLevel = Field(default=LogLevel.INFO, description="Least severe log line that is written.")
    log_format: LogFormat = Field(default=LogFormat.TEXT, description="text or json.")
