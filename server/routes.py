"""The paths of the server.

Knows HTTP and who answers what; each answer is made elsewhere.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server.completions import Completion, plan_completion
from server.edge import REQUEST_ID
from server.engine_client import WorkerState
from server.json_route import FastJsonRoute
from server.metrics import CONTENT_TYPE
from server.openai_types import CompletionRequest
from server.served_model import ServedModel
from server.sse import EventStream

router = APIRouter(route_class=FastJsonRoute)

_CLIENT_CLOSED_REQUEST = 499


def served_model(request: Request) -> ServedModel:
    """The model this application serves."""
    model = request.app.state.model
    assert isinstance(model, ServedModel)
    return model


Model = Annotated[ServedModel, Depends(served_model)]


@router.post("/v1/completions", response_model=None)
async def complete(body: CompletionRequest, request: Request, model: Model) -> Response:
    """Complete prompts, at once or as a stream."""
    answer_id = f"cmpl-{request.scope[REQUEST_ID]}"
    completion = Completion(await plan_completion(body, model, answer_id=answer_id), model)
    if body.stream:
        return EventStream(completion)
    return await _complete_unless_gone(completion, request)


async def _complete_unless_gone(completion: Completion, request: Request) -> Response:
    """Answer when complete, or stop decoding as soon as the client is gone."""
    answer = asyncio.ensure_future(completion.complete())
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return (
            JSONResponse(answer.result()) if answer.done() else Response(status_code=_CLIENT_CLOSED_REQUEST)
        )
    finally:
        answer.cancel()
        gone.cancel()
        completion.close()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get("/v1/models")
async def list_models(model: Model) -> dict[str, object]:
    """The models requests may name."""
    return {"object": "list", "data": [_model_card(model)]}


@router.get("/v1/models/{name:path}")
async def show_model(name: str, model: Model) -> dict[str, object]:
    """One model."""
    model.answer_to(name)
    return _model_card(model)


def _model_card(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "layerskip-server",
        "root": model.name,
        "parent": None,
        "max_model_len": model.client.ready.limits.max_model_len,
    }


@router.get("/server_info")
async def server_info(model: Model) -> dict[str, object]:
    """What is served, and within which bounds."""
    ready, settings = model.client.ready, model.settings
    limits = ready.limits
    return {
        "version": _version(),
        "model": model.name,
        "revision": ready.revision,
        "dtype": ready.dtype,
        "device": ready.device,
        "num_layers": limits.num_layers,
        "vocab_size": limits.vocab_size,
        "allowed_exit_layers": limits.allowed_exit_layers,
        "default_exit_layer": limits.default_exit_layer,
        "default_draft_length": limits.default_draft_length,
        "default_sampling": msgspec.to_builtins(ready.sampling),
        "limits": {
            "max_model_len": limits.max_model_len,
            "max_draft_length": limits.max_draft_length,
            "max_num_seqs": limits.max_num_seqs,
            "max_queued_requests": settings.max_queued_requests,
            "max_body_bytes": settings.max_body_bytes,
            "max_n": settings.max_n,
            "max_prompts": settings.max_prompts,
            "max_sequences_per_request": settings.max_sequences_per_request,
            "max_stop_strings": settings.max_stop_strings,
            "max_stop_string_chars": settings.max_stop_string_chars,
        },
        "kv_cache": {
            "block_size": limits.block_size,
            "num_blocks": limits.num_blocks,
            "num_tokens": limits.block_size * limits.num_blocks,
        },
        "worker_pid": model.client.pid,
    }


@router.get("/health")
@router.get("/health/ready")
async def health(model: Model) -> JSONResponse:
    """200 while requests are served, else 503 with the reason."""
    client = model.client
    if client.state is WorkerState.READY:
        return JSONResponse({"status": "ready"})
    if client.state is WorkerState.LOADING:
        progress = {"status": "loading", "stage": client.stage, "fraction": client.fraction}
        return JSONResponse(progress, status_code=503, headers={"Retry-After": "1"})
    return JSONResponse({"status": "dead"}, status_code=503)


@router.get("/health/live")
async def live(model: Model) -> JSONResponse:
    """200 while a restart would not help: loading counts as alive, a dead worker does not."""
    is_dead = model.client.state is WorkerState.DEAD
    return JSONResponse({"status": "dead" if is_dead else "live"}, status_code=503 if is_dead else 200)


@router.get("/metrics")
async def metrics(model: Model) -> Response:
    """Everything Prometheus scrapes."""
    return Response(model.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/version")
async def show_version() -> dict[str, str]:
    """The server's version."""
    return {"version": _version()}


def _version() -> str:
    try:
        return version("layerskip-server")
    except PackageNotFoundError:
        return "not installed"
