"""What the operator and the model allow; refusals name the parameter and the range."""

from __future__ import annotations

import pytest

from config.settings import EngineSettings, ServerSettings
from decoding.messages import SamplingParams
from server.errors import AnswerTooLong, InvalidRequest
from server.limits import (
    Speculation,
    check_counts,
    resolve_max_tokens,
    resolve_sampling,
    resolve_speculation,
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


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"exit_layer": 0}, "exit_layer", "2, 4, 8"),
        ({"exit_layer": 3}, "exit_layer", "2, 4, 8"),
        ({"exit_layer": 99}, "exit_layer", "2, 4, 8"),
        ({"draft_length": 17}, "draft_length", "0 to 16"),
        ({"draft_length": -1}, "draft_length", "0 to 16"),
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


def test_sampling_is_the_checkpoints_where_the_request_names_none():
    defaults = SamplingParams(temperature=0.6, top_k=50, top_p=0.9, min_p=0.1)
    assert resolve_sampling(parse(), defaults) == defaults
    request = parse(temperature=0, top_k=-1, top_p=1, min_p=0)
    assert resolve_sampling(request, defaults) == SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0)


def test_max_tokens_is_sixteen_or_what_is_left_unless_asked_for():
    assert resolve_max_tokens(parse(), prompt_tokens=10, context_tokens=100) == 16
    assert resolve_max_tokens(parse(), prompt_tokens=95, context_tokens=100) == 5
    assert resolve_max_tokens(parse(max_tokens=90), prompt_tokens=10, context_tokens=100) == 90
    with pytest.raises(AnswerTooLong) as caught:
        resolve_max_tokens(parse(max_tokens=91), prompt_tokens=10, context_tokens=100)
    assert caught.value.param == "max_tokens"
    assert "at most 90" in caught.value.message
