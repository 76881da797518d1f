"""All that is served: which model a request means, and what concerns every worker at once.

Knows names; what a model does with a request is its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from starlette.types import Scope

from server.engine_client import WorkerState
from server.errors import InvalidRequest, ModelNotFound
from server.metrics import exposition
from server.served_model import ServedModel

_CHOSEN: Final = "layerskip.model"


class ServedModels:
    """Models that answer to different names, each with a worker of its own; at least one."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models
        self._by_name = {name: model for model in models for name in model.names}
        self.are_draining = False

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def names(self) -> Sequence[str]:
        """Every name that requests may use."""
        return list(self._by_name)

    @property
    def first(self) -> ServedModel:
        """The one that stands for the server where no model is named."""
        return self._models[0]

    @property
    def serving(self) -> Sequence[ServedModel]:
        """Those whose worker is up; if there is none, the first, which can say why not."""
        return [model for model in self._models if model.client.is_up] or [self.first]

    @property
    def states(self) -> Mapping[str, WorkerState]:
        """Where each model's worker is in its life."""
        return {model.name: model.client.state for model in self._models}

    @property
    def are_gone(self) -> bool:
        """Whether no worker serves any model and none will."""
        return all(model.client.is_gone for model in self._models)

    def choose(self, name: str | None, scope: Scope) -> ServedModel:
        """The model a request means, which counts what is refused from now on.

        Raises ModelNotFound; where there are several, InvalidRequest if none is named.
        """
        if name is None and len(self._models) > 1:
            names = ", ".join(self.names)
            raise InvalidRequest(f"several models are served here; name one: {names}", param="model")
        model = self.first if name is None else self._by_name.get(name)
        if model is None:
            raise ModelNotFound(str(name), served=self.names)
        scope[_CHOSEN] = model
        return model

    def start(self) -> None:
        """Spawn every worker; returns at once."""
        for model in self._models:
            model.client.start()

    async def stop(self) -> None:
        """End open streams with an error, and every worker with them."""
        await asyncio.gather(*(model.client.stop() for model in self._models))

    def drain(self) -> None:
        """Let what is open come to its end; whoever lets requests in must let in no more."""
        self.are_draining = True

    def refuse_work(self) -> None:
        """Let nothing in any more and end every open stream with an error."""
        for model in self._models:
            model.client.refuse_work()

    def rejected(self, reason: str, scope: Scope) -> None:
        """Count a request that was not let in: for the model it means, or for the first before that is known."""
        model: ServedModel = scope.get(_CHOSEN, self.first)
        model.metrics.rejected(reason)

    def exposition(self) -> bytes:
        """The body of a scrape."""
        return exposition(model.metrics for model in self._models)
