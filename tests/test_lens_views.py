"""What `inspect` shows fits its place, is what was computed, and does nothing that a token says."""

from __future__ import annotations

import io
import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from config.settings import EngineSettings
from tests.tiny import make_checkpoint
from training.lens import Inspection, Lens
from training.lens_page import page
from training.lens_table import print_inspections
from training.observations import observe
from training.token_text import TokenTexts

PROMPT = "def f(x):"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img/src=x/onerror=alert(1)>',
    "'--><!--",
    "&amp;",
    "\x1b[31mred",
    "\u202eltr",
    "[bold]markup[/bold]",
    "$script_hash",
]


def load_lens(folder: Path) -> Lens:
    return Lens.load(
        EngineSettings(model=str(folder), dtype="float64", device="cpu", num_threads=1, max_num_seqs=1)
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint every token of which would do harm if it were shown as it is."""
    target = make_checkpoint(tmp_path_factory.mktemp("hostile"), num_layers=2, vocab=2 * len(HOSTILE))
    vocabulary = {text: i for i, text in enumerate([*HOSTILE, *(text * 2 for text in HOSTILE)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=HOSTILE[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def harmful(hostile: Path) -> Inspection:
    return load_lens(hostile).inspect(" ".join(HOSTILE), name="<b>model</b>", num_new_tokens=8, is_raw=False)


def test_byte_level_tokens_show_their_bytes() -> None:
    """ByteLevel's own alphabet is the oracle: each byte's letter shows that byte."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [" def", "\n\t", "é", "日本", "\x00\x7f", "\u202e"]
    pieces = [letters.pre_tokenize_str(word)[0][0] for word in words]
    pieces += [pieces[2][0], "<|end|>"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    tokenizer.decoder = decoders.ByteLevel()
    texts = TokenTexts(tokenizer)
    expected = ["·def", "↵⇥", "é", "日本", "\\x00\\x7f", "\\u202e", "\\xc3", "<|end|>", "<8>"]
    assert [texts(i) for i in range(9)] == expected


def test_sentencepiece_tokens_show_their_bytes() -> None:
    pieces = ["▁def", "▁▁", "<0x0A>", "<0xC3>", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    assert [TokenTexts(tokenizer)(i) for i in range(5)] == ["·def", "··", "↵", "\\xc3", "é"]


class Elements(HTMLParser):
    """Start tags with their attributes, and the text inside elements of each name."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open, []).append(data)


def test_the_page_runs_and_fetches_nothing_that_tokens_say(harmful: Inspection) -> None:
    markup = page(" ".join(HOSTILE), [harmful], observe([harmful]), num_last=99)
    elements = Elements(markup)
    names = [tag for tag, _ in elements.tags]
    assert names.count("script") == 1
    assert not {"img", "link", "iframe", "a"} & set(names)
    attributes = {name for _, given in elements.tags for name in given}
    assert not [name for name in attributes if name.startswith("on") or name in {"src", "href", "action"}]
    assert "http://" not in markup
    assert "https://" not in markup
    policy = next(given["content"] for tag, given in elements.tags if given.get("http-equiv"))
    script = b64encode(sha256(elements.texts["script"][0].encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{script}'" in policy
    assert "<b>model</b>" in elements.texts["h2"]
    assert not re.search(r"[\x1b\u202e]", markup)


def test_the_pages_cells_hold_the_best_tokens(harmful: Inspection) -> None:
    markup = page("x", [harmful], observe([harmful]), num_last=99)
    cells = [given for tag, given in Elements(markup).tags if "data-top" in given]
    reading = harmful.reading
    assert len(cells) == reading.guesses_RNK.shape[0] * reading.num_positions
    flat = zip(reading.guesses_RNK.reshape(-1, 5), reading.probabilities_RNK.reshape(-1, 5), strict=True)
    for cell, (ids, probabilities) in zip(cells, flat, strict=True):
        best = json.loads(str(cell["data-top"]))
        assert best == [[harmful.texts(int(i)), f"{p:.1%}"] for i, p in zip(ids, probabilities, strict=True)]
    marks = [str(cell["class"]).startswith("settled") for cell in cells]
    rows = np.array(marks).reshape(-1, reading.num_positions)
    assert (rows.sum(axis=0) == 1).all()
    assert (rows.argmax(axis=0) == reading.settled_N).all()


def printed(inspections: list[Inspection], *, width: int, num_last: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    print_inspections(console, inspections, observe(inspections), num_last=num_last)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits_the_terminal_and_shows_every_position(harmful: Inspection, width: int) -> None:
    text = printed([harmful], width=width, num_last=99)
    assert max(map(cell_len, text.splitlines())) <= width
    assert text.count("◆") == harmful.reading.num_positions + 1
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold]mar" in text


def test_only_the_last_positions_are_shown(harmful: Inspection) -> None:
    text = printed([harmful], width=100, num_last=3)
    assert text.count("◆") == 3 + 1
    assert f"{harmful.reading.num_positions} positions, the last 3 shown" in text
    markup = page("x", [harmful], observe([harmful]), num_last=3)
    assert markup.count("data-top=") == 3 * (harmful.reading.num_layers + 1)


def test_checkpoints_of_other_tokenizers_and_depths_stand_side_by_side(
    harmful: Inspection, tmp_path: Path
) -> None:
    plain = load_lens(make_checkpoint(tmp_path)).inspect(PROMPT, name="plain", num_new_tokens=4, is_raw=False)
    both = [harmful, plain]
    lines = printed(both, width=160, num_last=24).splitlines()
    assert any("<b>model</b>  2 layers" in line and "plain  4 layers" in line for line in lines)
    assert max(map(cell_len, lines)) <= 160
    assert page(PROMPT, both, observe(both), num_last=24).count('<table class="lens">') == 2


def test_shares_of_many_checkpoints_fit_a_narrow_terminal(harmful: Inspection) -> None:
    lines = printed([harmful] * 4, width=60, num_last=1).splitlines()
    first = lines.index(next(line for line in lines if line.startswith("Positions settled"))) + 2
    for row, share in enumerate(harmful.reading.settled_share_R):
        words = lines[first + row].replace("█", " ").split()
        assert words == [str(row), *[f"{share:.0%}"] * 4]
