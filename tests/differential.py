"""One request of every kind, and what must be the same of its answers.

Knows bodies, answers and streams; the promises are in `test_differential`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tests.naive_answers import END, Body, Tiny, naive_requests
from tests.server_process import Server

# Both a text that repeats itself, for lookups, and one that does not.
PROMPT = "to be, or not to be, or not to be"
OTHER = [40, 11, 62, 5]
BASE: Body = {
    "prompt": PROMPT,
    "max_tokens": 20,
    "temperature": 0.9,
    "seed": 11,
    "ignore_eos": True,
    "logprobs": 2,
    "return_token_ids": True,
}
GREEDY: Body = BASE | {"temperature": 0}
# What a request may say of drafts; the first is plain decoding, which all others must equal.
PLAIN: Body = {"draft_length": 0}
DRAFTING: dict[str, Body] = {
    "shallow-1": {"exit_layer": 1, "draft_length": 1},
    "shallow-4": {"exit_layer": 1, "draft_length": 4},
    "shallow-8": {"exit_layer": 1, "draft_length": 8},
    "deep-1": {"exit_layer": 4, "draft_length": 1},
    "deep-4": {"exit_layer": 4, "draft_length": 4},
    "deep-8": {"exit_layer": 4, "draft_length": 8},
    "lookup-4": {"drafter": "lookup", "draft_length": 4},
    "hybrid-1": {"drafter": "hybrid", "exit_layer": 4, "draft_length": 1},
    "hybrid-8": {"drafter": "hybrid", "exit_layer": 2, "draft_length": 8},
}


@dataclass
class Case:
    """A request; `alike` is the one that it would equal if its parameters did nothing."""

    body: Body
    alike: Body | None = None
    streams: bool = True
    path: str = "/v1/completions"


def cases(tiny: Tiny, base: Body = BASE) -> dict[str, Case]:
    """One for each parameter and then some, all of them made to bite by what `base` says without them."""
    ids = tiny.oracle.decode(next(naive_requests(tiny, base)))
    text, few = tiny.text(ids), sorted({*ids[::2], 20, 21, 22})
    bitten: dict[str, Body] = {
        "temperature": {"temperature": 1.4},
        "greedy": {"temperature": 0},
        "seed": {"seed": -(2**63)},
        "top_p": {"top_p": 0.3},
        "top_k": {"top_k": 2},
        "min_p": {"min_p": 0.5},
        "all filters": {"top_p": 0.8, "top_k": 6, "min_p": 0.02, "temperature": 1.2},
        "presence_penalty": {"presence_penalty": 2},
        "negative presence_penalty": {"presence_penalty": -2},
        "frequency_penalty": {"frequency_penalty": 2},
        "repetition_penalty": {"repetition_penalty": 6},
        "logit_bias": {"logit_bias": {str(ids[0]): -100, "30": 3}},
        "bad_words": {"bad_words": [text[1], text[4:6]]},
        "allowed_token_ids": {"allowed_token_ids": few},
        "min_tokens": {"min_tokens": 12, "stop_token_ids": ids[2:4]},
        "stop": {"stop": text[7:9]},
        "several stops": {"stop": ["never", text[9:12], text[8:10]]},
        "include_stop_str_in_output": {"stop": text[7:9], "include_stop_str_in_output": True},
        "stop_token_ids": {"stop_token_ids": [ids[9]]},
        "kept stop token": {"stop_token_ids": [ids[9]], "include_stop_str_in_output": True},
        "eos": {"ignore_eos": False, "logit_bias": {str(END): 4}},
        "ignore_eos": {"logit_bias": {str(END): 4}},
        "skip_special_tokens": {"skip_special_tokens": False, "logit_bias": {str(END): 4}},
        "n": {"n": 3},
        "best_of": {"n": 2, "best_of": 2},
        "prompts": {"prompt": [PROMPT, "a", PROMPT[:9]], "max_tokens": 7},
        "prompts of ids": {"prompt": [OTHER, OTHER * 7], "n": 2, "max_tokens": 9},
        "echo": {"echo": True},
        "logprobs": {"logprobs": 5},
        "no logprobs": {"logprobs": None},
        "max_tokens": {"max_tokens": 1},
        "scored prompt": {"max_tokens": 0, "echo": True},
        "truncate_prompt_tokens": {"truncate_prompt_tokens": 5},
        "return_tokens_as_token_ids": {"return_tokens_as_token_ids": True},
        "everything": {
            **{"temperature": 1.1, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "n": 2, "echo": True},
            **{"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
            **{"logit_bias": {"9": 2, "33": -3}, "bad_words": ["e"], "min_tokens": 3, "stop": ["x", "q"]},
        },
    }
    found = {name: Case(base | change, base) for name, change in bitten.items()}
    early, greedy = base | {"stop": [text[7]]}, base | {"temperature": 0}
    found["base"] = Case(base)
    found["stop with min_tokens"] = Case(early | {"min_tokens": 9}, early)
    found["greedy penalties"] = Case(greedy | {"frequency_penalty": 1, "repetition_penalty": 1.2}, greedy)
    found["prompt_logprobs"] = Case(base | {"prompt_logprobs": 3}, streams=False)
    return found | chats(base)


def chats(base: Body) -> dict[str, Case]:
    talk = {"messages": [{"role": "user", "content": base["prompt"]}], "logprobs": True, "top_logprobs": 2}
    chat = {name: value for name, value in base.items() if name != "prompt"} | talk
    changes: dict[str, Body] = {
        "chat": {},
        "greedy chat": {"temperature": 0},
        "chat with max_completion_tokens": {"max_completion_tokens": 9, "n": 2},
    }
    return {name: Case(chat | change, path="/v1/chat/completions") for name, change in changes.items()}


@dataclass
class Facts:
    """What must be the same: of each choice and of the whole. Log-probabilities may differ by 1e-9."""

    choices: list[tuple[object, ...]]
    logprobs: list[object]
    usage: tuple[int, int, int]

    def check_equal(self, other: Facts, what: str) -> None:
        assert self.choices == other.choices, what
        assert self.usage == other.usage, what
        check_near(self.logprobs, other.logprobs, what)


def check_near(left: object, right: object, what: str) -> None:
    """The same nested JSON, numbers within 1e-9."""
    if isinstance(left, float):
        assert right == pytest.approx(left, abs=1e-9, rel=0), what
    elif isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys(), what
        for name in left:
            check_near(left[name], right[name], what)
    elif isinstance(left, list):
        assert isinstance(right, list)
        for one, another in zip(left, right, strict=True):
            check_near(one, another, what)
    else:
        assert left == right, what


@dataclass
class Outcome:
    """An answer's facts, and how many drafts were made and kept for it."""

    facts: Facts
    drafted: int
    kept: int


