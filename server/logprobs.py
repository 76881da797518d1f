"""Log-probabilities and drafts in the shapes of OpenAI's and vLLM's answers.

Knows tokens and shapes; knows nothing of when something was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from decoding.messages import TokenLogprob
from server.drafts import CycleDrafts
from server.openai_types import JsonObject
from server.vocabulary import Vocabulary

# JSON has no infinity; vLLM's floor.
_LEAST_LOGPROB: Final = -9999.0


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Tokens, where each begins in its text, and how probable it was: None for a first token of a prompt."""

    token_ids: Sequence[int]
    offsets: Sequence[int]
    logprobs: Sequence[TokenLogprob | None]


class TokenWriter:
    """Writes tokens by their text, or as `token_id:…` where texts would not tell them apart."""

    def __init__(self, vocabulary: Vocabulary, *, as_ids: bool) -> None:
        self._vocabulary = vocabulary
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        """How an answer calls a token."""
        return f"token_id:{token_id}" if self._as_ids else self._vocabulary.text(token_id)

    def completion(self, tokens: ScoredTokens, *, num_top: int) -> JsonObject:
        """The `logprobs` of a completion's choice: four lists side by side."""
        logprobs = tokens.logprobs
        return {
            "text_offset": list(tokens.offsets),
            "token_logprobs": [None if each is None else _floored(each.logprob) for each in logprobs],
            "tokens": [self.name(token_id) for token_id in tokens.token_ids],
            "top_logprobs": [
                None if each is None else self._top_by_name(token_id, each, num_top)
                for token_id, each in zip(tokens.token_ids, logprobs, strict=True)
            ],
        }

    def chat(self, tokens: ScoredTokens, *, num_top: int) -> JsonObject:
        """The `logprobs` of a chat's choice: an object for each token, with its bytes."""
        content = []
        for token_id, scored in zip(tokens.token_ids, tokens.logprobs, strict=True):
            assert scored is not None, "a new token has others before it"
            top = [self._chat_token(other, value) for other, value in _top(scored, num_top)]
            content.append(self._chat_token(token_id, scored.logprob) | {"top_logprobs": top})
        return {"content": content}

    def prompt(
        self, prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprob], *, num_top: int
    ) -> list[JsonObject | None]:
        """vLLM's `prompt_logprobs`: for each position its token and the most probable ones, by id."""
        positions: list[JsonObject | None] = [None]
        for token_id, scored in zip(prompt_ids[1:], logprobs, strict=True):
            own = {token_id: (scored.rank, scored.logprob)}
            ranked = {other: (1 + i, value) for i, (other, value) in enumerate(_top(scored, num_top))}
            positions.append(
                {str(each): self._ranked(each, *entry) for each, entry in (own | ranked | own).items()}
            )
        return positions

    def trace(self, drafts: Sequence[CycleDrafts]) -> list[JsonObject]:
        """The drafts of each cycle and how many of them were kept."""
        return [
            {
                "drafted_ids": list(cycle.drafted_ids),
                "drafted_tokens": [self.name(token_id) for token_id in cycle.drafted_ids],
                "kept": cycle.kept,
                "exit_layer": cycle.exit_layer,
                "drafter": str(cycle.drafter),
            }
            for cycle in drafts
        ]

    def _top_by_name(self, token_id: int, scored: TokenLogprob, num_top: int) -> dict[str, float]:
        """Names may coincide; the most probable token of a name counts."""
        values: dict[str, float] = {}
        for other, value in (*_top(scored, num_top), (token_id, scored.logprob)):
            values.setdefault(self.name(other), _floored(value))
        return values

    def _chat_token(self, token_id: int, logprob: float) -> JsonObject:
        spelled = list(self._vocabulary.utf8(token_id))
        return {"token": self.name(token_id), "logprob": _floored(logprob), "bytes": spelled}

    def _ranked(self, token_id: int, rank: int, logprob: float) -> JsonObject:
        return {"logprob": _floored(logprob), "rank": rank, "decoded_token": self._vocabulary.text(token_id)}


def prompt_offsets(token_ids: Sequence[int], text: str, vocabulary: Vocabulary) -> list[int]:
    """Where each token of a prompt begins in its text.

    A token that begins inside a character has that character's offset; a special one that the text does not show
    takes no room.
    """
    offsets, num_characters = [], 0
    for token_id in token_ids:
        spelled = vocabulary.utf8(token_id)
        if vocabulary.is_special(token_id) and not text.startswith(spelled.decode(), num_characters):
            spelled = b""
        if not num_characters and spelled[:1] == b" " and not text.startswith(" "):
            spelled = spelled[1:]
        offsets.append(min(num_characters - _is_continuation(spelled[:1]), len(text)))
        num_characters += sum(1 for byte in spelled if not _is_continuation(bytes([byte])))
    return offsets


def _is_continuation(byte: bytes) -> bool:
    return bool(byte) and byte[0] & 0xC0 == 0x80


def _top(scored: TokenLogprob, num_top: int) -> Iterator[tuple[int, float]]:
    return zip(scored.top_ids[:num_top], scored.top_logprobs[:num_top], strict=True)


def _floored(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
