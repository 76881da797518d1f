"""`POST /v1/chat/completions`: what a template makes of messages, and how answers to them are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from operator import add

import openai
import pytest
from tokenizers import Tokenizer

from config.errors import SettingsError
from config.settings import BUNDLED_CHECKPOINT, Settings
from server.chat_template import TemplateSource
from tests.server_process import SCRIPTED, Server, run_to_end, running

TOKENIZER = Tokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json"))
PATH = "/v1/chat/completions"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say naïve 日"}]
RENDERED = "<system>Be brief.</>\n<user>Say naïve 日</>\n<assistant>"
IDS = TOKENIZER.encode(RENDERED).ids


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A scripted server whose checkpoint has a chat template, known under two names."""
    flags = ("--model", "chat", "--served-model-name", "chatty,an/alias")
    with running(SCRIPTED, tmp_path_factory.mktemp("chatty"), *flags) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def client(chatty: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chatty.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(server: Server, **body: object):
    answer = server.post({"messages": TALK, "max_tokens": 12} | body, path=PATH)
    assert answer.status == 200, answer.body
    return answer.json


def streamed(server: Server, **body: object) -> list:
    """The events of a stream but for its end."""
    answer = server.post({"messages": TALK, "max_tokens": 12, "stream": True} | body, path=PATH)
    assert answer.status == 200, answer.body
    events = [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def prompt_of(server: Server, **body: object) -> str:
    return TOKENIZER.decode(ask(server, return_token_ids=True, **body)["prompt_token_ids"])


def test_openai_client_gets_what_the_template_leads_to(client):
    answer = client.chat.completions.create(
        model="chatty",
        messages=TALK,
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=2,
        extra_body={"exit_layer": 2, "draft_length": 3},
    )
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("chat.completion", "chatty")
    assert answer.id.startswith("chatcmpl-")
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content == TOKENIZER.decode(IDS[:12])
    assert answer.usage.prompt_tokens == len(IDS)
    assert answer.metrics["speculative_decoding"]["exit_layer"] == 2
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 2
    assert len(choice.logprobs.content) == 12


def test_openai_client_streams_the_role_first_and_then_the_text_it_gets_at_once(client):
    body = {"model": "an/alias", "messages": TALK, "max_tokens": 20, "seed": 3, "n": 2}
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    whole = client.chat.completions.create(**body)
    *parts, last = chunks
    assert [part.choices[0].delta.role for part in parts] == ["assistant"] * 2 + [None] * (len(parts) - 2)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.finish_reason for part in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason
    assert (last.choices, last.usage) == ([], whole.usage)


def test_complete_answer_is_the_fold_of_the_stream(chatty):
    body = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True, "return_draft_trace": True}
    answer, events = ask(chatty, **body), streamed(chatty, **body)
    (whole,) = answer["choices"]
    opening, *parts = [event["choices"][0] for event in events]
    assert opening["delta"] == {"role": "assistant", "content": ""}
    assert events[0]["prompt_token_ids"] == answer["prompt_token_ids"] == IDS
    assert "".join(part["delta"].get("content", "") for part in parts) == whole["message"]["content"]
    for name in ("token_ids", "draft_trace"):
        assert reduce(add, (part[name] for part in parts)) == whole[name]
    assert reduce(add, (part["logprobs"]["content"] for part in parts)) == whole["logprobs"]["content"]


def test_bytes_of_the_tokens_join_to_the_texts(chatty):
    (choice,) = ask(chatty, max_tokens=len(IDS), logprobs=True)["choices"]
    tokens = choice["logprobs"]["content"]
    assert bytes(reduce(add, (token["bytes"] for token in tokens))).decode() == RENDERED
    assert "\ufffd" in "".join(token["token"] for token in tokens), "a character has several tokens"
    assert all(token["top_logprobs"] == [] for token in tokens)


def test_answer_gets_all_the_context_has_room_for_unless_told(chatty):
    answer = chatty.post({"messages": TALK}, path=PATH).json
    assert answer["usage"]["total_tokens"] == 512
    both = ask(chatty, max_tokens=3, max_completion_tokens=5)
    assert both["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("message", "rendered"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ({"role": "user", "content": "  a "}, "a"),
        ({"role": "user", "content": []}, ""),
        ({"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}, "{{ 7 * 7 }}{% raw %}"),
    ],
)
def test_contents_are_texts_or_lists_of_them(chatty, message, rendered):
    assert prompt_of(chatty, messages=[message]) == f"<user>{rendered}</>\n<assistant>"


def test_names_reach_the_template(chatty):
    message = {"role": "user", "content": "a", "name": "Ada"}
    assert prompt_of(chatty, messages=[message]) == "<user Ada>a</>\n<assistant>"


def test_turn_can_be_left_open_or_unbegun(chatty):
    begun = [*TALK, {"role": "assistant", "content": "Well, "}]
    assert prompt_of(chatty, messages=begun, add_generation_prompt=False).endswith("<assistant>Well,</>\n")
    continued = {"messages": begun, "continue_final_message": True}
    assert prompt_of(chatty, **continued) == RENDERED + "Well,", "the template trims messages"
    assert prompt_of(chatty, **continued, add_generation_prompt=False) == RENDERED + "Well,"


BAD_BODIES = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [[]]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "owner", "content": "a"}]}, "messages"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "refuse me"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a b " * 1000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 400_000}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ({"tools": [{}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"echo": True}, "echo"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 600}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 600}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"exit_layer": 3}, "exit_layer"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
]


