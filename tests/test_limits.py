"""What the operator and the model allow; refusals name the parameter and the range."""

from __future__ import annotations

import pytest
from msgspec import structs

from config.server_settings import ServerSettings
from config.setting_types import SchedulingPolicy
from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding.messages import Drafter, LogitEdits, SamplingParams, TextAssets
from server.codec import Codec
from server.edits import resolve_edits
from server.errors import AnswerTooLong, InvalidRequest
from server.limits import (
    Speculation,
    TokenBudget,
    check_counts,
    resolve_max_tokens,
    resolve_priority,
    resolve_sampling,
    resolve_speculation,
    resolve_truncation,
)
from server.openai_types import CompletionRequest
from tests.scripted_engine import scripted_limits

LIMITS = scripted_limits(EngineSettings())
SETTINGS = ServerSettings()


def parse(**body: object) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "a"} | body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 17}, "n"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 8}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
    ],
)
def test_too_much_is_refused_by_name(body, param):
    with pytest.raises(InvalidRequest) as caught:
        check_counts(parse(**body), SETTINGS)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        {"n": 16, "best_of": 16},
        {"prompt": ["a"] * 64},
        {"prompt": ["a"] * 8, "n": 8},
        {"stop": ["a" * 256] * 4},
        {"stream": True, "stream_options": {}},
    ],
)
def test_the_limits_themselves_are_allowed(body):
    check_counts(parse(**body), SETTINGS)


def test_priorities_are_looked_at_only_where_the_operator_wants_them():
    ordered = ServerSettings(scheduling_policy=SchedulingPolicy.PRIORITY)
    asked = [parse(), parse(priority=None), parse(priority=0), parse(priority=-3), parse(priority=7)]
    assert [resolve_priority(request, ordered) for request in asked] == [0, 0, 0, -3, 7]
    assert [resolve_priority(request, SETTINGS) for request in asked[:3]] == [0, 0, 0]
    for request in asked[3:]:
        with pytest.raises(InvalidRequest, match="--scheduling-policy priority") as caught:
            resolve_priority(request, SETTINGS)
        assert caught.value.param == "priority"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"exit_layer": 0}, "exit_layer", "2, 4, 8"),
        ({"exit_layer": 3}, "exit_layer", "2, 4, 8"),
        ({"exit_layer": 99}, "exit_layer", "2, 4, 8"),
        ({"draft_length": 17}, "draft_length", "0 to 16"),
        ({"draft_length": -1}, "draft_length", "0 to 16"),
        ({"drafter": "model"}, "drafter", "a draft model"),
    ],
)
def test_drafts_outside_the_limits_are_refused_with_the_allowed_values(body, param, words):
    with pytest.raises(InvalidRequest) as caught:
        resolve_speculation(parse(**body), LIMITS)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, Speculation(exit_layer=4, draft_length=3)),
        ({"exit_layer": "auto", "draft_length": "auto"}, Speculation(exit_layer=4, draft_length=3)),
        ({"exit_layer": 8, "draft_length": 0}, Speculation(exit_layer=8, draft_length=0)),
        ({"draft_length": 16}, Speculation(exit_layer=4, draft_length=16)),
    ],
)
def test_drafts_are_the_servers_where_the_request_names_none(body, expected):
    assert resolve_speculation(parse(**body), LIMITS) == expected


def test_the_drafter_is_the_servers_where_the_request_names_none():
    limits = structs.replace(LIMITS, default_drafter=Drafter.HYBRID)
    assert resolve_speculation(parse(), limits).drafter is Drafter.HYBRID
    assert resolve_speculation(parse(drafter="none"), limits).drafter is Drafter.NONE
    assert resolve_speculation(parse(drafter="early_exit"), limits).drafter is Drafter.EARLY_EXIT


def test_sampling_is_the_checkpoints_where_the_request_names_none():
    defaults = SamplingParams(temperature=0.6, top_k=50, top_p=0.9, min_p=0.1)
    assert resolve_sampling(parse(), defaults) == defaults
    request = parse(temperature=0, top_k=-1, top_p=1, min_p=0)
    assert resolve_sampling(request, defaults) == SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0)


