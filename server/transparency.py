"""Whether drafts change an answer: the same requests with and without, mixed, compared.

Knows answers and how they may differ; knows nothing of flags or wording.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, Self

from server.api_client import Answer, AnswerChoice, ApiClient, Body, ClientError, ServerInfo
from server.random_requests import RandomRequests

_WITHOUT_DRAFTS: Final = {"draft_length": 0}


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests, and the order in which they and their twins without drafts are sent.

    `order` holds each index below `len(bodies)` once for the request and, plus that length, once for its twin.
    """

    bodies: Sequence[Body]
    order: Sequence[int]

    @classmethod
    def draw(cls, bounds: ServerInfo, *, num_requests: int, seed: int, max_tokens: int) -> Self:
        """Random requests in a random order."""
        requests = RandomRequests(bounds, seed=seed, max_tokens=max_tokens)
        order = random.Random(seed).sample(range(2 * num_requests), k=2 * num_requests)
        return cls([requests.draw() for _ in range(num_requests)], order)


@dataclass(frozen=True, slots=True)
class Difference:
    """A request whose answer drafts have changed: its first choice that differs, from `position` on."""

    body: Body
    choice: int
    speculative: str
    plain: str
    speculative_end: str
    plain_end: str

    @property
    def plain_body(self) -> Body:
        """The same request without drafts."""
        return {**self.body, **_WITHOUT_DRAFTS}

    @property
    def position(self) -> int:
        """Characters that are the same."""
        pairs = zip(self.speculative, self.plain, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def size(self) -> int:
        """How much there is to look at, in characters."""
        return len(str(self.body)) + self.position


@dataclass(frozen=True, slots=True)
class Findings:
    """What comparing has shown. `num_unwanted` drafts were made where none were asked for."""

    num_requests: int
    num_drafted: int
    num_refused: int
    num_unwanted: int
    differences: Sequence[Difference]


def compare(client: ApiClient, plan: Plan, *, concurrency: int) -> Findings:
    """Send everything, `concurrency` at once, and compare. Raises ClientError."""
    bodies = [*plan.bodies, *({**body, **_WITHOUT_DRAFTS} for body in plan.bodies)]
    executor = ThreadPoolExecutor(max_workers=concurrency)
    try:
        futures = {index: executor.submit(client.complete, bodies[index]) for index in plan.order}
        answers = [futures[index].result() for index in range(len(bodies))]
    finally:
        executor.shutdown(cancel_futures=True)
    speculative, plain = answers[: len(plan.bodies)], answers[len(plan.bodies) :]
    found = map(_difference, plan.bodies, speculative, plain)
    return Findings(
        num_requests=len(plan.bodies),
        num_drafted=sum(answer.num_drafted for answer in speculative),
        num_refused=sum(answer.num_refused for answer in speculative),
        num_unwanted=sum(answer.num_drafted for answer in plain),
        differences=[difference for difference in found if difference is not None],
    )


def differs_alone(client: ApiClient, body: Body) -> bool:
    """Whether a request still differs from its twin when nothing else runs. Raises ClientError."""
    return _difference(body, client.complete(body), client.complete({**body, **_WITHOUT_DRAFTS})) is not None


def _difference(body: Body, speculative: Answer, plain: Answer) -> Difference | None:
    """The first choice that differs, in its text or its end."""
    if len(speculative.choices) != len(plain.choices):
        raise ClientError("the same request was answered with a different number of choices")
    for ours, theirs in zip(_in_order(speculative), _in_order(plain), strict=True):
        if ours != theirs:
            return Difference(
                body=body,
                choice=ours.index,
                speculative=ours.text,
                plain=theirs.text,
                speculative_end=ours.finish_reason,
                plain_end=theirs.finish_reason,
            )
    return None


def _in_order(answer: Answer) -> list[AnswerChoice]:
    return sorted(answer.choices, key=lambda choice: choice.index)
