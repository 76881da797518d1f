"""Rebuilds the byte-level BPE tokenizer whose tables a GGUF file carries.

Knows vocabularies, splits and special tokens; knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from training.gguf_import import GgufError, GgufFile

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_LLAMA3_PIECES: Final = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


class _TokenType(IntEnum):
    """What GGUF says of a token, as far as it matters here."""

    CONTROL = 3
    USER_DEFINED = 4


def _gpt2_split() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_split() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


def _llama3_split() -> PreTokenizer:
    pieces = pre_tokenizers.Split(_LLAMA3_PIECES, behavior="isolated")
    return pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


_SPLITS: Final[dict[str, Callable[[], PreTokenizer]]] = {
    "gpt-2": _gpt2_split,
    "smollm": _smollm_split,
    "llama-bpe": _llama3_split,
}


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template. Raises GgufError."""
    tokens = _texts(file, "tokenizer.ggml.tokens")
    names = {
        "bos_token": _named(file, "bos", tokens),
        "eos_token": _named(file, "eos", tokens),
        "unk_token": _named(file, "unknown", tokens),
        "pad_token": _named(file, "padding", tokens),
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(file, tokens),
        model_max_length=file.required("llama.context_length", int),
        clean_up_tokenization_spaces=False,
        **{role: token for role, token in names.items() if token is not None},
    )
    tokenizer.chat_template = file.optional("tokenizer.chat_template", str)
    return tokenizer


def _tokenizer(file: GgufFile, tokens: list[str]) -> Tokenizer:
    kind = file.required("tokenizer.ggml.model", str)
    split = file.optional("tokenizer.ggml.pre", str) or "none"
    if kind != "gpt2" or split not in _SPLITS:
        known = f"gpt2 with {', '.join(sorted(_SPLITS))}"
        raise GgufError(f"{file.path}: tokenizer {kind} with {split} is not supported; {known} are")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges(file),
            # Llama 3's vocabulary has whole words that no chain of its merges reaches.
            ignore_merges=split == "llama-bpe",
        )
    )
    tokenizer.pre_tokenizer = _SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added_tokens(file, tokens))
    if file.optional("tokenizer.ggml.add_bos_token", bool):
        tokenizer.post_processor = _beginning(file, tokens)
    return tokenizer


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    pairs = [merge.partition(" ") for merge in _texts(file, "tokenizer.ggml.merges")]
    return [(left, right) for left, _, right in pairs]


def _added_tokens(file: GgufFile, tokens: list[str]) -> list[AddedToken]:
    """Tokens that text is searched for before it is split; those of control are no text of an answer."""
    types = file.required("tokenizer.ggml.token_type", list)
    return [
        AddedToken(token, special=kind == _TokenType.CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_TokenType.CONTROL, _TokenType.USER_DEFINED)
    ]


def _beginning(file: GgufFile, tokens: list[str]) -> processors.PostProcessor:
    index = file.required("tokenizer.ggml.bos_token_id", int)
    token = tokens[index]
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, index)]
    )


def _named(file: GgufFile, role: str, tokens: list[str]) -> str | None:
    index = file.optional(f"tokenizer.ggml.{role}_token_id", int)
    if index is not None and not 0 <= index < len(tokens):
        raise GgufError(f"{file.path}: {role} token {index} is outside the vocabulary; pass another file")
    return None if index is None else tokens[index]


def _texts(file: GgufFile, key: str) -> list[str]:
    return [str(text) for text in file.required(key, list)]
