"""Text to token ids and back, with the tokenizer the worker handed over.

Knows the vocabulary and the context's length; knows nothing of requests. Encoding runs on the tokenizer's
own threads: the event loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tokenizers import Encoding, Tokenizer

from decoding.messages import Limits, TextAssets
from server.errors import InvalidRequest, PromptTooLong
from server.openai_types import Prompt
from server.text_stream import Decode
from server.vocabulary import Vocabulary

# More would only take the cores that the worker needs.
_MAX_ENCODING: Final = 2


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """How long a prompt may be; `param` is where it was given.

    A text of more than `max_bytes` has more than `max_tokens` tokens, whatever it says.
    """

    max_tokens: int
    max_bytes: int
    param: str

    def check_bytes(self, num_bytes: int) -> None:
        """Raise PromptTooLong for a text that cannot fit."""
        if num_bytes > self.max_bytes:
            raise PromptTooLong(what=f"{num_bytes} bytes", limit_tokens=self.max_tokens, param=self.param)

    def check_tokens(self, num_tokens: int) -> None:
        """Raise PromptTooLong for too many tokens, InvalidRequest for none."""
        if not num_tokens:
            raise InvalidRequest("the prompt is empty; it must have at least one token", param=self.param)
        if num_tokens > self.max_tokens:
            raise PromptTooLong(what=f"{num_tokens} tokens", limit_tokens=self.max_tokens, param=self.param)


class Codec:
    """Encodes prompts and decodes answers of one model."""

    def __init__(self, assets: TextAssets, limits: Limits) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_str(assets.tokenizer_json)
        self._limits = limits
        self._longest_token_bytes = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        self._encoding = asyncio.Semaphore(_MAX_ENCODING)
        self.vocabulary = Vocabulary(
            self._tokenizer, assets.tokenizer_json, eos_token_ids=assets.eos_token_ids
        )

    def prompt_limit(self, *, max_new_tokens: int, param: str) -> PromptLimit:
        """How long a prompt may be if this many tokens are to follow it."""
        max_tokens = self._limits.max_model_len - max_new_tokens
        return PromptLimit(max_tokens, self._longest_token_bytes * max_tokens, param)

    async def encode_prompt(
        self, prompt: Prompt, limit: PromptLimit, *, add_special_tokens: bool, keep_last: int | None
    ) -> list[int]:
        """The prompt's ids, at least one, all in the vocabulary; of a longer prompt the `keep_last` last ones.

        Special tokens that begin a text are kept when it is cut. Raises InvalidRequest and PromptTooLong.
        """
        if isinstance(prompt, str):
            if keep_last is None:
                limit.check_bytes(len(prompt.encode()))
            token_ids = await self.encode(prompt, add_special_tokens=add_special_tokens, keep_last=keep_last)
        else:
            self.check_ids(prompt, param=limit.param)
            token_ids = prompt if keep_last is None else prompt[-keep_last:]
        limit.check_tokens(len(token_ids))
        self.check_ids(token_ids, param=limit.param)
        return token_ids

    async def encode(self, text: str, *, add_special_tokens: bool, keep_last: int | None = None) -> list[int]:
        """Ids of a text of any length."""
        async with self._encoding:
            encoding = await self._tokenizer.async_encode(
                text, add_special_tokens=add_special_tokens and keep_last is None
            )
        if keep_last is not None:
            encoding = self._keep_last(encoding, keep_last, add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids

    def encode_word(self, word: str) -> list[int]:
        """Ids of a short text, at once and without special tokens; none if this model cannot say it: a tokenizer
        may have ids that the model has not.
        """
        token_ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        return token_ids if self._has(token_ids) else []

    def decoder(self, *, skip_special_tokens: bool) -> Decode:
        """What turns ids into text, with or without that of special tokens."""

        def decode(token_ids: Sequence[int]) -> str:
            text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
            return text

        return decode

    def check_ids(self, token_ids: Sequence[int], *, param: str) -> None:
        """Raise InvalidRequest for an id that this model does not have."""
        if not self._has(token_ids):
            last = self._limits.vocab_size - 1
            raise InvalidRequest(f"`{param}`: token ids of this model are 0 to {last}", param=param)

    def _has(self, token_ids: Sequence[int]) -> bool:
        return not token_ids or (min(token_ids) >= 0 and max(token_ids) < self._limits.vocab_size)

    def _keep_last(self, encoding: Encoding, num_tokens: int, *, add_special_tokens: bool) -> Encoding:
        num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
        encoding.truncate(max(0, num_tokens - num_special), direction="left")
        if not num_special:
            return encoding
        return self._tokenizer.post_process(encoding, add_special_tokens=True)
