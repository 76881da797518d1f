"""Single tokens as people and programs read them: their text and their bytes.

Knows how the common tokenizers spell bytes; knows nothing of how a text is divided into tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Final

from tokenizers import Tokenizer

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Spells single tokens; what it once spelled it remembers."""

    def __init__(self, tokenizer: Tokenizer, tokenizer_json: str, *, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._decoders = _decoder_kinds(json.loads(tokenizer_json).get("decoder"))
        self._special = {
            token_id for token_id, added in tokenizer.get_added_tokens_decoder().items() if added.special
        }
        self._anchor = _anchor(tokenizer)
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}

    @property
    def bos_token(self) -> str:
        """The special token that the tokenizer puts in front of a text; empty if it puts none there."""
        first = self._tokenizer.encode("").ids[:1]
        return self.symbol(first[0]) if first and self.is_special(first[0]) else ""

    @property
    def eos_token(self) -> str:
        """The first of the tokens that end a sequence; empty if there is none."""
        return self.symbol(self._eos_token_ids[0]) if self._eos_token_ids else ""

    def is_special(self, token_id: int) -> bool:
        """Whether a token stands for something other than text."""
        return token_id in self._special

    def symbol(self, token_id: int) -> str:
        """The token as the vocabulary writes it; empty for an id without a token."""
        symbol: str | None = self._tokenizer.id_to_token(token_id)
        return symbol or ""

    def text(self, token_id: int) -> str:
        """The token's own text within a text, with the space in front; U+FFFD for bytes that are no character."""
        if token_id not in self._texts:
            self._texts[token_id] = self._decode_behind_anchor(token_id)
        return self._texts[token_id]

    def utf8(self, token_id: int) -> bytes:
        """What the token adds to a text; those of consecutive tokens join to the text's UTF-8."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._spell(token_id)
        return self._bytes[token_id]

    def _decode_behind_anchor(self, token_id: int) -> str:
        """Some decoders drop a space from the first word they see, so the token is decoded behind another."""
        if self._anchor is None:
            return self._decode([token_id])
        alone, together = self._decode([self._anchor]), self._decode([self._anchor, token_id])
        return together[len(alone) :] if together.startswith(alone) else self._decode([token_id])

    def _spell(self, token_id: int) -> bytes:
        symbol = self.symbol(token_id)
        is_added = token_id in self._special
        if "ByteLevel" in self._decoders and not is_added and set(symbol) <= _byte_of_letter().keys():
            return bytes(_byte_of_letter()[letter] for letter in symbol)
        if "ByteFallback" in self._decoders and (match := _BYTE_TOKEN.fullmatch(symbol)):
            return bytes([int(match[1], 16)])
        return self.text(token_id).encode()

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


def _decoder_kinds(decoder: dict[str, object] | None) -> set[object]:
    if decoder is None:
        return set()
    parts = decoder.get("decoders")
    inner = parts if isinstance(parts, list) else []
    return {decoder.get("type"), *(part.get("type") for part in inner)}


def _anchor(tokenizer: Tokenizer) -> int | None:
    """A token that is plain letters."""
    symbols = (symbol for symbol in tokenizer.get_vocab() if symbol.isascii() and symbol.isalpha())
    shortest = min(symbols, key=lambda symbol: (len(symbol), symbol), default=None)
    return None if shortest is None else tokenizer.token_to_id(shortest)


@cache
def _byte_of_letter() -> dict[str, int]:
    """The letters byte-level tokenizers write bytes with: printable ones as they are, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
