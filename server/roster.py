"""The open requests of one worker, oldest first: what came of each, who has it, and who is suspected of what.

Knows sequences, and who was there when a worker died; knows neither processes nor time.

A request that was in a step in which the worker died is a suspect. Suspects are resumed one by one, each alone
until it has ended, and the others after them. So a request that kills every worker is alone at the second death
and fails alone; nobody else is ever there twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from decoding.messages import Decoded, Generate, StepReport
from server.token_stream import TokenStream


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request with its sequences that have not ended, and the ids that came of each.

    `place` is how many sequences the worker had been given once it had these; None while they wait here. They
    belong together: one of them under suspicion is all of them.
    """

    stream: TokenStream
    sequences: dict[int, Generate]
    reported_ids: dict[int, list[int]]
    place: int | None = None
    is_suspect: bool = False
    is_resumed: bool = False

    @property
    def priority(self) -> int:
        """The same for all its sequences."""
        return next((sequence.priority for sequence in self.sequences.values()), 0)

    def to_send(self) -> list[Generate]:
        """Its sequences, each to go on behind what came of it."""
        return [
            sequence.resumed(self.reported_ids[sequence_id])
            for sequence_id, sequence in self.sequences.items()
        ]


class Roster:
    """Hands out requests when it is their turn, and notes what becomes of them."""

    def __init__(self) -> None:
        self._requests: dict[int, OpenRequest] = {}
        self._suspects: deque[OpenRequest] = deque()
        self._others: deque[OpenRequest] = deque()
        self._alone: OpenRequest | None = None
        self._num_given = 0
        self._num_taken = 0
        self._num_running = 0
        self._is_worker_empty = True
        self._running_ids: frozenset[int] | None = None

    def __len__(self) -> int:
        """Sequences that are open."""
        return len(self._requests)

    @property
    def num_requests(self) -> int:
        """Requests that are open."""
        return len(set(self._requests.values()))

    def add(self, stream: TokenStream, sequences: Sequence[Generate]) -> None:
        """A new request, last in line."""
        request = OpenRequest(
            stream,
            {sequence.sequence_id: sequence for sequence in sequences},
            {sequence.sequence_id: [] for sequence in sequences},
        )
        self._requests |= dict.fromkeys(request.sequences, request)
        self._others.append(request)

    @property
    def is_held_up(self) -> bool:
        """Whether suspects run one by one, and the others wait for them."""
        return self._alone is not None or bool(self._suspects)

    def give(self) -> Sequence[OpenRequest]:
        """Requests whose turn it is; the worker gets them now.

        While there are suspects it gets the next once nothing of the one before is left in it.
        """
        if self._alone is not None and not self._is_worker_empty:
            return ()
        self._alone = None
        while self._suspects and self._alone is None:
            first = self._suspects.popleft()
            self._alone = first if first.sequences else None
        given = [self._alone] if self._alone else [request for request in self._others if request.sequences]
        if self._alone is None:
            self._others.clear()
        for request in given:
            self._num_given += len(request.sequences)
            request.place = self._num_given
            self._is_worker_empty = False
        return given

    def heard(self, report: StepReport) -> None:
        """The worker has taken so many sequences by now, and holds what the report says."""
        load = report.load
        self._num_taken = report.num_taken
        self._num_running = load.num_running
        self._running_ids = None if report.running_ids is None else frozenset(report.running_ids)
        self._is_worker_empty = self._num_taken == self._num_given and not load.num_running + load.num_waiting

    def note(self, decoded: Decoded) -> TokenStream | None:
        """Remember what came; returns who waits for it, if anyone still does."""
        request = self._requests.get(decoded.sequence_id)
        if request is None:
            return None
        request.reported_ids[decoded.sequence_id] += decoded.token_ids
        if decoded.finish_reason is not None:
            self.remove([decoded.sequence_id])
        return request.stream

    def remove(self, sequence_ids: Iterable[int]) -> list[int]:
        """These sequences have ended or are given up; returns those of them that the worker was given."""
        given = []
        for sequence_id in sequence_ids:
            request = self._requests.pop(sequence_id, None)
            if request is not None:
                del request.sequences[sequence_id]
                given += [sequence_id] if request.place is not None else []
        return given

    def stream_of(self, sequence_id: int) -> TokenStream | None:
        """Who waits for a sequence, if anyone still does."""
        request = self._requests.get(sequence_id)
        return request.stream if request else None

    def has_place(self, stream: TokenStream) -> bool:
        """Whether any of a stream's sequences is among those that the worker runs.

        The first in its line always is, even if the worker has not said so yet.
        """
        placed = self._placed(max(1, self._num_running), among=self._num_given)
        return any(request.stream is stream for request in placed)

    def crashed(self, *, max_num_seqs: int) -> list[TokenStream]:
        """The worker died: suspect who may have been in its last step, and let all wait for the next worker.

        Returns the streams of those who were suspects already; they are open no more.
        """
        accused = self._accused(max_num_seqs)
        fallen = [request for request in accused if request.is_suspect]
        for request in fallen:
            self.remove(list(request.sequences))
        for request in accused:
            request.is_suspect = True
        remaining = list(dict.fromkeys(self._requests.values()))
        for request in remaining:
            request.is_resumed |= request.place is not None
            request.place = None
        remaining.sort(key=attrgetter("priority"))
        self._suspects = deque(request for request in remaining if request.is_suspect)
        self._others = deque(request for request in remaining if not request.is_suspect)
        self._alone = None
        self._num_given = self._num_taken = self._num_running = 0
        self._running_ids = None
        self._is_worker_empty = True
        return [request.stream for request in fallen]

    def clear(self) -> set[TokenStream]:
        """Nothing is open any more; returns the streams that were."""
        streams = {request.stream for request in self._requests.values()}
        self.remove(list(self._requests))
        return streams

    def _accused(self, max_num_seqs: int) -> list[OpenRequest]:
        """Who may have been in the worker's last step, or was just being taken.

        A batch has at most `max_num_seqs`. Taking a request may kill a worker too; that it was taken is known from
        the report after the next step. Until then it may or may not have been there when places were given.
        """
        accused = self._placed(max_num_seqs, among=self._num_taken)
        accused += (request for request in self._requests.values() if (request.place or 0) > self._num_taken)
        return list(dict.fromkeys(accused))

    def _placed(self, count: int, *, among: int) -> list[OpenRequest]:
        """Who may have the batch's `count` places: a request as often as it has sequences there.

        Those who the worker said have one, then those of the lowest priority that came first: no newcomer puts out
        who runs. Only the first `among` sequences that the worker was given are thought of.
        """
        running = self._running_ids or ()
        known = [each for each in self._requests.items() if 0 < (each[1].place or 0) <= among]
        known.sort(key=lambda each: (each[0] not in running, each[1].priority))
        return [request for _, request in known[:count]]
