"""What the person who starts the server sees: progress, then how to use it, or why it cannot be used.

Knows words; knows nothing of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TextIO

from decoding.messages import Drafter, Limits, Ready


@dataclass(frozen=True, slots=True)
class Site:
    """Where requests go, and what each must carry."""

    url: str
    needs_key: bool = False
    has_several_models: bool = False


class Terminal:
    """Follows the start of one model's worker on a stream."""

    def __init__(self, stream: TextIO, site: Site, model_name: str) -> None:
        self._stream = stream
        self._site = site
        self._model_name = model_name
        self._latest = ("", -1)
        self._has_served = False

    def loading(self, stage: str, fraction: float) -> None:
        """One line for every new stage and every tenth of it."""
        latest = (stage, int(fraction * 10))
        if latest != self._latest:
            self._latest = latest
            self._print(f"loading {self._model_name}: {stage} {fraction:.0%}")

    def ready(self, ready: Ready) -> None:
        """The banner; after a restart one line."""
        if self._has_served:
            self._say("the worker serves again")
        else:
            self._print(banner(ready, self._site, model_name=self._model_name))
        self._has_served = True

    def restarting(self, message: str) -> None:
        """The one line that says why."""
        self._say(message)

    def failed(self, message: str) -> None:
        """The one line."""
        self._say(message)

    def _say(self, message: str) -> None:
        whose = f"{self._model_name}: " if self._site.has_several_models else ""
        self._print(f"layerskip: {whose}{message}")

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def banner(ready: Ready, site: Site, *, model_name: str) -> str:
    """Where the model is served, in what shape, and two commands to try."""
    limits = ready.limits
    kv_tokens = limits.num_blocks * limits.block_size
    layers = ", ".join(map(str, limits.allowed_exit_layers))
    asked = model_name if site.has_several_models else None
    key = '-H "Authorization: Bearer $LAYERSKIP_API_KEY" ' if site.needs_key else ""
    drafts = _drafts(limits)
    concurrency = min(limits.max_num_seqs, kv_tokens / limits.max_model_len)
    return f"""
layerskip serves {model_name} at {site.url}
  weights      {ready.dtype} on {ready.devices}, {limits.num_layers} layers
  exit layers  {layers}; {drafts}{_draft_model(ready)}
  KV cache     {kv_tokens:,} tokens: {concurrency:.1f} sequences of {limits.max_model_len:,} tokens at once
  metrics      {site.url}/metrics

{curl(site.url, model=asked, flags=key)}
{curl(site.url, model=asked, extra=', "stream": true', flags=f"-N {key}")}
"""


def _draft_model(ready: Ready) -> str:
    """A line more where there is a separate one."""
    if ready.draft_model is None:
        return ""
    return f'\n  draft model  {ready.draft_model}; for requests with "drafter": "model"'


def _drafts(limits: Limits) -> str:
    """What a request gets that asks for nothing."""
    if limits.default_drafter is not Drafter.EARLY_EXIT:
        return f'"drafter": "{limits.default_drafter}" where a request names none'
    layer, length = limits.default_exit_layer, limits.default_draft_length
    if layer is None and length is None:
        return f"chosen step by step, from {limits.first_exit_layer} on"
    exits = "an exit layer chosen step by step" if layer is None else f"exit layer {layer}"
    return f"{exits}, drafting {'as many tokens as pay' if length is None else f'{length} tokens'}"


def curl(url: str, *, model: str | None = None, extra: str = "", flags: str = "") -> str:
    """A command that asks for a completion, ready to paste."""
    named = "" if model is None else f'"model": "{model}", '
    body = f'{{{named}"prompt": "def fibonacci(n):", "max_tokens": 48{extra}}}'
    return f"curl {flags}{url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
