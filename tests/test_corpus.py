"""Texts, tokenizer and windows."""

from collections import Counter

import numpy as np
import pytest

from training.corpus import Windows, encode, read_corpus, train_tokenizer
from training.recipe import Data, RecipeError

CODE = 'def greet(name):\n    """Say hello."""\n    if name:\n        return f"hello {name}"\n    return "hello"\n'


def write_sources(folder, count=40):
    for number in range(count):
        (folder / f"module_{number}.py").write_text(f"# {number}\n{CODE}", encoding="utf-8")
    return Data(sources=(f"files:{folder}/*.py",), held_out=0.25)


def test_files_are_held_out_whole_and_alike_every_time(tmp_path):
    data = write_sources(tmp_path)
    corpus = read_corpus(data)
    assert not set(corpus.training) & set(corpus.held_out)
    assert len(corpus.training) + len(corpus.held_out) == 40
    assert 2 <= len(corpus.held_out) <= 20
    assert read_corpus(data) == corpus


def test_tables_of_numbers_and_unreadable_files_are_left_out(tmp_path):
    data = write_sources(tmp_path)
    (tmp_path / "table.py").write_text("x = [\n" + "0x1f, 0x20, 12345,\n" * 50 + "]\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    corpus = read_corpus(data)
    assert len(corpus.training) + len(corpus.held_out) == 40


@pytest.mark.parametrize(
    "source", ["files:/nowhere/*.py", "package:no-such-package", "everything", "package:"]
)
def test_a_source_that_gives_nothing_is_refused(source):
    with pytest.raises(RecipeError, match=r"data\.sources"):
        read_corpus(Data(sources=(source,)))


def test_the_tokenizer_gives_every_byte_back_and_keeps_indentation_together():
    tokenizer = train_tokenizer([CODE] * 20, vocab_size=330)
    strange = CODE + "\tπ = 'ß' # \r\n\x00"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(CODE).ids]
    assert "\n        " in pieces or ":\n        " in pieces or any(p.endswith("       ") for p in pieces)


def test_texts_are_parted_by_the_end_of_text():
    tokenizer = train_tokenizer([CODE] * 20, vocab_size=300)
    ids = encode(tokenizer, [CODE, CODE], end_id=0)
    ends = np.flatnonzero(ids == 0)
    assert len(ends) == 3
    assert ends[0] == 0
    assert ends[-1] == len(ids) - 1
    assert tokenizer.decode(ids[ends[0] + 1 : ends[1]].tolist()) == CODE


def test_an_epoch_visits_every_window_once_and_the_next_one_in_another_order():
    windows = Windows(np.arange(1, 1002, dtype=np.uint32), seed=4)
    per_epoch = 1000 // 10 - 1
    first = windows.batch(first=0, count=per_epoch, num_tokens=10)
    second = windows.batch(first=per_epoch, count=per_epoch, num_tokens=10)
    for epoch in (first, second):
        assert epoch.shape == (per_epoch, 11)
        assert (np.diff(epoch, axis=1) == 1).all()
        assert max(Counter(epoch[:, :-1].flatten().tolist()).values()) == 1
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert first[:, 0].tolist() != sorted(first[:, 0].tolist())


def test_a_batch_is_the_same_however_it_is_asked_for():
    windows = Windows(np.arange(5000, dtype=np.uint32), seed=4)
    whole = windows.batch(first=3, count=8, num_tokens=16)
    parts = [windows.batch(first=3 + place, count=1, num_tokens=16)[0] for place in range(8)]
    assert (np.stack(parts) == whole).all()


def test_a_corpus_shorter_than_its_windows_is_refused():
    with pytest.raises(RecipeError, match="sequence_tokens"):
        Windows(np.arange(20, dtype=np.uint32), seed=4).batch(first=0, count=1, num_tokens=16)
