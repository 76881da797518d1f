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
from itertools import islice

from decoding.messages import Decoded, Generate, Load
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
        self._is_worker_empty = True

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

    def heard(self, load: Load, *, num_taken: int) -> None:
        """The worker has taken so many sequences by now, and holds what `load` says."""
        self._num_taken = num_taken
        self._is_worker_empty = num_taken == self._num_given and not load.num_running + load.num_waiting

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

    def has_place(self, stream: TokenStream, *, num_running: int) -> bool:
        """Whether any of a stream's sequences is among the oldest that the worker was given, which it runs."""
        given = (request for request in self._requests.values() if request.place is not None)
        return any(request.stream is stream for request in islice(given, num_running))

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
        self._suspects = deque(request for request in remaining if request.is_suspect)
        self._others = deque(request for request in remaining if not request.is_suspect)
        self._alone = None
        self._num_given = self._num_taken = 0
        self._is_worker_empty = True
        return [request.stream for request in fallen]

    def clear(self) -> set[TokenStream]:
        """Nothing is open any more; returns the streams that were."""
        streams = {request.stream for request in self._requests.values()}
        self.remove(list(self._requests))
        return streams

    def _accused(self, max_num_seqs: int) -> list[OpenRequest]:
        """Who may have been in the worker's last step, or was just being taken.

        A batch has at most `max_num_seqs`, the oldest. Taking a request may kill a worker too; that it was taken
        is known from the report after the next step.
        """
        given = [request for request in self._requests.values() if request.place is not None]
        accused = given[:max_num_seqs]
        accused += (request for request in given if (request.place or 0) > self._num_taken)
        return list(dict.fromkeys(accused))