@pytest.mark.parametrize(("change", "param"), BAD_BODIES, ids=[str(change)[:50] for change, _ in BAD_BODIES])
def test_bad_input_is_a_400_that_names_the_parameter(chatty, change, param):
    answer = chatty.post({"messages": TALK} | change, path=PATH)
    assert answer.status == 400, answer.body
    assert (answer.error["type"], answer.error["param"]) == ("invalid_request_error", param)
    assert len(answer.error["message"]) < 400
    assert "Traceback" not in chatty.stderr


def test_templates_own_words_reach_the_client(chatty):
    refused = chatty.post({"messages": [{"role": "user", "content": "refuse me"}]}, path=PATH)
    assert "no such words" in refused.error["message"]


def test_checkpoint_without_a_template_refuses_with_the_remedy(server):
    refused = server.post({"messages": TALK}, path=PATH)
    assert (refused.status, refused.error["param"]) == (400, "messages")
    assert "--chat-template" in refused.error["message"]
    assert not server.get("/server_info").json["has_chat_template"]


def test_operators_template_goes_before_the_checkpoints(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ eos_token }}")
    with running(SCRIPTED, tmp_path, "--model", "chat", "--chat-template", str(file)) as server:
        server.wait_ready()
        text = server.post({"messages": TALK}, path="/tokenize").json["tokens"]
        assert TOKENIZER.decode(text, skip_special_tokens=False) == ("[Be brief.][Say naïve 日]<|endoftext|>")


def test_template_that_cannot_be_used_stops_the_start_in_one_line(tmp_path):
    broken = tmp_path / "broken.jinja"
    broken.write_text("\n{% for %}")
    for path, words in ((broken, "line 2"), (tmp_path / "none.jinja", "cannot be read")):
        done = run_to_end(*SCRIPTED, "--port", "0", "--chat-template", str(path))
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        with pytest.raises(SettingsError):
            TemplateSource(path)


def test_every_served_name_answers_and_the_first_is_the_main_one(chatty):
    models = chatty.get("/v1/models").json["data"]
    assert [model["id"] for model in models] == ["chatty", "an/alias"]
    assert chatty.get("/v1/models/an/alias").json["id"] == "an/alias"
    for name in ("chatty", "an/alias"):
        assert ask(chatty, model=name)["model"] == "chatty"
    assert chatty.post({"messages": TALK, "model": "chat"}, path=PATH).status == 404
    assert chatty.metric("vllm:generation_tokens_total", model_name="chatty") > 0
    assert Settings.load({"served_model_name": ["a", "b"]}).model_names == ("a", "b")
