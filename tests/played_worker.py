"""A client whose worker is the test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from config.settings import EngineSettings
from decoding.messages import (
    Command,
    Decoded,
    FinishReason,
    Generate,
    Load,
    Ready,
    SamplingParams,
    StepReport,
)
from server.deadlines import Deadlines
from server.engine_client import EngineClient
from server.errors import ApiError
from server.supervisor import WorkerCallbacks
from server.token_stream import TokenStream
from tests.scripted_engine import scripted_ready


class RecordedProcess:
    """Stands at the edge: keeps what was sent, and lets the test play the worker."""

    pid = 1
    is_congested = False

    def __init__(self) -> None:
        self.sent: list[Command] = []
        self.has_been_ended = False

    def start(self, callbacks: WorkerCallbacks) -> None:
        self.callbacks = callbacks

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def end_hung(self) -> None:
        self.has_been_ended = True

    @property
    def given(self) -> list[Generate]:
        return [command for command in self.sent if isinstance(command, Generate)]

    async def stop(self) -> None:
        self.sent.clear()


class Notes:
    """Observer and listener in one: remembers what it was told."""

    def __init__(self) -> None:
        self.discarded_tokens = 0
        self.lines: list[str] = []
        self.expiries: list[str] = []
        self.num_restarts = 0
        self.num_resumed = 0

    def worker_ready(self, ready: Ready) -> None:
        self.lines.append("worker ready")

    def step(self, report: StepReport) -> None:
        pass

    def restarted(self) -> None:
        self.num_restarts += 1

    def resumed(self) -> None:
        self.num_resumed += 1

    def discarded(self, num_tokens: int) -> None:
        self.discarded_tokens += num_tokens

    def expired(self, reason: str) -> None:
        self.expiries.append(reason)

    def loading(self, stage: str, fraction: float) -> None:
        self.lines.append(f"{stage} {fraction}")

    def ready(self, ready: Ready) -> None:
        self.lines.append("ready")

    def restarting(self, message: str) -> None:
        self.lines.append(message)

    def failed(self, message: str) -> None:
        self.lines.append(message)


class Played:
    """A client whose worker is the test."""

    def __init__(
        self,
        *,
        max_queued: int = 0,
        max_num_seqs: int = 4,
        deadlines: Deadlines | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.workers: list[RecordedProcess] = []
        self.notes = Notes()
        self.client = EngineClient(
            self._spawn,
            max_queued=max_queued,
            deadlines=deadlines or Deadlines(),
            observer=self.notes,
            listener=self.notes,
            clock=clock,
        )
        self.client.start()
        self.settings = EngineSettings(max_num_seqs=max_num_seqs)

    @property
    def process(self) -> RecordedProcess:
        """The latest worker."""
        return self.workers[-1]

    def _spawn(self) -> RecordedProcess:
        self.workers.append(RecordedProcess())
        return self.workers[-1]

    def die(self, exit_code: int = -9) -> None:
        """End the worker."""
        self.process.callbacks.on_exit(exit_code)

    async def restarted(self) -> Played:
        """Wait for the next worker, and let it be ready."""
        num_workers = len(self.workers)
        while len(self.workers) == num_workers:
            await asyncio.sleep(0.01)
        return self.ready()

    def ready(self) -> Played:
        self.process.callbacks.on_event(scripted_ready(self.settings, "{}"))
        return self

    def step(self, *decoded: Decoded, num_running: int = 0) -> None:
        """A report of a worker that has taken all that it was sent."""
        load, num_taken = Load(num_running=num_running), len(self.process.given)
        self.process.callbacks.on_event(StepReport(list(decoded), load, num_taken=num_taken))

    def submit(self, *sequence_ids: int) -> TokenStream:
        return self.client.submit([generate(sequence_id) for sequence_id in sequence_ids])


def generate(sequence_id: int) -> Generate:
    return Generate(sequence_id, [1], 8, SamplingParams(), 0, [0], 4, 3)


def said(sequence_id: int, *token_ids: int, finish: FinishReason | None = None) -> Decoded:
    return Decoded(sequence_id, list(token_ids), 0, 0, 4, finish_reason=finish)


async def drain(stream: TokenStream) -> tuple[list[Decoded], ApiError | None]:
    events: list[Decoded] = []
    try:
        while True:
            events += [arrival.decoded for arrival in await asyncio.wait_for(stream.next(), 0.01)]
    except TimeoutError:
        return events, None
    except ApiError as error:
        return events, error


def play(scene: Callable[[Played], Awaitable[None]], played: Callable[[], Played] = Played) -> None:
    async def run() -> None:
        stage = played().ready()
        await scene(stage)
        await stage.client.stop()

    asyncio.run(run())


def given_ids(played: Played) -> list[int]:
    return [sequence.sequence_id for sequence in played.process.given]


async def error_of(stream: TokenStream) -> ApiError | None:
    return (await drain(stream))[1]
