"""What a program does with OpenAI's client, whatever its version, against a server that it is given.

`python tests/openai_client.py URL RELEASE` asks a server that decodes one sequence at a time, queues none, and
loads until the file RELEASE exists; it prints one JSON line. Knows the client; imports nothing of the server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import openai

MODEL = "scripted"
TALK = [{"role": "user", "content": "Say naïve 日"}]
EXTRA = {"exit_layer": 2, "draft_length": 3}
sleep = time.sleep


@dataclass
class Waits:
    """Stands for the clock that the client sleeps by: what it waits for comes true meanwhile."""

    while_waiting: Callable[[], None]
    seconds: list[float] = field(default_factory=list)

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.while_waiting()


def client_of(url: str, **options: object) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, **options})


def retried(url: str, *, while_waiting: Callable[[], None]) -> list[float]:
    """The seconds that the client waited before it was served, having been refused once."""
    waits = Waits(while_waiting)
    with client_of(url, max_retries=1) as client, mock.patch("time.sleep", waits):
        answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=2)
    assert answer.usage.completion_tokens == 2
    return waits.seconds


def loading_server_is_asked_again_when_it_says(url: str, release: Path) -> None:
    def let_it_load() -> None:
        release.touch()
        with client_of(url) as client:
            until(lambda: answers(client))

    assert retried(url, while_waiting=let_it_load) == [1.0]


def full_server_is_asked_again_when_it_says(url: str) -> None:
    with client_of(url) as other:
        stream = other.completions.create(model=MODEL, prompt="!slow", max_tokens=400, stream=True)
        next(iter(stream))

        def give_up_the_place() -> None:
            stream.close()
            until(lambda: answers(other))

        assert retried(url, while_waiting=give_up_the_place) == [1.0]


def answers(client: openai.OpenAI) -> bool:
    try:
        client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    except (openai.InternalServerError, openai.RateLimitError):
        return False
    return True


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "never"
        sleep(0.02)


def models_are_listed_and_shown(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model


def completion_has_text_usage_and_metrics(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="abcdef", max_tokens=12, logprobs=1, stop=["never"], seed=1, extra_body=EXTRA
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.tokens) == answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert_drafted(answer)


def streamed_completion_is_the_whole_one(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "abcdef", "max_tokens": 12, "extra_body": EXTRA}
    whole = client.completions.create(**options)
    *parts, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert_drafted(last)


def chat_has_a_message(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=TALK, max_completion_tokens=9, logprobs=True, top_logprobs=1, extra_body=EXTRA
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert len(choice.logprobs.content) == 9
    assert_drafted(answer)


def streamed_chat_is_the_whole_one(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": TALK, "max_completion_tokens": 9, "extra_body": EXTRA}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.create(**options, stream=True) as stream:
        parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content


def raw_answer_has_a_request_id(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse().id == "cmpl-mine"
    assert raw.parse()._request_id == "mine"


def async_client_is_served_alike(url: str) -> None:
    async def ask() -> None:
        options = {"model": MODEL, "prompt": "abcdef", "max_tokens": 12}
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole = await client.completions.create(**options)
            stream = await client.completions.create(**options, stream=True)
            assert "".join([part.choices[0].text async for part in stream]) == whole.choices[0].text

    asyncio.run(ask())


def refusals_are_the_clients_own_errors(client: openai.OpenAI) -> None:
    bad = raised(openai.BadRequestError, lambda: client.completions.create(model=MODEL, prompt="a", n=99))
    assert (bad.status_code, bad.param, bad.type) == (400, "n", "invalid_request_error")
    odd = raised(
        openai.BadRequestError,
        lambda: client.chat.completions.create(model=MODEL, messages=TALK, reasoning_effort="low"),
    )
    assert (odd.code, odd.param) == ("unsupported_parameter", "reasoning_effort")
    gone = raised(openai.NotFoundError, lambda: client.completions.create(model="other", prompt="a"))
    assert (gone.code, gone.param) == ("model_not_found", "model")
    raised(openai.NotFoundError, lambda: client.models.retrieve("other"))
    raised(openai.NotFoundError, lambda: client.embeddings.create(model=MODEL, input="a"))


def failure_in_a_stream_is_an_api_error(client: openai.OpenAI) -> None:
    """Last, because the server loses two workers to it."""
    stream = client.completions.create(model=MODEL, prompt="!raise", max_tokens=40, stream=True)
    parts: list[object] = []
    failure = raised(openai.APIError, lambda: parts.extend(stream))
    assert parts, "it had begun"
    assert failure.message.startswith("the worker died while it decoded this request")
    assert (failure.type, failure.code) == ("server_error", "worker_lost")


def raised(kind: type[openai.APIError], ask: Callable[[], object]) -> openai.APIError:
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def assert_drafted(answer: object) -> None:
    drafts = answer.metrics["speculative_decoding"]
    assert drafts["exit_layer"] == 2
    assert 0 < drafts["num_accepted_draft_tokens"] < drafts["num_draft_tokens"]


def main(url: str, release: str) -> None:
    loading_server_is_asked_again_when_it_says(url, Path(release))
    full_server_is_asked_again_when_it_says(url)
    checks = (
        models_are_listed_and_shown,
        completion_has_text_usage_and_metrics,
        streamed_completion_is_the_whole_one,
        chat_has_a_message,
        streamed_chat_is_the_whole_one,
        raw_answer_has_a_request_id,
        refusals_are_the_clients_own_errors,
    )
    with client_of(url) as client:
        for check in checks:
            check(client)
        async_client_is_served_alike(url)
        failure_in_a_stream_is_an_api_error(client)
    print(json.dumps({"openai": openai.__version__, "num_checks": len(checks) + 4}))


if __name__ == "__main__":
    main(*sys.argv[1:])
