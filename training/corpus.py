"""Python sources as training text: what is read, what is held out, and the tokenizer made from the rest.

Knows files, modules and token ids; knows nothing of models.
"""

from __future__ import annotations

import glob
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.recipe import Data, RecipeError

END_OF_TEXT: Final = "<|endoftext|>"

_LEAST_LETTERS: Final = 0.45
"""A file with a smaller share of letters is a table of numbers or escapes, not code to learn from."""

_MOST_BYTES: Final = 400_000

_PIECES: Final = Regex(
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
)
"""Words with what precedes them, numbers by up to three digits, a line's end with the next one's indentation."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where texts come from, with what its licence is called."""

    name: str
    licence: str
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to train on and texts held out, the latter whole modules."""

    sources: tuple[Source, ...]
    training: tuple[str, ...]
    held_out: tuple[str, ...]


def read_corpus(data: Data, *more: Source) -> Corpus:
    """Read every source. A file is held out as a whole, by a hash of its name. Raises RecipeError."""
    sources = (*more, *(_source(name) for name in data.sources))
    training: list[str] = []
    held_out: list[str] = []
    budget = data.max_bytes if data.max_bytes is not None else sys.maxsize
    for path, module in _modules(sources):
        text = _text(path)
        if text is None:
            continue
        (held_out if _share(module) < data.held_out else training).append(text)
        budget -= len(text)
        if budget <= 0:
            break
    if not training or not held_out:
        raise RecipeError(f"data.sources {list(data.sources)}: too few files to train on and to hold out")
    return Corpus(sources=sources, training=tuple(training), held_out=tuple(held_out))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer made from these texts; id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], *, end_id: int, first_ids: Sequence[int] = ()
) -> NDArray[np.uint32]:
    """All texts in one row of ids: `end_id` before each and after the last, each begun with `first_ids`."""
    ids = [np.array([end_id], dtype=np.uint32)]
    for start in range(0, len(texts), 64):
        for encoding in tokenizer.encode_batch(list(texts[start : start + 64]), add_special_tokens=False):
            ids.append(np.array([*first_ids, *encoding.ids, end_id], dtype=np.uint32))
    return np.concatenate(ids)


@dataclass(frozen=True, slots=True)
class Windows:
    """Sequences of a fixed length cut from one row of ids, in an order that only the seed decides.

    Every epoch cuts at another offset and shuffles anew; nothing has to be remembered between steps.
    """

    ids: NDArray[np.uint32]
    seed: int

    def check(self, num_tokens: int) -> None:
        """Raises RecipeError if the ids are too few for windows of this length."""
        if (len(self.ids) - 1) // num_tokens < 2:
            raise RecipeError(
                f"stages.sequence_tokens {num_tokens}: the corpus has only {len(self.ids)} tokens"
            )

    def batch(self, *, first: int, count: int, num_tokens: int) -> NDArray[np.int64]:
        """Windows number first … first + count − 1 of the endless order, [count, num_tokens + 1]."""
        per_epoch = (len(self.ids) - 1) // num_tokens - 1
        self.check(num_tokens)
        rows = [self._window(number, per_epoch, num_tokens) for number in range(first, first + count)]
        return np.stack(rows).astype(np.int64)

    def _window(self, number: int, per_epoch: int, num_tokens: int) -> NDArray[np.uint32]:
        epoch, place = divmod(number, per_epoch)
        shuffle = np.random.default_rng((self.seed, epoch, num_tokens))
        offset = int(shuffle.integers(num_tokens))
        start = offset + int(_permuted(place, per_epoch, int(shuffle.integers(1 << 31)))) * num_tokens
        return self.ids[start : start + num_tokens + 1]


def _permuted(place: int, size: int, key: int) -> int:
    """A pseudo-random permutation of 0 … size − 1 at one place: a Feistel network that walks its cycle."""
    half = max(1, (size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            mixed = ((right * 0x9E3779B1 + key + turn * 0x85EBCA6B) & 0xFFFFFFFF) * 0xC2B2AE35
            left, right = right, left ^ ((mixed >> 15) & mask)
        place = (left << half) | right
        if place < size:
            return place


def _source(name: str) -> Source:
    kind, _, argument = name.partition(":")
    if kind == "standard_library" and not argument:
        root = Path(sysconfig.get_path("stdlib"))
        paths = (p for p in root.rglob("*.py") if "site-packages" not in p.parts)
        return Source(f"CPython {sys.version_info.major}.{sys.version_info.minor}", "PSF-2.0", _sorted(paths))
    if kind == "package" and argument:
        return _package(argument)
    if kind == "files" and argument:
        return Source(argument, "as given", _sorted(map(Path, glob.glob(argument, recursive=True))))
    raise RecipeError(f"data.sources {name!r}: write standard_library, package:NAME or files:GLOB")


def _package(name: str) -> Source:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise RecipeError(f"data.sources package:{name}: no such package is installed") from error
    about = distribution.metadata.json
    licence = str(about.get("license_expression") or about.get("license") or "unnamed licence")
    files = [Path(str(file.locate())) for file in distribution.files or [] if file.suffix == ".py"]
    return Source(f"{name} {distribution.version}", licence.splitlines()[0], _sorted(files))


def _sorted(paths: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(sorted(paths))


def _modules(sources: Sequence[Source]) -> Iterator[tuple[Path, str]]:
    for source in sources:
        for path in source.paths:
            yield path, "/".join([source.name, *path.parts[-3:]])


def _text(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    letters = sum(map(str.isalpha, text))
    is_worth_it = 0 < len(text) <= _MOST_BYTES and letters >= _LEAST_LETTERS * len("".join(text.split()))
    return text if is_worth_it else None


def _share(module: str) -> float:
    """A number in [0, 1) that depends on the module's name alone."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") / 2**64
