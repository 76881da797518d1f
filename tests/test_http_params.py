"""What ends a completion, what edits its tokens and what cuts its prompt, through the real server."""

from __future__ import annotations

from tests.test_logprobs_http import GREEDY, IDS, PROMPT, REPORTS, TOKENIZER, choice


def test_stop_token_ends_the_answer_and_is_named(scripted):
    stop = IDS[4]
    for keeps in (False, True):
        got = scripted.complete(
            prompt=IDS, max_tokens=30, stop_token_ids=[stop], include_stop_str_in_output=keeps, **REPORTS
        )
        (cut,) = got["choices"]
        assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
        assert cut["token_ids"] == IDS[:5]
        assert cut["text"] == TOKENIZER.decode(IDS[: 5 if keeps else 4])
        assert got["usage"]["completion_tokens"] == 5


def test_end_of_sequence_token_has_no_stop_reason_and_shows_only_if_asked(scripted):
    hidden = choice(scripted, prompt="!end it", max_tokens=30)
    assert (hidden["finish_reason"], hidden["stop_reason"]) == ("stop", None)
    shown = choice(
        scripted,
        prompt="!end it",
        max_tokens=30,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )
    assert shown["text"] == hidden["text"] + "<|endoftext|>"


def test_stop_string_can_stay_in_the_text(server):
    text = choice(server, **GREEDY)["text"]
    stop = text[20:24]
    cut = choice(server, **GREEDY, stop=[stop], include_stop_str_in_output=True)
    assert cut["text"] == text.partition(stop)[0] + stop
    assert cut["stop_reason"] == stop


def test_stop_string_within_min_tokens_is_text_like_any_other(scripted):
    once = choice(scripted, prompt=PROMPT, max_tokens=3 * len(IDS), stop="naïve", return_token_ids=True)
    later = choice(
        scripted,
        prompt=PROMPT,
        max_tokens=3 * len(IDS),
        stop="naïve",
        min_tokens=len(once["token_ids"]),
        return_token_ids=True,
    )
    assert once["text"] == "def "
    assert later["text"] == f"{PROMPT}def "
    assert later["stop_reason"] == "naïve"


def test_edits_reach_the_engine(server):
    plain = choice(server, **GREEDY, return_token_ids=True)
    bad = max(plain["token_ids"], key=lambda token_id: len(TOKENIZER.decode([token_id]).strip()))
    word = TOKENIZER.decode([bad]).strip()
    assert bad not in choice(server, **GREEDY, bad_words=[word], return_token_ids=True)["token_ids"]
    few = choice(server, **GREEDY, allowed_token_ids=[50, 60], return_token_ids=True)
    assert set(few["token_ids"]) <= {50, 60}
    for name, value in (("frequency_penalty", 2), ("presence_penalty", 2), ("repetition_penalty", 5)):
        changed = choice(server, **GREEDY, **{name: value}, return_token_ids=True)
        assert len(set(changed["token_ids"])) > len(set(plain["token_ids"])), name


def test_min_tokens_puts_off_the_stop_token(server):
    plain = choice(server, **GREEDY, return_token_ids=True)["token_ids"]
    stop = plain[2]
    early = choice(server, **GREEDY, stop_token_ids=[stop], return_token_ids=True)
    late = choice(server, **GREEDY, stop_token_ids=[stop], min_tokens=8, return_token_ids=True)
    assert len(early["token_ids"]) <= 3
    assert len(late["token_ids"]) > 8
    assert stop not in late["token_ids"][:8]


def test_prompt_is_cut_to_its_last_tokens(scripted):
    for prompt in (PROMPT, IDS):
        got = scripted.complete(
            prompt=prompt, max_tokens=2, truncate_prompt_tokens=4, return_token_ids=True, echo=True
        )
        assert got["choices"][0]["prompt_token_ids"] == IDS[-4:]
        assert got["usage"]["prompt_tokens"] == 4
        assert got["choices"][0]["text"].startswith(TOKENIZER.decode(IDS[-4:]))
    long = scripted.complete(prompt="a b " * 2000, max_tokens=12, truncate_prompt_tokens=-1)
    assert long["usage"]["prompt_tokens"] == 500


def test_answer_is_named_by_the_header_then_by_the_body(scripted):
    body = {"prompt": "a", "max_tokens": 1, "request_id": "from-body"}
    assert scripted.post(body).json["id"] == "cmpl-from-body"
    both = scripted.post(body, headers={"X-Request-Id": "from-header"})
    assert both.json["id"] == "cmpl-from-header"
    assert both.headers["x-request-id"] == "from-header"
