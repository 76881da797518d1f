"""Ids become the text that decoding them at once would give, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from config.settings import BUNDLED_CHECKPOINT
from server.text_stream import Detokenizer, StopMatcher, StopRules, TextStream

BUNDLED = Tokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json"))
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def sentencepiece_like() -> Tokenizer:
    """Words that carry their space in front, single bytes, and a decoder that drops the first space."""
    words = ["<s>", "▁the", "▁cat", "s", "▁", "é"]
    vocabulary = words + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(vocabulary)}, merges=[], byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


WORDS = sentencepiece_like()


def decode_with(tokenizer: Tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def detokenize(tokenizer: Tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(decode_with(tokenizer), prompt_ids=prompt_ids)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def naive_cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Grow the text character by character until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.text(max_size=60))
def test_deltas_join_to_the_text_whatever_the_script(text):
    assert "".join(detokenize(BUNDLED, [], BUNDLED.encode(text).ids)) == text


@given(st.text(min_size=1, max_size=30), st.text(max_size=30))
def test_answer_continues_the_prompt_as_if_decoded_together(prompt, text):
    prompt_ids, ids = BUNDLED.encode(prompt).ids, BUNDLED.encode(text).ids
    together = BUNDLED.decode(prompt_ids + ids)
    assert BUNDLED.decode(prompt_ids) + "".join(detokenize(BUNDLED, prompt_ids, ids)) == together


@given(st.lists(st.integers(1, 4), max_size=12))
def test_first_word_keeps_the_space_that_parts_it_from_the_prompt(ids):
    prompt_ids = [0, 1]
    together = decode_with(WORDS)(prompt_ids + ids)
    assert "the" + "".join(detokenize(WORDS, prompt_ids, ids)) == together


@given(st.lists(st.integers(0, BUNDLED.get_vocab_size() - 1), max_size=40))
def test_any_ids_never_hold_text_back_for_more_than_eight_tokens(ids):
    deltas = detokenize(BUNDLED, [], ids)
    silent = 0
    for token_id, delta in zip(ids, deltas, strict=False):
        silent = 0 if delta or not BUNDLED.decode([token_id]) else silent + 1
        assert silent < 8


def test_bytes_that_never_become_a_character_are_given_out_as_replacements():
    lone = BUNDLED.encode("日").ids[:1]
    assert BUNDLED.decode(lone) == REPLACEMENT
    deltas = detokenize(BUNDLED, [], lone * 2000)
    assert deltas[:8] == [""] * 7 + [REPLACEMENT * 8]
    assert "".join(deltas) == REPLACEMENT * 2000


def test_character_in_pieces_appears_once_it_is_whole():
    ids = BUNDLED.encode("日").ids
    assert len(ids) > 1
    assert detokenize(BUNDLED, [], ids) == [""] * (len(ids) - 1) + ["日", ""]


def test_byte_fallback_characters_appear_once_they_are_whole():
    ids = [WORDS.token_to_id(f"<0x{byte:02X}>") for byte in "日".encode()]
    assert detokenize(WORDS, [0, 1], [*ids, 2]) == ["", "", "日", " cat", ""]


def test_unfinished_character_at_the_end_is_flushed():
    ids = BUNDLED.encode("a日").ids[:-1]
    assert "".join(detokenize(BUNDLED, [], ids)) == BUNDLED.decode(ids)


def test_special_tokens_give_no_text_and_do_not_slow_the_stream_down():
    decoded_lengths = []

    def decode(ids: Sequence[int]) -> str:
        decoded_lengths.append(len(ids))
        return decode_with(BUNDLED)(ids)

    detokenizer = Detokenizer(decode, prompt_ids=BUNDLED.encode("def f").ids)
    assert "".join(detokenizer.push(0) for _ in range(500)) == ""
    assert detokenizer.push(BUNDLED.token_to_id("(")) == "("
    assert max(decoded_lengths) < 20


@given(st.lists(st.text("ab", max_size=5), max_size=8), STOPS)
def test_stop_strings_cut_as_character_by_character_search_does(deltas, stops):
    expected, expected_stop = naive_cut("".join(deltas), stops)
    matcher = StopMatcher(stops)
    seen, stop = "", None
    for delta in deltas:
        matched = matcher.push(delta)
        seen += matched.text
        assert expected.startswith(seen), "text of a stop string leaked"
        if matched.stop is not None:
            stop = matched.stop
            break
    if stop is None:
        seen += matcher.flush()
    assert (seen, stop) == (expected, expected_stop)


@given(st.text("ab", max_size=12), STOPS)
def test_no_more_is_held_back_than_might_begin_a_stop_string(text, stops):
    matcher = StopMatcher(stops)
    matched = matcher.push(text)
    held = text[len(matched.text) :]
    if matched.stop is None:
        assert held == "" or any(stop.startswith(held) for stop in stops)


@given(st.text("abc日 ", max_size=30), STOPS, st.data())
def test_result_does_not_depend_on_how_ids_were_divided_into_runs(text, stops, data):
    ids = BUNDLED.encode(text).ids
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    bounds = [0, *cuts, len(ids)]
    stream = TextStream(decode_with(BUNDLED), prompt_ids=[], stops=StopRules(stops))
    seen, num_tokens, stop = "", 0, None
    for position, (start, end) in enumerate(pairwise(bounds)):
        run = stream.push(ids[start:end], is_last=position == len(bounds) - 2)
        seen, num_tokens, stop = seen + run.text, num_tokens + run.num_tokens, run.stop
        if stop is not None:
            break
    assert (seen, stop) == naive_cut(text, stops)
    if stop is None:
        assert num_tokens == len(ids)
    else:
        assert seen + stop in BUNDLED.decode(ids[:num_tokens])
        assert naive_cut(BUNDLED.decode(ids[: num_tokens - 1]), stops)[1] is None


@pytest.mark.parametrize("stops", [["b日c"], ["x", "日c"]])
def test_stop_string_split_over_two_events_is_cut(stops):
    ids = BUNDLED.encode("ab日cd").ids
    stream = TextStream(decode_with(BUNDLED), prompt_ids=[], stops=StopRules(stops))
    runs = []
    for position, token_id in enumerate(ids):
        runs.append(stream.push([token_id], is_last=position == len(ids) - 1))
        if runs[-1].stop:
            break
    assert "".join(run.text for run in runs) == "ab日cd".partition(stops[-1])[0]
    assert runs[-1].stop == stops[-1]


@given(st.text("ab日 ", max_size=30), STOPS, st.booleans(), st.integers(0, 12), st.data())
def test_min_tokens_and_kept_stops_do_as_token_by_token_search_does(
    text, stops, keeps_stop, min_tokens, data
):
    """The oracle decodes from the start after every token and looks for a stop string that it completed."""
    ids = BUNDLED.encode(text).ids
    expected, expected_count = text, len(ids)
    for count in range(min_tokens + 1, len(ids) + 1):
        before, now = (BUNDLED.decode(ids[:n]).rstrip(REPLACEMENT) for n in (count - 1, count))
        fresh = [
            (end, -len(stop), stop)
            for stop in stops
            for end in range(len(before) + 1, len(now) + 1)
            if now[:end].endswith(stop)
        ]
        if fresh:
            end, _, stop = min(fresh)
            expected, expected_count = now[: end if keeps_stop else end - len(stop)], count
            break
    rules = StopRules(stops, min_tokens, keeps_stop)
    stream = TextStream(decode_with(BUNDLED), prompt_ids=[], stops=rules)
    seen, num_tokens, start = "", 0, 0
    while start < len(ids):
        size = data.draw(st.integers(1, 4))
        run = stream.push(ids[start : start + size], is_last=start + size >= len(ids))
        seen, num_tokens, start = seen + run.text, num_tokens + run.num_tokens, start + size
        if run.stop is not None:
            break
    assert (seen, num_tokens) == (expected, expected_count)


@given(st.text("ab日é ", max_size=30), st.integers(0, 9))
def test_offsets_say_how_much_text_was_whole_before_each_token(text, begins_at):
    ids = BUNDLED.encode(text).ids
    stream = TextStream(
        decode_with(BUNDLED), prompt_ids=[], stops=StopRules(["never there"]), begins_at=begins_at
    )
    run = stream.push(ids, is_last=True)
    assert list(run.offsets) == [
        begins_at + len(BUNDLED.decode(ids[:count]).rstrip(REPLACEMENT)) for count in range(len(ids))
    ]