def ask(server: Server, case: Case, drafts: Body, *, stream: bool) -> Outcome:
    """Send a case and read the answer."""
    if not stream:
        answer = server.post(case.body | drafts, path=case.path)
        assert answer.status == 200, answer.body
        return read(answer.json)
    asked = case.body | drafts | {"stream": True, "stream_options": {"include_usage": True}}
    answer = server.post(asked, path=case.path)
    assert answer.status == 200, answer.body
    events = [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return read(folded([json.loads(event) for event in events]))


def folded(events: list[dict]) -> dict:
    """A stream as the answer it would have been. Nothing of a choice may come after its end."""
    *parts, last = events
    choices: dict[int, dict] = {}
    for part in parts:
        for each in part["choices"]:
            choice = choices.setdefault(each["index"], {"finish_reason": None})
            assert choice["finish_reason"] is None, "something came after the end"
            fold(choice, each)
    return {
        "choices": [choices[index] for index in sorted(choices)],
        "usage": last["usage"],
        "metrics": last["metrics"],
    }


def fold(choice: dict, each: dict) -> None:
    choice |= {name: each.get(name) for name in ("index", "finish_reason", "stop_reason")}
    text = each["text"] if "text" in each else each["delta"].get("content", "")
    choice["text"] = choice.get("text", "") + text
    choice["token_ids"] = choice.get("token_ids", []) + each.get("token_ids", [])
    lists = choice.setdefault("logprobs", {})
    for name, values in (each["logprobs"] or {}).items():
        lists[name] = lists.get(name, []) + values


def read(answer: dict) -> Outcome:
    usage, drafts = answer["usage"], answer["metrics"]["speculative_decoding"]
    return Outcome(
        Facts(
            choices=[
                (
                    choice["index"],
                    choice["message"]["content"] if "message" in choice else choice["text"],
                    choice["token_ids"],
                    choice["finish_reason"],
                    choice["stop_reason"],
                )
                for choice in answer["choices"]
            ],
            logprobs=[
                [choice["logprobs"] or {}, choice.get("prompt_logprobs")] for choice in answer["choices"]
            ],
            usage=tuple(usage[f"{kind}_tokens"] for kind in ("prompt", "completion", "total")),
        ),
        drafted=drafts["num_draft_tokens"],
        kept=drafts["num_accepted_draft_tokens"],
    )
