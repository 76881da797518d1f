"""The web application: models behind the routes, their workers living as long as the application.

Knows how the parts fit; `create_app` is also what `uvicorn --factory server.app:create_app` calls.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from config.server_settings import ServerSettings
from config.settings import Settings
from decoding.messages import Ready
from server.auth import ApiKeys, KeyGate, warn_if_open
from server.draining import DrainGate
from server.edge import Edge
from server.errors import ErrorAnswers
from server.observers import StartListener
from server.playground import router as playground_router
from server.routes import router
from server.served_model import ServedModel
from server.served_models import ServedModels
from server.worker import EngineLoader, load_engine

_log = logging.getLogger("layerskip.worker")


class LogListener:
    """Writes the start of one model's worker to the log; `url` is where it will serve, if that is known."""

    def __init__(self, model_name: str, *, url: str | None = None) -> None:
        self._model_name = model_name
        self._url = url

    def loading(self, stage: str, fraction: float) -> None:
        """A stage is under way."""
        _log.info("loading %s: %s %.0f%%", self._model_name, stage, 100 * fraction)

    def ready(self, ready: Ready) -> None:
        """The worker serves."""
        where = "" if self._url is None else f" at {self._url}"
        _log.info("ready: %s on %s in %s%s", self._model_name, ready.devices, ready.dtype, where)

    def restarting(self, message: str) -> None:
        """The worker died, and another follows."""
        _log.warning("%s: %s", self._model_name, message)

    def failed(self, message: str) -> None:
        """No worker will serve."""
        _log.error("%s: %s", self._model_name, message)


class LayerskipApp:
    """The ASGI application, with its models in reach of whoever runs it."""

    def __init__(self, models: ServedModels, settings: ServerSettings, keys: ApiKeys) -> None:
        self.models = models
        self.settings = settings
        api = FastAPI(
            title="layerskip-server",
            max_body_size=settings.max_body_bytes,
            docs_url=None,
            redoc_url=None,
            lifespan=self._lifespan,
        )
        api.state.models = models
        api.include_router(router)
        api.include_router(playground_router)
        errors = ErrorAnswers(count=models.rejected)
        errors.register(api)
        self._work = DrainGate(api, is_draining=lambda: models.are_draining, refuse=errors.answer)
        gate = KeyGate(self._work, keys=keys, refuse=errors.answer)
        self._edge = Edge(
            _readable_from(settings.cors_origins, gate),
            max_body_bytes=settings.max_body_bytes,
            slow_reader_timeout_s=settings.slow_reader_timeout_s,
            count=models.rejected,
        )

    @property
    def num_under_way(self) -> int:
        """Requests for work that have not had their whole answer."""
        return self._work.num_under_way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve."""
        await self._edge(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.models.start()
        try:
            yield
        finally:
            await self.models.stop()


def create_app(
    settings: Settings | None = None,
    *,
    load: EngineLoader = load_engine,
    listener: Callable[[str], StartListener] = LogListener,
) -> LayerskipApp:
    """Make the application; without `settings` they come from the environment. Raises SettingsError.

    `listener` is asked, by a model's name, who hears how its worker starts.
    """
    chosen = Settings.load({}) if settings is None else settings
    keys = ApiKeys.chosen(chosen)
    warn_if_open(chosen, keys)
    models = [
        ServedModel(each, load_engine=load, listener=listener(each.model_name)) for each in chosen.per_model()
    ]
    return LayerskipApp(ServedModels(models), chosen, keys)


def _readable_from(origins: Sequence[str] | None, app: ASGIApp) -> ASGIApp:
    """Let pages of these origins read answers. A key is a header and no cookie, so no credentials are allowed."""
    if origins is None:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("Authorization", "Content-Type", "X-Request-Id"),
        expose_headers=("X-Request-Id", "Retry-After"),
    )
