"""Whoever kills whatever worker: killers fail alone, and nobody else fails."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from decoding.messages import Decoded, Drafter, FinishReason, Generate, Load, SamplingParams, StepReport
from server.roster import Roster
from server.token_stream import TokenStream

MAX_NUM_SEQS = 3
LENGTH = 8


class DeadError(Exception):
    """The worker is no more, because of this sequence."""

    def __init__(self, sequence_id: int) -> None:
        self.sequence_id = sequence_id


@dataclass
class Worker:
    """Lowest priority first; `fatal` says at how many tokens a sequence kills, −1 when it is taken.

    Who runs stays, but now and then the last has to wait again. Of priorities it tells once it has seen one.
    """

    fatal: dict[int, int]
    rng: random.Random
    knows_priorities: bool = False
    waiting: list[Generate] = field(default_factory=list)
    running: dict[int, Generate] = field(default_factory=dict)
    said: Counter[int] = field(default_factory=Counter)
    num_taken: int = 0

    def take(self, request: Generate) -> None:
        if self.fatal.get(request.sequence_id) == -1:
            raise DeadError(request.sequence_id)
        self.waiting.append(request)
        self.num_taken += 1
        self.knows_priorities |= request.priority != 0

    def abort(self, sequence_id: int) -> None:
        self.running.pop(sequence_id, None)
        self.waiting = [request for request in self.waiting if request.sequence_id != sequence_id]

    def step(self) -> list[Decoded]:
        preempts = len(self.running) > 1 and self.rng.random() < 0.1
        if preempts:
            self.preempt()
        # Sorting is stable, and a preempted one stands before those that came after it.
        self.waiting.sort(key=lambda request: request.priority)
        while self.waiting and len(self.running) < MAX_NUM_SEQS and not preempts:
            request = self.waiting.pop(0)
            self.running[request.sequence_id] = request
            self.said[request.sequence_id] = max(self.said[request.sequence_id], len(request.resumed_ids))
        for sequence_id in self.running:
            if self.fatal.get(sequence_id) == self.said[sequence_id]:
                raise DeadError(sequence_id)
        events = []
        for sequence_id in list(self.running):
            count = self.said[sequence_id]
            self.said[sequence_id] += 1
            ends = count + 1 == LENGTH
            reason = FinishReason.LENGTH if ends else None
            events.append(Decoded(sequence_id, [count], 0, 0, 1, Drafter.NONE, reason))
            if ends:
                del self.running[sequence_id]
        return events

    def preempt(self) -> None:
        last = max(self.running.values(), key=lambda request: (request.priority, request.sequence_id))
        del self.running[last.sequence_id]
        self.waiting.insert(0, last)

    def report(self, decoded: list[Decoded]) -> StepReport:
        load = Load(num_running=len(self.running), num_waiting=len(self.waiting))
        running_ids = list(self.running) if self.knows_priorities else None
        return StepReport(decoded, load, num_taken=self.num_taken, running_ids=running_ids)


class World:
    """A roster, its worker, and commands and reports that are late."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.has_priorities = bool(seed % 2)
        self.roster = Roster()
        self.fatal: dict[int, int] = {}
        self.worker = Worker(self.fatal, self.rng)
        self.commands: list[Generate | int] = []
        self.requests: dict[TokenStream, range] = {}
        self.aborted: set[TokenStream] = set()
        self.failed: dict[TokenStream, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.num_deaths = 0
        self.kills: Counter[int] = Counter()
        self.next_id = 0

    def come(self) -> None:
        ids = range(self.next_id, self.next_id + self.rng.choice([1, 1, 1, 2, 5]))
        self.next_id = ids.stop
        stream = TokenStream(ids, abort=lambda _: None)
        self.requests[stream] = ids
        self.tokens |= {sequence_id: [] for sequence_id in ids}
        if self.rng.random() < 0.2:
            self.fatal[self.rng.choice(ids)] = self.rng.choice([-1, 0, 0, 1, LENGTH - 1])
        sampling = SamplingParams()
        priority = self.rng.choice([-1, 0, 0, 3]) if self.has_priorities else 0
        self.roster.add(stream, [Generate(i, [1], LENGTH, sampling, 0, [], priority=priority) for i in ids])

    def give(self) -> None:
        for request in self.roster.give():
            self.commands += request.to_send()

    def abort(self) -> None:
        stream = self.rng.choice(list(self.requests))
        if stream not in self.failed:
            self.aborted.add(stream)
            self.commands += self.roster.remove(self.requests[stream])

    def turn(self) -> None:
        """The worker takes some commands and steps."""
        try:
            for _ in range(self.rng.randint(0, len(self.commands))):
                command = self.commands.pop(0)
                if isinstance(command, int):
                    self.worker.abort(command)
                else:
                    self.worker.take(command)
            decoded = self.worker.step()
        except DeadError as death:
            self.kills[death.sequence_id] += 1
            self.die()
            return
        for event in decoded:
            if self.roster.note(event) is not None:
                self.tokens[event.sequence_id] += event.token_ids
        self.roster.heard(self.worker.report(decoded))

    def die(self) -> None:
        self.num_deaths += 1
        for stream in self.roster.crashed(max_num_seqs=MAX_NUM_SEQS):
            self.failed[stream] = self.num_deaths
        self.worker, self.commands = Worker(self.fatal, self.rng), []

    def is_killer(self, stream: TokenStream) -> bool:
        return any(sequence_id in self.fatal for sequence_id in self.requests[stream])


def lived(seed: int, *, num_requests: int, aborts: bool) -> World:
    world = World(seed)
    for _ in range(10_000):
        if len(world.requests) < num_requests and world.rng.random() < 0.5:
            world.come()
        if aborts and world.requests and world.rng.random() < 0.1:
            world.abort()
        world.give()
        world.turn()
        if len(world.requests) == num_requests and not len(world.roster):
            return world
    raise AssertionError(f"seed {seed}: {world.roster.num_requests} requests never ended")


@pytest.mark.parametrize("aborts", [False, True])
def test_killers_fail_and_all_others_finish(aborts: bool) -> None:
    num_failed = num_deaths = 0
    for seed in range(300):
        world = lived(seed, num_requests=30, aborts=aborts)
        num_failed += len(world.failed)
        num_deaths += world.num_deaths
        # Accused at the first, alone at the second.
        assert max(world.kills.values(), default=0) <= 2, seed
        for stream, ids in world.requests.items():
            got = [world.tokens[sequence_id] for sequence_id in ids]
            if stream in world.failed:
                assert world.is_killer(stream), seed
            elif stream in world.aborted:
                assert all(tokens == list(range(len(tokens))) for tokens in got)
            else:
                assert not world.is_killer(stream)
                assert got == [list(range(LENGTH))] * len(ids), seed
    assert num_failed > 1000
    assert num_deaths > num_failed


def test_a_worker_killed_from_outside_harms_nobody() -> None:
    for seed in range(100):
        world = World(seed)
        for _ in range(20):
            world.come()
        world.fatal.clear()
        for _ in range(world.rng.randint(0, 10)):
            world.give()
            world.turn()
        world.die()
        while len(world.roster):
            world.give()
            world.turn()
        assert not world.failed
        assert set(map(tuple, world.tokens.values())) == {tuple(range(LENGTH))}
