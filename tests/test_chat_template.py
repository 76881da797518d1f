"""What a chat template can do with messages, and what it cannot."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from server.chat_template import ChatTemplate
from server.chat_types import ChatMessage, ChatRequest
from server.codec import PromptLimit
from server.errors import InvalidRequest, PromptTooLong, UnsupportedParameter

LIMIT = PromptLimit(max_tokens=10, max_bytes=1000, param="messages")
TALK = [{"role": "user", "content": "a"}]


def render(source: str, *contents: str, continues: bool = False, limit: PromptLimit = LIMIT) -> str:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    messages = [ChatMessage("user", content) for content in contents]
    return template.render(
        messages, add_generation_prompt=not continues, continue_final_message=continues, limit=limit
    )


def test_templates_of_hub_checkpoints_find_what_they_use():
    source = """{%- for m in messages -%}
        {%- if loop.first %}{% continue %}{% endif -%}
        {% generation %}{{ m | tojson }}{% endgeneration %}
    {%- endfor %}{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y') | length }}{{ tools is none }}"""
    assert render(source, "a", "<é>") == '{"role": "user", "content": "<é>"}<s></s>4True'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 9 ** 9999999 }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].role }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_a_template_must_not_do_is_refused(source):
    with pytest.raises(InvalidRequest) as caught:
        render(source, "a")
    assert caught.value.param == "messages"
    assert len(caught.value.message) < 300


def test_output_is_bounded():
    with pytest.raises(PromptTooLong) as caught:
        render("{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}", "a")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "continued"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "[a][b "),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", "[a][b"),
    ],
)
def test_continued_message_ends_the_prompt_as_the_template_writes_it(source, continued):
    assert render(source, "a", "b ", continues=True) == continued


def test_message_that_the_template_drops_cannot_be_continued():
    with pytest.raises(InvalidRequest) as caught:
        render("{{ messages[0].content }}", "a", "b", continues=True)
    assert caught.value.param == "continue_final_message"


def test_ten_thousand_bad_messages_are_one_error():
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"messages": [{"role": "nobody"}] * 10_000})
    assert len(caught.value.errors()) == 1


def test_requests_never_bring_a_template():
    for body in ({"chat_template": "x"}, {"chat_template_kwargs": {"a": 1}}):
        with pytest.raises(UnsupportedParameter):
            ChatRequest.model_validate({"messages": TALK} | body)
    ChatRequest.model_validate({"messages": TALK, "chat_template": None, "chat_template_kwargs": {}})