def test_max_tokens_is_the_default_or_what_is_left_unless_asked_for():
    completion, chat = TokenBudget(None, 16), TokenBudget(None, None)
    assert resolve_max_tokens(completion, prompt_tokens=10, context_tokens=100) == 16
    assert resolve_max_tokens(completion, prompt_tokens=95, context_tokens=100) == 5
    assert resolve_max_tokens(chat, prompt_tokens=10, context_tokens=100) == 90
    assert resolve_max_tokens(TokenBudget(90, 16), prompt_tokens=10, context_tokens=100) == 90
    assert resolve_max_tokens(TokenBudget(0, 16), prompt_tokens=100, context_tokens=100) == 0
    with pytest.raises(AnswerTooLong) as caught:
        resolve_max_tokens(TokenBudget(91, 16, "max_x"), prompt_tokens=10, context_tokens=100)
    assert caught.value.param == "max_x"
    assert "at most 90" in caught.value.message


@pytest.mark.parametrize(
    ("asked", "budget", "kept"),
    [
        (None, TokenBudget(None, 16), None),
        (5, TokenBudget(None, 16), 5),
        (100, TokenBudget(1, 16), 100),
        (-1, TokenBudget(None, 16), 84),
        (-1, TokenBudget(30, 16), 70),
        (-1, TokenBudget(None, None), 99),
        (-1, TokenBudget(200, None), 1),
    ],
)
def test_truncation_keeps_what_was_asked_for_or_what_the_answer_leaves(asked, budget, kept):
    request = parse(truncate_prompt_tokens=asked)
    assert resolve_truncation(request, budget, context_tokens=100) == kept


@pytest.mark.parametrize("asked", [0, 101])
def test_truncation_beyond_the_context_is_refused(asked):
    with pytest.raises(InvalidRequest) as caught:
        resolve_truncation(parse(truncate_prompt_tokens=asked), TokenBudget(None, 16), context_tokens=100)
    assert caught.value.param == "truncate_prompt_tokens"


TOKENIZER_JSON = (BUNDLED_CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8")
CODEC = Codec(TextAssets(TOKENIZER_JSON, [0], [0], chat_template=None), LIMITS)


def edits(**body: object) -> LogitEdits | None:
    return resolve_edits(parse(**body), CODEC, stop_token_ids=[0], max_new_tokens=16)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"logit_bias": {}, "bad_words": [], "min_tokens": 0},
        {"logit_bias": {"5": 0}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1},
    ],
)
def test_nothing_edited_is_no_edits(body):
    assert edits(**body) is None


def test_edits_are_taken_over_as_ids():
    assert edits(
        logit_bias={"5": -3, "6": 0},
        allowed_token_ids=[7, 5, 7],
        min_tokens=16,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
    ) == LogitEdits(
        logit_bias={5: -3.0},
        allowed_token_ids=[5, 7],
        min_tokens=16,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
    )


def test_bad_words_are_banned_at_the_start_of_a_text_and_behind_a_word():
    def ids(text: str) -> list[int]:
        return CODEC.encode_word(text)

    assert edits(bad_words=["return", " return"]) == LogitEdits(bad_words=[ids("return"), ids(" return")])
    assert len(ids("unspeakable")) > 1
    assert edits(bad_words=["unspeakable"]).bad_words == [ids("unspeakable"), ids(" unspeakable")]


def test_a_word_that_only_the_tokenizer_can_spell_needs_no_ban():
    """Padding that was added to a tokenizer has an id behind the model's last."""
    smaller = structs.replace(LIMITS, vocab_size=max(CODEC.encode_word(" return")))
    codec = Codec(TextAssets(TOKENIZER_JSON, [0], [0], chat_template=None), smaller)
    asked = parse(bad_words=["return", "a"])
    found = resolve_edits(asked, codec, stop_token_ids=[0], max_new_tokens=16)
    assert found == LogitEdits(bad_words=[CODEC.encode_word("a"), CODEC.encode_word(" a")])


def test_min_tokens_wait_for_nothing_where_no_token_ends_the_answer():
    assert resolve_edits(parse(min_tokens=4), CODEC, stop_token_ids=[], max_new_tokens=16) is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"min_tokens": 17}, "min_tokens"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [4096]}, "allowed_token_ids"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"bad_words": ["a" * 257]}, "bad_words"),
    ],
)
def test_edits_that_the_model_cannot_have_are_refused_by_name(body, param):
    with pytest.raises(InvalidRequest) as caught:
        edits(**body)
    assert caught.value.param == param
