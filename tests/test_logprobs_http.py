"""Log-probabilities, ids, traces and edits of completions, as they stand in answers and in streams."""

from __future__ import annotations

import json
import math
from functools import reduce
from operator import add

import pytest
from tokenizers import Tokenizer

from config.settings import BUNDLED_CHECKPOINT
from tests.scripted_engine import scripted_logprob
from tests.server_process import Server

TOKENIZER = Tokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json"))
PROMPT = "def naïve(日本):\n    return"
IDS = TOKENIZER.encode(PROMPT).ids
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "ignore_eos": True, "draft_length": 3}
REPORTS = {"logprobs": 3, "return_token_ids": True, "return_draft_trace": True}


def choice(server: Server, **body: object):
    return server.complete(**body)["choices"][0]


def streamed(server: Server, **body: object) -> list:
    """The choices of a stream, one after another."""
    *events, done = server.stream(**body)
    assert done == "[DONE]"
    return [part for event in events for part in json.loads(event)["choices"]]


def score(server: Server, text_ids: list[int], num_prompt: int) -> list[float]:
    """Log-probabilities of everything behind the first `num_prompt` ids, computed as a prompt."""
    logprobs = choice(server, prompt=text_ids, echo=True, logprobs=0, max_tokens=0)["logprobs"]
    return logprobs["token_logprobs"][num_prompt:]


