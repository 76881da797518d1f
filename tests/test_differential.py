"""Over HTTP in float64 no draft changes an answer: not its text, ids, log-probabilities, ending or usage."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import pytest

from server.chat_types import ChatRequest
from server.openai_types import CompletionRequest
from tests.differential import (
    BASE,
    DRAFTING,
    GREEDY,
    PLAIN,
    Case,
    Outcome,
    ask,
    cases,
)
from tests.naive_answers import END, Body, Tiny, naive_cut, naive_requests
from tests.server_process import REAL, Server, running, wait_until

# Parameters that say how to answer and not what, and those that other tests vary.
NOT_VARIED = {"model", "user", "request_id", "add_special_tokens", "return_draft_trace", "priority"}
NOT_VARIED |= {"add_generation_prompt", "continue_final_message", "cache_salt"}
BESIDE = {"stream", "stream_options", "exit_layer", "draft_length", "drafter"}
NUM_CLIENTS = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exact(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real server with the tiny checkpoint in float64."""
    with running(REAL, tmp_path_factory.mktemp("exact"), *tiny.flags) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def known(tiny: Tiny) -> dict[str, Case]:
    return cases(tiny)


@pytest.fixture(scope="module")
def plain(exact: Server, known: dict[str, Case]) -> dict[str, Outcome]:
    """Every case without drafts, alone and at once."""
    return {name: ask(exact, case, PLAIN, stream=False) for name, case in known.items()}


def check_drafts(outcomes: list[Outcome]) -> None:
    """Drafts were made, some kept and some refused."""
    drafted, kept = sum(o.drafted for o in outcomes), sum(o.kept for o in outcomes)
    assert 0 < kept < drafted


def test_no_parameter_is_left_out(known):
    varied = {name for case in known.values() for name in case.body}
    fields = CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys()
    assert fields - varied == NOT_VARIED | BESIDE


def test_every_parameter_bites(known, plain, exact):
    for name, case in known.items():
        assert plain[name].drafted == 0, name
        if case.alike is not None:
            without = ask(exact, Case(case.alike), PLAIN, stream=False).facts
            changed = plain[name].facts
            assert (changed.choices, changed.logprobs) != (without.choices, without.logprobs), name


def test_plain_answers_are_those_of_naive_decoding(known, plain, tiny):
    for name, case in known.items():
        if case.path == "/v1/completions":
            check_naive(tiny, case.body, plain[name], name)


def check_naive(tiny: Tiny, body: Body, outcome: Outcome, name: str) -> None:
    for number, request in enumerate(naive_requests(tiny, body)):
        _, text, got, finish_reason, _ = outcome.facts.choices[number]
        decoded, logprobs = tiny.oracle.decode_with_logprobs(request, guess=got)
        ids, ending = naive_cut(tiny, body, decoded)
        assert (got, finish_reason) == (ids, ending), name
        assert not any(stop in text for stop in kept_out(body)), name
        own = outcome.facts.logprobs[number][0].get("token_logprobs")
        if own is not None:
            expected = [each[token_id] for each, token_id in zip(logprobs, ids, strict=False)]
            assert own[len(own) - len(ids) :] == pytest.approx(expected, abs=1e-9, rel=0), name


def kept_out(body: Body) -> list[str]:
    """Stop strings that may stand nowhere in an answer."""
    may_stand = body.get("include_stop_str_in_output") or body.get("min_tokens") or body.get("echo")
    stop = body.get("stop", [])
    return [] if may_stand else [stop] if isinstance(stop, str) else stop


def check_alone(
    server: Server, known: dict[str, Case], plain: dict[str, Outcome], drafts: Body, stream: bool
):
    outcomes = []
    for name, case in known.items():
        if case.streams or not stream:
            outcomes.append(ask(server, case, drafts, stream=stream))
            plain[name].facts.check_equal(outcomes[-1].facts, name)
    check_drafts(outcomes)


ALONE = [("shallow-4", False), ("deep-8", False), ("deep-4", True), ("lookup-4", False), ("hybrid-8", True)]


