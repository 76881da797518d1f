"""Requests are taken strictly: what is not understood is refused by name."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from server.errors import InvalidRequest, UnsupportedParameter
from server.openai_types import CompletionRequest


def parse(**body: object) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "a"} | body)


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1], [2, 3]], ([1], [2, 3])),
        ("", ("",)),
        ([[]], ([],)),
    ],
)
def test_prompts_come_in_four_forms(prompt, parsed):
    assert parse(prompt=prompt).prompt == parsed


@pytest.mark.parametrize(
    "prompt", [None, 1, [], ["a", 1], [1, "a"], [1, 2.0], [True], [[1], ["a"]], {"a": 1}, "\ud800"]
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValidationError) as caught:
        parse(prompt=prompt)
    assert caught.value.errors()[0]["loc"] == ("prompt",)
    assert len(caught.value.errors()) == 1


def test_a_million_bad_ids_are_one_error():
    with pytest.raises(ValidationError) as caught:
        parse(prompt=[*range(100_000), "x"])
    assert len(caught.value.errors()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("max_tokens", 10**30),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.1),
        ("seed", 2**63),
        ("seed", "1"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("n", 0),
        ("echo", "yes"),
        ("stream", 1),
        ("exit_layer", "x"),
        ("exit_layer", True),
        ("exit_layer", 2.0),
        ("draft_length", "x"),
        ("draft_length", []),
        ("stream_options", True),
        ("model", 3),
        ("drafter", "oracle"),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", []),
        ("logit_bias", {"5": 100.5}),
        ("logit_bias", {"5": float("nan")}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"1.0": 1}),
        ("bad_words", "one"),
        ("bad_words", [""]),
        ("bad_words", [1]),
        ("bad_words", ["\ud800"]),
        ("stop", "\ud800"),
        ("allowed_token_ids", [1, True]),
        ("stop_token_ids", ["1"]),
        ("stop_token_ids", 1),
        ("min_tokens", -1),
        ("truncate_prompt_tokens", -2),
        ("return_token_ids", 1),
        ("return_draft_trace", "yes"),
        ("cache_salt", ""),
        ("cache_salt", 7),
        ("cache_salt", "\ud800"),
        ("cache_salt", "x" * 1025),
        ("request_id", "a b"),
        ("request_id", ""),
    ],
)
def test_values_out_of_type_or_range_are_refused_under_their_name(name, value):
    with pytest.raises(ValidationError) as caught:
        parse(**{name: value})
    assert caught.value.errors()[0]["loc"][0] == name


def test_null_leaves_every_choice_to_the_server():
    request = parse(**{name: None for name in CompletionRequest.model_fields if name != "prompt"})
    assert request == parse()
    assert (request.num_choices, request.stop_strings, request.includes_usage) == (1, [], False)


@pytest.mark.parametrize("alias", ["num_speculative_tokens", "num_assistant_tokens"])
def test_aliases_mean_the_same(alias):
    assert parse(**{alias: 3}).draft_length == 3
    assert parse(**{alias: 3, "draft_length": 3}).draft_length == 3
    assert parse(assistant_early_exit=4).exit_layer == 4
    with pytest.raises(InvalidRequest) as caught:
        parse(**{alias: 3, "draft_length": 4})
    assert caught.value.param == alias


def test_auto_is_the_servers_choice():
    request = parse(exit_layer="auto", draft_length="auto")
    assert (request.exit_layer, request.draft_length) == (None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "x"),
        ("tools", [{}]),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"regex": "a"}),
        ("guided_json", {}),
        ("grammar", "root ::= x"),
        ("use_beam_search", True),
        ("length_penalty", 0.5),
        ("prompt_embeds", "x"),
        ("spaces_between_special_tokens", False),
        ("truncation_side", "right"),
    ],
)
def test_known_parameters_that_are_not_offered_are_refused_by_name(name, value):
    with pytest.raises(UnsupportedParameter) as caught:
        parse(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", None),
        ("presence_penalty", 0),
        ("frequency_penalty", 0.0),
        ("repetition_penalty", 1.0),
        ("logit_bias", {}),
        ("suffix", ""),
        ("tools", []),
        ("response_format", {"type": "text"}),
        ("use_beam_search", False),
        ("stop_token_ids", []),
        ("priority", 0),
        ("cache_salt", None),
        ("cache_salt", "a secret"),
        ("spaces_between_special_tokens", True),
        ("stop", []),
        ("something_new", {"a": 1}),
        ("user", "me"),
    ],
)
def test_neutral_values_and_unknown_names_are_accepted(name, value):
    parse(**{name: value})
