"""A completion ends where its text does, however the events of its sequences come bundled."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from config.settings import BUNDLED_CHECKPOINT, Settings
from decoding.messages import Abort, Decoded, FinishReason
from server.codec import Codec
from server.completions import plan_completion
from server.generation import Generation
from server.metrics import Metrics, exposition
from server.openai_types import CompletionRequest
from tests.test_engine_client import Played

TOKENIZER = (BUNDLED_CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8")


class Desk:
    """What a completion needs of a served model, with the test as its worker."""

    def __init__(self, *, max_num_seqs: int = 4) -> None:
        self.played = Played(max_num_seqs=max_num_seqs).ready()
        self.metrics = Metrics(model_name="m")
        self.client = self.played.client
        self.codec = Codec(
            SimpleNamespace(tokenizer_json=TOKENIZER, eos_token_ids=[0]), self.client.ready.limits
        )
        self.settings = Settings.load({})
        self.name = "m"

    async def completion(self, **body: object) -> Generation:
        request = CompletionRequest.model_validate(body)
        return Generation(await plan_completion(request, self, answer_id="cmpl-1"), self)

    def ids(self, text: str) -> list[int]:
        return self.codec.encode_word(text)


@pytest.mark.parametrize("num_late", [0, 1, 3])
def test_events_behind_a_stop_string_change_nothing_but_the_discarded_count(num_late: int) -> None:
    """They were under way when the stop string was found, and may be read together with it or later."""

    async def run() -> None:
        desk = Desk()
        completion = await desk.completion(prompt="x", max_tokens=8, stop=["stop"])
        (sequence,) = completion.plan.sequences
        said = desk.ids("go on, stop here")
        desk.played.step(Decoded(sequence.sequence_id, said, 0, 0, 4))
        late = [Decoded(sequence.sequence_id, [7, 7], 2, 1, 4)] * num_late
        if late:
            late[-1] = Decoded(sequence.sequence_id, [7], 0, 0, 4, finish_reason=FinishReason.LENGTH)
        desk.played.step(*late)
        answer = await asyncio.wait_for(completion.complete(), 1)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("go on, ", "stop", "stop")
        delivered = answer["usage"]["completion_tokens"]
        assert 0 < delivered < len(said)
        assert answer["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
        aborts = [command for command in desk.played.process.sent if isinstance(command, Abort)]
        assert len(aborts) == (num_late == 0)

    asyncio.run(run())


def test_a_request_of_many_sequences_is_not_taken_for_a_slow_reader() -> None:
    """After a stall of the loop, many steps of many sequences arrive before their reader's turn."""

    async def run() -> None:
        desk = Desk(max_num_seqs=64)
        completion = await desk.completion(prompt=["x"] * 16, n=4, max_tokens=101)
        ids = [sequence.sequence_id for sequence in completion.plan.sequences]
        for _ in range(100):
            desk.played.step(*(Decoded(i, [7], 0, 0, 4) for i in ids))
        desk.played.step(*(Decoded(i, [7], 0, 0, 4, finish_reason=FinishReason.LENGTH) for i in ids))
        answer = await asyncio.wait_for(completion.complete(), 10)
        assert answer["usage"]["completion_tokens"] == 64 * 101

    asyncio.run(run())


def test_tokens_that_came_and_were_not_read_count_as_discarded() -> None:
    async def run() -> None:
        desk = Desk()
        completion = await desk.completion(prompt="x", max_tokens=8)
        (sequence,) = completion.plan.sequences
        desk.played.step(Decoded(sequence.sequence_id, [7, 7, 7], 2, 2, 4))
        completion.close()
        assert 'layerskip_discarded_tokens_total{model_name="m"} 3.0' in exposition([desk.metrics]).decode()

    asyncio.run(run())
