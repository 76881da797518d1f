"""The web application: one model behind the routes, its worker living as long as the application.

Knows how the parts fit; `create_app` is also what `uvicorn --factory server.app:create_app` calls.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from config.settings import Settings
from decoding.messages import Ready
from server.edge import Edge
from server.engine_client import StartListener
from server.errors import ErrorAnswers
from server.routes import router
from server.served_model import ServedModel
from server.worker import EngineLoader, load_engine

_log = logging.getLogger("layerskip.worker")


class LogListener:
    """Writes the worker's start to the log."""

    def loading(self, stage: str, fraction: float) -> None:
        """A stage is under way."""
        _log.info("loading: %s %.0f%%", stage, 100 * fraction)

    def ready(self, ready: Ready) -> None:
        """The worker serves."""
        _log.info("ready: %s on %s in %s", ready.model, ready.device, ready.dtype)

    def failed(self, message: str) -> None:
        """The worker will not serve, or serves no more."""
        _log.error("%s", message)


class LayerskipApp:
    """The ASGI application, with its model in reach of whoever runs it."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        api = FastAPI(
            title="layerskip-server",
            max_body_size=model.settings.max_body_bytes,
            docs_url=None,
            redoc_url=None,
            lifespan=self._lifespan,
        )
        api.state.model = model
        api.include_router(router)
        ErrorAnswers(count=model.metrics.rejected).register(api)
        self._edge = Edge(
            api,
            max_body_bytes=model.settings.max_body_bytes,
            on_too_large=lambda: model.metrics.rejected("too_large"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve."""
        await self._edge(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.model.client.start()
        try:
            yield
        finally:
            await self.model.client.stop()


def create_app(
    settings: Settings | None = None,
    *,
    load: EngineLoader = load_engine,
    listener: StartListener | None = None,
) -> LayerskipApp:
    """Make the application; without `settings` they come from the environment. Raises SettingsError."""
    chosen = Settings.load({}) if settings is None else settings
    return LayerskipApp(ServedModel(chosen, load_engine=load, listener=listener or LogListener()))
