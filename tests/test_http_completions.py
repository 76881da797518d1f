"""`POST /v1/completions` of the real server, through OpenAI's client and plain sockets."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator

import openai
import pytest
from tokenizers import Tokenizer

from config.settings import BUNDLED_CHECKPOINT
from tests.server_process import Server, text_of, wait_until

PROMPT = "def fibonacci(n):\n"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 48, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def speculation(answer):
    return answer["metrics"]["speculative_decoding"]


def test_openai_client_completes_with_chosen_exit_layer_and_draft_length(client):
    answer = client.completions.create(
        model="python-8m",
        prompt=PROMPT,
        max_tokens=48,
        temperature=0,
        extra_body={"exit_layer": 4, "draft_length": 4, "ignore_eos": True},
    )
    assert answer.usage.completion_tokens == 48
    assert answer.choices[0].finish_reason == "length"
    drafts = answer.metrics["speculative_decoding"]
    assert drafts["exit_layer"] == drafts["exit_layer_used"] == 4
    assert drafts["draft_length"] == 4
    assert 0 < drafts["num_accepted_draft_tokens"] < drafts["num_draft_tokens"]
    assert sum(drafts["acceptance_histogram"]) == drafts["num_spec_steps"]


def test_openai_client_streams_the_text_it_gets_at_once(client):
    options = {"model": "python-8m", "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    whole = client.completions.create(**options)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert len(parts) > 3
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(part.usage is None for part in parts)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert last.metrics["speculative_decoding"]["num_draft_tokens"] > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_is_the_same_for_every_exit_layer_and_draft_length(server):
    answers = [
        server.complete(**GREEDY, exit_layer=exit_layer, draft_length=draft_length)
        for exit_layer, draft_length in ((2, 0), (2, 2), (4, 4), (8, 3), (15, 8))
    ]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert speculation(answers[0])["num_draft_tokens"] == 0
    assert speculation(answers[0])["draft_acceptance_rate"] is None
    assert all(speculation(answer)["num_draft_tokens"] > 0 for answer in answers[1:])


def test_same_seed_gives_the_same_text_and_no_seed_gives_another(server):
    sampled = {"prompt": PROMPT, "temperature": 1.0, "max_tokens": 32, "ignore_eos": True}
    seeded = {server.text(**sampled, seed=7, draft_length=length) for length in (0, 3, 5)}
    assert len(seeded) == 1
    assert len({server.text(**sampled) for _ in range(3)}) == 3


def test_choices_stand_in_the_order_of_prompts_and_choices(server):
    prompts = ["def one(", "import "]
    answer = server.complete(prompt=prompts, n=2, seed=3, temperature=0.8, max_tokens=8, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice in answer["choices"]:
        assert choice["text"].startswith(prompts[choice["index"] // 2])
    alone = server.complete(prompt=prompts[0], n=2, seed=3, temperature=0.8, max_tokens=8, echo=True)
    assert [c["text"] for c in alone["choices"]] == [c["text"] for c in answer["choices"][:2]]
    assert len({choice["text"] for choice in answer["choices"]}) == 4


def test_prompt_of_ids_is_the_prompt_of_text(server):
    ids = Tokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json")).encode(PROMPT).ids
    by_text, by_ids = server.complete(**GREEDY), server.complete(**GREEDY | {"prompt": ids})
    assert by_ids["choices"] == by_text["choices"]
    assert by_ids["usage"]["prompt_tokens"] == by_text["usage"]["prompt_tokens"] == len(ids)
    several = server.complete(**GREEDY | {"prompt": [ids, ids[:3]], "echo": True})
    assert several["choices"][0]["text"] == PROMPT + by_text["choices"][0]["text"]


def test_stop_string_cuts_the_text_before_it_whatever_the_run_length(server):
    whole = server.text(**GREEDY)
    stop = whole[20:23]
    expected = whole.partition(stop)[0]
    for draft_length in (0, 2, 6):
        answer = server.complete(**GREEDY, stop=["never there", stop], draft_length=draft_length)
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (expected, "stop", stop)
        assert answer["usage"]["completion_tokens"] < 48
        assert text_of(server.stream(**GREEDY, stop=[stop], draft_length=draft_length)) == expected


def test_usage_does_not_depend_on_the_run_in_which_a_stop_string_fell(server):
    stop = server.text(**GREEDY)[20:23]
    counts = {
        server.complete(**GREEDY, stop=stop, draft_length=length)["usage"]["completion_tokens"]
        for length in (0, 3, 6)
    }
    assert len(counts) == 1


def test_streamed_echo_begins_with_the_prompt(server):
    events = server.stream(**GREEDY, echo=True)
    assert events[-1] == "[DONE]"
    assert text_of(events) == PROMPT + server.text(**GREEDY)


def test_continuous_usage_counts_up_in_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, done = server.stream(**GREEDY, stream_options=options)
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in events]
    assert done == "[DONE]"
    assert counts == sorted(counts)
    assert counts[-1] == 48


def test_chunks_arrive_one_by_one(server):
    with server.streaming(**GREEDY | {"max_tokens": 400}) as events:
        next(events)
        assert server.metric("vllm:num_requests_running") == 1
        assert list(events)[-1] == "[DONE]"


def test_prompt_that_just_fits_is_served_to_the_last_position(server):
    ids = [100] * 1023
    answer = server.complete(prompt=ids, temperature=0)
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "length"


def test_request_id_is_echoed_or_made(server):
    asked = server.post({"prompt": "a", "max_tokens": 1}, headers={"X-Request-Id": "my-id.1"})
    assert asked.headers["x-request-id"] == "my-id.1"
    assert asked.json["id"] == "cmpl-my-id.1"
    made = server.post({"prompt": "a", "max_tokens": 1}, headers={"X-Request-Id": "bad id\t"})
    assert len(made.headers["x-request-id"]) == 32


def mixed_request(index: int) -> dict[str, object]:
    """One of many requests that differ in all that a request can."""
    return {
        "prompt": "x = 1\n" * (1 + index % 7) + f"def f{index}(",
        "max_tokens": 16 + 5 * (index % 9),
        "exit_layer": 1 + index % 15,
        "draft_length": index % 6,
        "temperature": (0, 0.7, 1.2)[index % 3],
        "top_p": (1.0, 0.9)[index % 2],
        "seed": index,
    }


def test_32_concurrent_streams_equal_their_solo_runs_and_leave_nothing_behind(server):
    requests = [mixed_request(index) for index in range(32)]
    alone = [server.text(**request) for request in requests]
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.__setitem__(i, text_of(server.stream(**requests[i]))))
        for i in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [together[index] for index in range(32)] == alone
    server.wait_idle()
    assert server.metric("layerskip_kv_blocks", state="used") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_blocks(server, stream):
    server.wait_idle()
    aborted = server.metric("layerskip_aborted_requests_total")
    leave = threading.Event()
    gone = threading.Thread(target=leave_midway, args=(server, stream, leave))
    gone.start()
    wait_until(lambda: server.metric("layerskip_kv_blocks", state="used") > 0)
    leave.set()
    started = time.monotonic()
    wait_until(lambda: b'state="used"} 0.0' in server.get("/metrics").body, timeout_s=5)
    print(f"blocks free after {1000 * (time.monotonic() - started):.0f} ms")
    gone.join()
    assert server.metric("layerskip_aborted_requests_total") == aborted + 1
    assert server.metric("vllm:num_requests_running") == 0


def leave_midway(server: Server, stream: bool, leave: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps(GREEDY | {"max_tokens": 900, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    leave.wait(30)
    connection.close()


def test_models_and_server_info_tell_what_requests_need(client, server):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("python-8m", 1024)
    assert client.models.retrieve("python-8m").id == model.id
    info = server.get("/server_info").json
    assert info["allowed_exit_layers"] == list(range(1, 16))
    assert info["num_layers"] == 16
    assert info["dtype"] == "float32"
    assert info["limits"]["max_model_len"] == 1024
    assert info["kv_cache"]["num_tokens"] >= 1024
    assert server.get("/version").json["version"]
    assert server.get("/health").json["status"] == "ready"
