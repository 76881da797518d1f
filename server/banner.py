"""What the person who starts the server sees: progress, then how to use it, or why it cannot be used.

Knows words; knows nothing of processes.
"""

from __future__ import annotations

from typing import TextIO

from decoding.messages import Ready


class Terminal:
    """Follows the worker's start on a stream; with `needs_key` it shows how to send one."""

    def __init__(self, stream: TextIO, *, url: str, model_name: str, needs_key: bool) -> None:
        self._stream = stream
        self._url = url
        self._model_name = model_name
        self._needs_key = needs_key
        self._latest = ("", -1)

    def loading(self, stage: str, fraction: float) -> None:
        """One line for every new stage and every tenth of it."""
        latest = (stage, int(fraction * 10))
        if latest != self._latest:
            self._latest = latest
            self._print(f"loading {self._model_name}: {stage} {fraction:.0%}")

    def ready(self, ready: Ready) -> None:
        """The banner."""
        self._print(banner(ready, url=self._url, model_name=self._model_name, needs_key=self._needs_key))

    def failed(self, message: str) -> None:
        """The one line; a worker that dies later leaves the server up, to say so."""
        self._print(f"layerskip: {message}")

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def banner(ready: Ready, *, url: str, model_name: str, needs_key: bool) -> str:
    """Where the model is served, in what shape, and two commands to try."""
    limits = ready.limits
    kv_tokens = limits.num_blocks * limits.block_size
    layers = ", ".join(map(str, limits.allowed_exit_layers))
    key = '-H "Authorization: Bearer $LAYERSKIP_API_KEY" ' if needs_key else ""
    concurrency = min(limits.max_num_seqs, kv_tokens / limits.max_model_len)
    return f"""
layerskip serves {model_name} at {url}
  weights      {ready.dtype} on {ready.device}, {limits.num_layers} layers
  exit layers  {layers} (default {limits.default_exit_layer}, drafting {limits.default_draft_length} tokens)
  KV cache     {kv_tokens:,} tokens: {concurrency:.1f} sequences of {limits.max_model_len:,} tokens at once
  metrics      {url}/metrics

{curl(url, flags=key)}
{curl(url, extra=', "stream": true', flags=f"-N {key}")}
"""


def curl(url: str, *, extra: str = "", flags: str = "") -> str:
    """A command that asks for a completion, ready to paste."""
    body = f'{{"prompt": "def fibonacci(n):", "max_tokens": 48{extra}}}'
    return f"curl {flags}{url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
