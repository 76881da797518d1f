"""What a request asks to be done to logits, checked and put into token ids.

Knows ranges that depend on the model; what an edit does stands in `decoding.edited_logits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from decoding.messages import LogitEdits
from server.codec import Codec
from server.errors import InvalidRequest
from server.openai_params import GenerationParams

# Every id of every word is looked at for every token that the worker drafts or verifies.
_MAX_BAD_WORDS: Final = 128
_MAX_BAD_WORD_CHARS: Final = 256
_MAX_BAD_WORD_TOKENS: Final = 2048


def resolve_edits(
    request: GenerationParams, codec: Codec, *, stop_token_ids: Sequence[int], max_new_tokens: int
) -> LogitEdits | None:
    """The edits of a request that may get `max_new_tokens`; None if there are none. Raises InvalidRequest."""
    logit_bias = request.logit_bias or {}
    codec.check_ids(list(logit_bias), param="logit_bias")
    min_tokens = _min_tokens(request, max_new_tokens)
    edits = LogitEdits(
        allowed_token_ids=_allowed(request.allowed_token_ids, codec),
        bad_words=_bad_words(request.bad_words or [], codec),
        # Where no token ends the sequence, there is none to wait.
        min_tokens=min_tokens if stop_token_ids else 0,
        logit_bias={token_id: bias for token_id, bias in logit_bias.items() if bias},
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
    )
    return None if edits == LogitEdits() else edits


def _min_tokens(request: GenerationParams, max_new_tokens: int) -> int:
    asked = request.min_tokens or 0
    if asked > max_new_tokens:
        raise InvalidRequest(
            f"`min_tokens` must be at most the {max_new_tokens} tokens of the answer, not {asked}",
            param="min_tokens",
        )
    return asked


def _allowed(token_ids: list[int] | None, codec: Codec) -> list[int]:
    if token_ids is None:
        return []
    if not token_ids:
        raise InvalidRequest(
            "`allowed_token_ids` must have at least one; leave it out to allow all", param="allowed_token_ids"
        )
    codec.check_ids(token_ids, param="allowed_token_ids")
    return sorted(set(token_ids))


def _bad_words(words: Sequence[str], codec: Codec) -> list[list[int]]:
    """The ids of each word as a text may begin with it, and as it stands behind another."""
    if len(words) > _MAX_BAD_WORDS or any(len(word) > _MAX_BAD_WORD_CHARS for word in words):
        raise InvalidRequest(
            f"`bad_words` may have at most {_MAX_BAD_WORDS} words of {_MAX_BAD_WORD_CHARS} characters",
            param="bad_words",
        )
    spelled: dict[tuple[int, ...], None] = {}
    for word in words:
        for variant in (word, f" {word.lstrip()}"):
            if token_ids := codec.encode_word(variant):
                spelled[tuple(token_ids)] = None
    if sum(map(len, spelled)) > _MAX_BAD_WORD_TOKENS:
        raise InvalidRequest(
            f"`bad_words` may come to at most {_MAX_BAD_WORD_TOKENS} tokens, each word with and without a space "
            "before it",
            param="bad_words",
        )
    return [list(token_ids) for token_ids in spelled]