@pytest.mark.parametrize(("label", "stream"), ALONE)
def test_alone_every_request_is_answered_as_without_drafts(known, plain, exact, label, stream):
    check_alone(exact, known, plain, DRAFTING[label], stream)


@pytest.mark.exhaustive
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("label", DRAFTING)
def test_alone_by_every_drafter_every_request_is_answered_as_without_drafts(
    known, plain, exact, label, stream
):
    check_alone(exact, known, plain, DRAFTING[label], stream)


def check_mixed(
    server: Server, known: dict[str, Case], plain: dict[str, Outcome], *, seed: int, num_ways: int
) -> None:
    """Every case drafted in so many ways, half of them streams, all at once by many clients."""
    rng = random.Random(seed)
    asked = [
        (name, label, case.streams and rng.random() < 0.5)
        for name, case in known.items()
        for label in rng.sample([*DRAFTING, "plain"], num_ways)
    ]
    rng.shuffle(asked)
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        futures = [
            clients.submit(ask, server, known[name], DRAFTING.get(label, PLAIN), stream=stream)
            for name, label, stream in asked
        ]
        wait_until(lambda: server.metric("vllm:num_requests_running") > NUM_CLIENTS / 4)
        outcomes = [future.result() for future in futures]
    for (name, label, stream), outcome in zip(asked, outcomes, strict=True):
        plain[name].facts.check_equal(outcome.facts, f"{name}, {label}, stream {stream}")
    check_drafts(outcomes)
    server.wait_idle()
    assert server.metric("layerskip_kv_blocks", state="used") == 0


def test_in_a_mixed_batch_every_request_is_answered_as_alone_and_without_drafts(known, plain, exact):
    check_mixed(exact, known, plain, seed=0, num_ways=5)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(1, 7))
def test_so_it_is_in_many_mixed_batches_of_other_texts(tiny, exact, seed):
    """Other prompts, seeds and lengths, so that runs fall elsewhere."""
    rng = random.Random(seed)
    prompt = "".join(rng.choices("abc ,.", k=rng.randint(1, 60)))
    base = BASE | {"prompt": prompt, "seed": seed, "max_tokens": rng.randint(14, 60)}
    known = cases(tiny, base)
    plain = {name: ask(exact, case, PLAIN, stream=False) for name, case in known.items()}
    check_mixed(exact, known, plain, seed=seed, num_ways=len(DRAFTING) + 1)


# With and without drafts, as a stream and whole; the first is what the others must equal.
WAYS = (("plain", False), ("deep-4", False), ("deep-4", True), ("hybrid-8", True))


@dataclass
class Run:
    """A long greedy answer that traces its drafts: ids, their texts, and where cycles begin and what they kept."""

    body: Body
    ids: list[int]
    texts: list[str]
    starts: list[int]
    kept: list[int]

    @classmethod
    def of(cls, server: Server, tiny: Tiny, drafts: Body, **changes: object) -> Run:
        body = GREEDY | {"max_tokens": 40} | changes
        (choice,) = server.complete(**body, **drafts, return_draft_trace=True)["choices"]
        kept = [cycle["kept"] for cycle in choice["draft_trace"]]
        starts = list(accumulate((count + 1 for count in kept), initial=0))
        assert starts.pop() >= len(choice["token_ids"])
        texts = [tiny.text([token_id]) for token_id in choice["token_ids"]]
        return cls(body, choice["token_ids"], texts, starts, kept)

    def places_inside(self) -> list[int]:
        """Where a kept draft stands that another one follows, and that stands nowhere before."""
        inside = (
            start + i for start, kept in zip(self.starts, self.kept, strict=True) for i in range(kept - 1)
        )
        return [place for place in inside if self.ids.index(self.ids[place]) == place]


@pytest.fixture(scope="module")
def run(exact: Server, tiny: Tiny) -> Run:
    return Run.of(exact, tiny, DRAFTING["deep-4"], frequency_penalty=0.3)


