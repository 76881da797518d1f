"""Single tokens as text that can be shown anywhere: visible, on one line, whatever bytes they hold.

Knows a tokenizer's vocabulary; knows nothing of sequences, terminals or pages.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

_VISIBLE: Final = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary(Protocol):
    """The two questions a tokenizer answers here; `tokenizers.Tokenizer` is one."""

    def id_to_token(self, token_id: int) -> str | None:
        """The piece as the vocabulary spells it, or None for an id it does not have."""
        ...

    def to_str(self) -> str:
        """The tokenizer's JSON."""
        ...


class TokenTexts:
    """Shows tokens by id: spaces as ·, line ends as ↵, tabs as ⇥, and what cannot be printed as an escape.

    Byte-level vocabularies (GPT-2, Llama 3) and those with ▁ and <0xNN> pieces (Llama 2) are read back to
    the bytes they stand for; a token that is part of a character shows these bytes.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._is_byte_level = '"ByteLevel"' in vocabulary.to_str()

    def __call__(self, token_id: int) -> str:
        """The token's visible text; never empty."""
        piece = self._vocabulary.id_to_token(token_id)
        if piece is None:
            return f"<{token_id}>"
        return visible(self._text(piece)) or "∅"

    def _text(self, piece: str) -> str:
        if self._is_byte_level:
            if all(letter in _BYTE_OF for letter in piece):
                return _decode(bytes(_BYTE_OF[letter] for letter in piece))
            return piece
        if byte := _BYTE_TOKEN.fullmatch(piece):
            return _decode(bytes.fromhex(byte[1]))
        return piece.replace("▁", " ")


def visible(text: str) -> str:
    """`text` on one line with nothing invisible in it: no control characters, no changes of direction."""
    return "".join(_VISIBLE.get(letter) or printable(letter) for letter in text)


def printable(letter: str) -> str:
    """The character, or its escape where it cannot be printed."""
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")


def _bytes_by_letter() -> dict[str, int]:
    """Byte-level vocabularies spell printable Latin-1 as it is, and the other bytes from U+0100 on."""
    plain = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _bytes_by_letter()
