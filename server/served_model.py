"""One model as requests see it: its name, its worker, its tokenizer and its numbers.

Knows how these belong together; several models are several of these.
"""

from __future__ import annotations

import time

from config.settings import Settings
from decoding.messages import Ready, StepReport
from server.chat_template import ChatTemplate, TemplateSource
from server.codec import Codec
from server.deadlines import Deadlines
from server.engine_client import EngineClient
from server.errors import InvalidRequest, Unavailable
from server.metrics import Metrics
from server.observers import StartListener
from server.supervisor import WorkerProcess
from server.worker import EngineLoader


class ServedModel:
    """Starts and stops one model's worker; requests take client, codec and metrics from here."""

    def __init__(self, settings: Settings, *, load_engine: EngineLoader, listener: StartListener) -> None:
        self.settings = settings
        self.names = settings.model_names
        self.name = self.names[0]
        self.metrics = Metrics(model_name=self.name)
        self.client = EngineClient(
            lambda: WorkerProcess(settings.engine, load_engine=load_engine),
            max_queued=settings.max_queued_requests,
            deadlines=Deadlines(
                queue_s=settings.queue_timeout_s,
                total_s=settings.request_timeout_s,
                step_s=settings.step_timeout_s,
            ),
            observer=self,
            listener=listener,
        )
        self.metrics.watch(self.client)
        self.created_s = int(time.time())
        self._codec: Codec | None = None
        self._template_source = TemplateSource(settings.chat_template)
        self._chat_template: ChatTemplate | None = None

    @property
    def codec(self) -> Codec:
        """The tokenizer. Raises Unavailable until the worker has handed it over."""
        if self._codec is None:
            raise Unavailable("the model is loading")
        return self._codec

    @property
    def chat_template(self) -> ChatTemplate:
        """What makes chats prompts. Raises InvalidRequest if there is none."""
        if self._chat_template is None:
            raise InvalidRequest(self._template_source.why_none, param="messages")
        return self._chat_template

    @property
    def has_chat_template(self) -> bool:
        """Whether chats are served."""
        return self._chat_template is not None

    def worker_ready(self, ready: Ready) -> None:
        """Take over what the worker says of its model."""
        self._codec = Codec(ready.text, ready.limits)
        self._chat_template = self._template_source.compile(ready.text.chat_template, self._codec.vocabulary)
        self.metrics.worker_ready(ready)

    def step(self, report: StepReport) -> None:
        """Count a step."""
        self.metrics.step(report)

    def expired(self, reason: str) -> None:
        """Count a request that was stopped at a deadline."""
        self.metrics.rejected(reason)

    def restarted(self) -> None:
        """Count a worker that follows one that died."""
        self.metrics.restarts.inc()

    def resumed(self) -> None:
        """Count a request that outlived its worker."""
        self.metrics.resumed.inc()

    def discarded(self, num_tokens: int) -> None:
        """Count tokens nobody waits for."""
        self.metrics.discarded(num_tokens)