def check_ending(server: Server, tiny: Tiny, body: Body, what: str) -> list[Outcome]:
    """The answer is cut where naive decoding is, whatever drafts and however it is sent."""
    outcomes = [ask(server, Case(body), DRAFTING.get(label, PLAIN), stream=stream) for label, stream in WAYS]
    check_naive(tiny, body, outcomes[0], what)
    for outcome in outcomes[1:]:
        outcomes[0].facts.check_equal(outcome.facts, what)
    (choice,) = outcomes[0].facts.choices
    assert outcomes[0].facts.usage[1] == len(choice[2])
    return outcomes


def test_stop_string_over_two_cycles_is_cut_and_nothing_behind_it_is_told(exact, tiny, run):
    assert len(run.starts) > 5
    for start in run.starts[1:]:
        stop = run.texts[start - 1][-1:] + run.texts[start][:1]
        outcomes = check_ending(exact, tiny, run.body | {"stop": stop}, repr(stop))
        (_, text, _, *ending) = outcomes[0].facts.choices[0]
        assert stop not in text
        assert ending == ["stop", stop]
    check_drafts(outcomes)


def test_stop_token_among_kept_drafts_ends_the_answer(exact, tiny, run):
    places = run.places_inside()
    assert places
    for place in places:
        stop = run.ids[place]
        outcomes = check_ending(exact, tiny, run.body | {"stop_token_ids": [stop]}, str(stop))
        assert outcomes[0].facts.choices[0][2:] == (run.ids[: place + 1], "stop", stop)
        traced = run.body | {"stop_token_ids": [stop], "return_draft_trace": True}
        (choice,) = exact.complete(**traced, **DRAFTING["deep-4"])["choices"]
        assert stop in choice["draft_trace"][-1]["drafted_ids"][:-1], "it was drafted, and more behind it"


def test_length_that_ends_inside_a_kept_run_cuts_it(exact, tiny, run):
    assert run.places_inside()
    for length in range(1, len(run.ids) + 1):
        (outcome,) = [
            ask(exact, Case(run.body | {"max_tokens": length}), DRAFTING["deep-4"], stream=length % 2 == 0)
        ]
        assert outcome.facts.choices[0][2:] == (run.ids[:length], "length", None)
        assert outcome.facts.usage[1] == length


def test_end_of_sequence_token_that_was_drafted_ends_the_answer(exact, tiny):
    num_drafted = 0
    for bias in range(2, 9):
        body = GREEDY | {"max_tokens": 40, "logit_bias": {str(END): bias}}
        beyond = Run.of(exact, tiny, DRAFTING["deep-4"], **body)
        if END not in beyond.ids:
            continue
        num_drafted += beyond.ids.index(END) in beyond.places_inside()
        outcomes = check_ending(exact, tiny, body | {"ignore_eos": False}, f"bias {bias}")
        _, text, ids, *ending = outcomes[0].facts.choices[0]
        assert ids == beyond.ids[: beyond.ids.index(END) + 1]
        assert (ending, "<|end|>" in text) == (["stop", None], False)
    assert num_drafted > 0


def test_stop_on_the_last_token_allowed_is_a_stop_and_not_a_length(exact, tiny, run):
    for place in {*run.places_inside(), *run.starts[2::3]}:
        if run.ids.index(run.ids[place]) < place or not run.texts[place]:
            continue
        last = run.body | {"max_tokens": place + 1}
        string = "".join(run.texts[max(0, place - 1) : place + 1])
        for stop in ({"stop": string}, {"stop_token_ids": [run.ids[place]]}):
            (choice,) = check_ending(exact, tiny, last | stop, str(stop))[0].facts.choices
            assert (choice[2], choice[3]) == (run.ids[: place + 1], "stop")


def test_computed_prompts_are_found_by_those_of_the_same_salt_alone(exact):
    # The server is shared: no other test's prompt begins like this one.
    prompt = "whether it is nobler in the mind to suffer " * 2

    def num_cached(**salt: str) -> int:
        usage = exact.complete(prompt=prompt, max_tokens=2, temperature=0, **salt)["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert num_cached() == 0 < num_cached()
    assert num_cached(cache_salt="a") == 0 < num_cached(cache_salt="a")
    assert num_cached(cache_salt="b") == 0
