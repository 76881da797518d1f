"""`/metrics` of a running server: its counters are the sums over the answers it gave."""

from __future__ import annotations

import json

from prometheus_client.parser import text_string_to_metric_families

from tests.server_process import Server

SCRIPT = [
    {"prompt": "def one(n):\n", "temperature": 0, "max_tokens": 40, "exit_layer": 2, "draft_length": 3},
    {
        "prompt": ["import ", "class A"],
        "n": 2,
        "seed": 1,
        "max_tokens": 24,
        "exit_layer": 5,
        "draft_length": 2,
    },
    {"prompt": "x = ", "seed": 2, "max_tokens": 32, "draft_length": 0},
    {
        "prompt": "def one(n):\n",
        "temperature": 0,
        "max_tokens": 64,
        "stop": ["e"],
        "exit_layer": 4,
        "draft_length": 6,
    },
    {"prompt": [100, 200, 300], "seed": 3, "max_tokens": 1},
]


def read(server: Server) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = server.get("/metrics").body.decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Growth:
    """How much each sample has grown between two scrapes."""

    def __init__(self, before, after) -> None:
        self._growth = {key: value - before.get(key, 0.0) for key, value in after.items()}

    def of(self, name: str, **labels: str) -> float:
        return sum(v for (n, found), v in self._growth.items() if n == name and labels.items() <= set(found))

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        sums: dict[tuple[str, ...], float] = {}
        for (sample, found), value in self._growth.items():
            if sample == name and value:
                key = tuple(dict(found)[label] for label in labels)
                sums[key] = sums.get(key, 0.0) + value
        return sums


def run_script(server: Server) -> tuple[list, Growth]:
    """The script's answers, the last streamed once more, and what the counters made of them."""
    server.wait_idle()
    before = read(server)
    answers = [server.complete(**request) for request in SCRIPT]
    *_, last, done = server.stream(**SCRIPT[0], stream_options={"include_usage": True})
    assert done == "[DONE]"
    answers.append(json.loads(last))
    server.wait_idle()
    return answers, Growth(before, read(server))


def test_counters_equal_the_sums_over_a_scripted_run(server):
    answers, growth = run_script(server)
    drafts = [answer["metrics"]["speculative_decoding"] for answer in answers]

    def total(field: str) -> int:
        return sum(answer["usage"][field] for answer in answers)

    assert growth.of("vllm:prompt_tokens_total") == total("prompt_tokens")
    assert growth.of("vllm:generation_tokens_total") == total("completion_tokens")
    assert growth.of("vllm:spec_decode_num_drafts_total") == sum(d["num_spec_steps"] for d in drafts)
    assert growth.of("vllm:spec_decode_num_draft_tokens_total") == sum(d["num_draft_tokens"] for d in drafts)
    kept = sum(d["num_accepted_draft_tokens"] for d in drafts)
    assert 0 < growth.of("vllm:spec_decode_num_accepted_tokens_total") == kept
    assert growth.of("vllm:spec_decode_num_accepted_tokens_per_pos_total") == kept
    assert growth.of("layerskip_kept_tokens_total", exit_layer="5") == drafts[1]["num_accepted_draft_tokens"]
    assert growth.of("layerskip_draft_tokens_total", exit_layer="5") == drafts[1]["num_draft_tokens"]
    assert growth.of("vllm:request_generation_tokens_sum") == total("completion_tokens")


def test_finished_sequences_are_counted_by_reason(server):
    answers, growth = run_script(server)
    choices = [choice for answer in answers for choice in answer["choices"]]
    finished = growth.by("vllm:request_success_total", "finished_reason")
    # The streamed answer's last chunk has no choices; it ended as the first answer did.
    expected: dict[tuple[str, ...], float] = {}
    for choice in [*choices, answers[0]["choices"][0]]:
        key = (choice["finish_reason"],)
        expected[key] = expected.get(key, 0.0) + 1
    assert finished == expected
    assert growth.of("vllm:e2e_request_latency_seconds_count") == len(choices) + 1
    assert growth.of("vllm:time_to_first_token_seconds_count") == len(choices) + 1
    assert growth.of("vllm:request_params_n_count") == len(answers)


def test_positions_have_their_own_denominators(server):
    _, growth = run_script(server)
    drafted = growth.by("layerskip_draft_tokens_total", "exit_layer", "position")
    reached = growth.by("layerskip_reached_tokens_total", "exit_layer", "position")
    kept = growth.by("layerskip_kept_tokens_total", "exit_layer", "position")
    assert {position for _, position in drafted} >= {"0", "1", "2"}
    for key, count in drafted.items():
        assert count >= reached.get(key, 0) >= kept.get(key, 0)
    assert all(reached[key] == drafted[key] for key in drafted if key[1] == "0")


def test_token_times_are_counted_once_for_every_token_after_the_first_run(server):
    server.wait_idle()
    before = read(server)
    server.complete(**SCRIPT[0] | {"ignore_eos": True})
    growth = Growth(before, read(server))
    assert growth.of("layerskip_inter_token_latency_seconds_count") == 39
    assert growth.of("vllm:inter_token_latency_seconds_count") == 39
    fine, end_to_end = "layerskip_inter_token_latency_seconds_sum", "vllm:e2e_request_latency_seconds_sum"
    assert 0 < growth.of(fine) <= growth.of(end_to_end)


def test_names_keep_their_colon_whatever_format_a_scraper_prefers(scripted):
    openmetrics = "application/openmetrics-text;version=1.0.0;escaping=underscores;q=0.6"
    for accept in ("", "*/*", openmetrics, "text/plain;version=1.0.0;escaping=allow-utf-8"):
        answer = scripted.get("/metrics", headers={"Accept": accept})
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert b"\nvllm:num_requests_running{" in answer.body


def test_stop_string_discards_what_was_decoded_past_it_and_keeps_it_out_of_usage(scripted):
    scripted.wait_idle()
    before = read(scripted)
    request = {"prompt": "alpha beta gamma delta", "max_tokens": 200, "draft_length": 3, "stop": "gamma"}
    answer = scripted.complete(**request)
    assert answer["choices"][0]["text"] == "alpha beta "
    scripted.wait_idle()
    growth = Growth(before, read(scripted))
    delivered = answer["usage"]["completion_tokens"]
    assert growth.of("vllm:generation_tokens_total") == delivered < 20
    assert growth.of("layerskip_discarded_tokens_total") >= 0
    assert growth.of("layerskip_aborted_requests_total") == 0
    assert growth.by("vllm:request_success_total", "finished_reason") == {("stop",): 1.0}


def test_stop_token_counts_as_delivered_and_leaves_no_text(scripted):
    answer = scripted.complete(prompt="!end of a text", max_tokens=50, draft_length=0)
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert answer["usage"]["completion_tokens"] == 5
    assert "endoftext" not in choice["text"]
    ignoring = scripted.complete(prompt="!end of a text", max_tokens=50, draft_length=0, ignore_eos=True)
    assert ignoring["choices"][0]["finish_reason"] == "length"
    assert ignoring["usage"]["completion_tokens"] == 50


def test_cached_tokens_are_those_of_the_first_choice_of_each_prompt(scripted):
    answer = scripted.complete(prompt=["a b", "c d"], n=3, max_tokens=2)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
