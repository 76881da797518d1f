"""Text to token ids and back, with the tokenizer the worker handed over.

Knows the vocabulary and the context's length; knows nothing of requests. Encoding runs on the tokenizer's
own threads: the event loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

from decoding.messages import Limits, TextAssets
from server.errors import InvalidRequest, PromptTooLong
from server.openai_types import Prompt
from server.text_stream import TextStream

# More would only take the cores that the worker needs.
_MAX_ENCODING: Final = 2


class Codec:
    """Encodes prompts and starts text streams for one model."""

    def __init__(self, assets: TextAssets, limits: Limits) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_str(assets.tokenizer_json)
        self._limits = limits
        longest = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        self._max_prompt_bytes = longest * limits.max_model_len
        self._encoding = asyncio.Semaphore(_MAX_ENCODING)

    async def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's ids, at least one, all in the vocabulary. Raises InvalidRequest and PromptTooLong."""
        token_ids = await self._encode_text(prompt) if isinstance(prompt, str) else prompt
        if not token_ids:
            raise InvalidRequest("the prompt is empty; it must have at least one token", param="prompt")
        limit_tokens = self._limits.max_model_len - 1
        if len(token_ids) > limit_tokens:
            raise PromptTooLong(what=f"{len(token_ids)} tokens", limit_tokens=limit_tokens)
        self._check_vocabulary(token_ids)
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, without that of special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def text_stream(self, *, prompt_ids: Sequence[int], stop_strings: Sequence[str]) -> TextStream:
        """A stream for the text that follows the prompt."""
        return TextStream(self.decode, prompt_ids=prompt_ids, stop_strings=stop_strings)

    async def _encode_text(self, text: str) -> list[int]:
        num_bytes = len(text.encode())
        if num_bytes > self._max_prompt_bytes:
            raise PromptTooLong(what=f"{num_bytes} bytes", limit_tokens=self._limits.max_model_len - 1)
        async with self._encoding:
            encoding = await self._tokenizer.async_encode(text)
        token_ids: list[int] = encoding.ids
        return token_ids

    def _check_vocabulary(self, token_ids: list[int]) -> None:
        size = self._limits.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= size:
            raise InvalidRequest(f"token ids of this model are 0 to {size - 1}", param="prompt")