def test_logprobs_are_those_of_the_same_text_scored_as_a_prompt(server):
    got = choice(server, **GREEDY, **REPORTS)
    assert len(got["token_ids"]) == 24
    expected = score(server, IDS + got["token_ids"], len(IDS))
    assert got["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-3)


def test_logprobs_do_not_depend_on_drafts_or_on_edits(server):
    plain = choice(server, **GREEDY | {"draft_length": 0}, **REPORTS)
    drafted = choice(server, **GREEDY, **REPORTS)
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["logprobs"]["token_logprobs"] == pytest.approx(
        plain["logprobs"]["token_logprobs"], abs=1e-3
    )
    first, *_ = plain["token_ids"]
    moved = choice(server, **GREEDY, **REPORTS, logit_bias={str(first): -100})
    assert moved["token_ids"][0] != first
    assert moved["logprobs"]["token_logprobs"][0] < plain["logprobs"]["token_logprobs"][0]
    assert moved["logprobs"]["top_logprobs"][0] == pytest.approx(
        plain["logprobs"]["top_logprobs"][0]
        | {TOKENIZER.decode(moved["token_ids"][:1]): moved["logprobs"]["token_logprobs"][0]},
        abs=1e-3,
    )


def test_greedy_tokens_are_the_most_probable_ones_and_stand_among_the_top(server):
    logprobs = choice(server, **GREEDY, logprobs=3)["logprobs"]
    for name, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[name] == value == max(top.values()) <= 0
        assert 1 <= len(top) <= 3


@pytest.mark.parametrize("prompt", [PROMPT, IDS])
def test_offsets_cut_the_text_into_the_tokens(scripted, prompt):
    got = choice(scripted, prompt=prompt, max_tokens=40, echo=True, logprobs=0)
    logprobs, text = got["logprobs"], got["text"]
    assert text.startswith(PROMPT)
    bounds = [*logprobs["text_offset"], len(text)]
    assert bounds[0] == 0
    assert len(logprobs["tokens"]) == len(IDS) + 40
    for name, start, end in zip(logprobs["tokens"], bounds, bounds[1:], strict=False):
        assert start <= end
        assert name == "\ufffd" * len(name) or text[start:end] == name
    partial = [i for i, name in enumerate(logprobs["tokens"]) if "\ufffd" in name]
    assert partial, "the prompt has characters of several tokens"


def test_echo_puts_the_prompts_logprobs_first_and_its_first_is_null(scripted):
    got = choice(scripted, prompt=PROMPT, max_tokens=3, echo=True, logprobs=2)
    logprobs = got["logprobs"]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    expected = [scripted_logprob(i, 2).logprob for i in [*IDS, *IDS[:3]]]
    assert logprobs["token_logprobs"][1:] == expected[1:]
    assert logprobs["tokens"][: len(IDS)] == [TOKENIZER.decode([i]) for i in IDS]


def test_prompt_is_scored_without_a_new_token(server):
    got = server.complete(prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    assert got["usage"]["completion_tokens"] == 0
    (only,) = got["choices"]
    assert (only["text"], only["finish_reason"]) == (PROMPT, "length")
    assert len(only["logprobs"]["tokens"]) == len(IDS)
    full = server.complete(prompt=[100] * 1024, max_tokens=0, echo=True)
    assert full["usage"]["prompt_tokens"] == 1024


def test_max_tokens_zero_needs_echo(server):
    refused = server.post({"prompt": "a", "max_tokens": 0})
    assert (refused.status, refused.error["param"]) == (400, "max_tokens")


def test_prompt_logprobs_have_vllms_shape(scripted):
    got = choice(scripted, prompt=IDS, max_tokens=1, prompt_logprobs=2)
    first, *rest = got["prompt_logprobs"]
    assert first is None
    assert got["logprobs"] is None
    for token_id, entry in zip(IDS[1:], rest, strict=True):
        scored = scripted_logprob(token_id, 2)
        assert set(entry) == {str(token_id), *map(str, scored.top_ids)}
        own = entry[str(token_id)]
        assert own == {
            "logprob": scored.logprob,
            "rank": scored.rank,
            "decoded_token": TOKENIZER.decode([token_id]),
        }


def test_real_prompt_logprobs_are_the_echoed_ones(server):
    got = choice(server, prompt=PROMPT, max_tokens=1, echo=True, logprobs=1, prompt_logprobs=0)
    own = [entry[str(i)]["logprob"] for i, entry in zip(IDS[1:], got["prompt_logprobs"][1:], strict=True)]
    assert own == got["logprobs"]["token_logprobs"][1 : len(IDS)]
    assert all(len(entry) == 1 for entry in got["prompt_logprobs"][1:])


FOLDED = ("text", "token_ids", "draft_trace")


@pytest.mark.parametrize("more", [{}, {"echo": True}, {"stop": ["return"]}, {"n": 2, "echo": True}])
def test_complete_answer_is_the_fold_of_the_stream(scripted, more):
    body = {"prompt": PROMPT, "max_tokens": 30, "seed": 1, **REPORTS, **more}
    wholes = scripted.complete(**body)["choices"]
    parts = streamed(scripted, **body)
    for whole in wholes:
        mine = [part for part in parts if part["index"] == whole["index"]]
        assert len(mine) > 3
        for name in FOLDED:
            assert reduce(add, (part[name] for part in mine)) == whole[name], name
        for name, values in whole["logprobs"].items():
            assert reduce(add, (part["logprobs"][name] for part in mine)) == values, name
        assert mine[0]["prompt_token_ids"] == whole["prompt_token_ids"] == IDS
        assert [part["prompt_token_ids"] for part in mine[1:]] == [None] * (len(mine) - 1)
        assert (mine[-1]["finish_reason"], mine[-1]["stop_reason"]) == (
            whole["finish_reason"],
            whole["stop_reason"],
        )


def test_ids_logprobs_and_usage_are_cut_together_at_a_stop_string(server):
    text = choice(server, **GREEDY)["text"]
    stop = text[20:24]
    for draft_length in (0, 2, 6):
        got = server.complete(**GREEDY | {"draft_length": draft_length}, **REPORTS, stop=stop)
        (cut,) = got["choices"]
        assert cut["text"] == text.partition(stop)[0]
        num_tokens = got["usage"]["completion_tokens"]
        assert num_tokens == len(cut["token_ids"]) == len(cut["logprobs"]["tokens"]) < 24
        assert TOKENIZER.decode(IDS + cut["token_ids"]).startswith(PROMPT + cut["text"] + stop)
        assert stop not in TOKENIZER.decode(cut["token_ids"][:-1])


def test_what_follows_a_stop_string_within_its_run_is_not_reported(scripted):
    """Stop strings at every place of the text, so that some end inside a run of kept drafts."""
    text = choice(scripted, prompt=PROMPT, max_tokens=len(IDS))["text"]
    num_inside = 0
    for start in range(len(text) - 2):
        stop = text[start : start + 2]
        got = scripted.complete(prompt=PROMPT, max_tokens=60, **REPORTS, stop=stop)
        (cut,) = got["choices"]
        num_tokens = got["usage"]["completion_tokens"]
        assert num_tokens == len(cut["token_ids"]) == len(cut["logprobs"]["text_offset"])
        assert {len(values) for values in cut["logprobs"].values()} == {num_tokens}
        assert stop in TOKENIZER.decode(cut["token_ids"])
        assert stop not in TOKENIZER.decode(cut["token_ids"][:-1])
        num_inside += num_tokens < sum(cycle["kept"] + 1 for cycle in cut["draft_trace"])
    assert num_inside > 3


def test_trace_agrees_with_the_statistics_and_leaves_the_text_alone(server):
    plain = choice(server, **GREEDY)
    got = server.complete(**GREEDY | {"draft_length": 5}, exit_layer=1, return_draft_trace=True)
    (traced,) = got["choices"]
    assert traced["text"] == plain["text"]
    statistics = got["metrics"]["speculative_decoding"]
    trace = traced["draft_trace"]
    assert sum(len(cycle["drafted_ids"]) for cycle in trace) == statistics["num_draft_tokens"] > 0
    assert sum(cycle["kept"] for cycle in trace) == statistics["num_accepted_draft_tokens"]
    assert statistics["drafts_by_drafter"] == {"early_exit": statistics["num_draft_tokens"]}
    assert any(cycle["kept"] < len(cycle["drafted_ids"]) for cycle in trace)
    ids = choice(server, **GREEDY, return_token_ids=True)["token_ids"]
    position = 0
    for cycle in trace:
        kept = cycle["drafted_ids"][: cycle["kept"]]
        assert ids[position : position + len(kept)] == kept
        assert cycle["drafted_tokens"] == [TOKENIZER.decode([i]) for i in cycle["drafted_ids"]]
        assert cycle["exit_layer"] == statistics["exit_layer"]
        position += len(kept) + 1
    assert position == len(ids)


def test_drafter_of_a_request_is_told_apart(server):
    texts = set()
    for drafter in ("early_exit", "lookup", "none"):
        got = server.complete(prompt="a = 1\n" * 6, temperature=0, max_tokens=24, drafter=drafter)
        texts.add(got["choices"][0]["text"])
        by_drafter = got["metrics"]["speculative_decoding"]["drafts_by_drafter"]
        assert (by_drafter["early_exit"] > 0) == (drafter == "early_exit")
        assert (by_drafter.get("lookup", 0) > 0) == (drafter == "lookup")
    assert len(texts) == 1


def test_tokens_can_be_named_by_their_ids(scripted):
    got = choice(scripted, prompt=IDS, max_tokens=4, logprobs=1, echo=True, return_tokens_as_token_ids=True)
    assert got["logprobs"]["tokens"] == [f"token_id:{i}" for i in [*IDS, *IDS[:4]]]
    assert all(name.startswith("token_id:") for top in got["logprobs"]["top_logprobs"][1:] for name in top)


def test_least_logprob_is_a_number(server):
    """JSON has no infinity."""
    got = server.post({"prompt": "a", "max_tokens": 2, "logprobs": 20, "logit_bias": {"5": 100}})
    values = json.loads(got.body, parse_constant=pytest.fail)["choices"][0]["logprobs"]["token_logprobs"]
    assert all(math.isfinite(value) for value in values)
