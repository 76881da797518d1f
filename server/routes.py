"""The paths of the server.

Knows HTTP and who answers what; each answer is made elsewhere.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.chat import plan_chat
from server.chat_types import ChatRequest
from server.completions import plan_completion
from server.edge import REQUEST_ID
from server.engine_client import WorkerState
from server.generation import Generation, GenerationPlan
from server.json_route import FastJsonRoute
from server.metrics import CONTENT_TYPE
from server.openai_params import GenerationParams
from server.openai_types import CompletionRequest
from server.request_log import note_outcome
from server.request_scope import Model
from server.served_model import ServedModel
from server.sse import EventStream
from server.tokenize_routes import router as tokenize_router

router = APIRouter(route_class=FastJsonRoute)
router.include_router(tokenize_router)

_CLIENT_CLOSED_REQUEST = 499


@router.post("/v1/completions", response_model=None)
async def complete(body: CompletionRequest, request: Request, model: Model) -> Response:
    """Complete prompts, at once or as a stream."""
    plan = await plan_completion(body, model, answer_id=f"cmpl-{_own_id(body, request)}")
    return await _answer(plan, request, model)


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatRequest, request: Request, model: Model) -> Response:
    """Say what comes next in a conversation, at once or as a stream."""
    plan = await plan_chat(body, model, answer_id=f"chatcmpl-{_own_id(body, request)}")
    return await _answer(plan, request, model)


def _own_id(body: GenerationParams, request: Request) -> str:
    """What tells an answer from others: the header's id, else the body's, else the server's."""
    server_id: str = request.scope[REQUEST_ID]
    is_from_header = request.headers.get("x-request-id") == server_id
    return server_id if is_from_header or body.request_id is None else body.request_id


async def _answer(plan: GenerationPlan, request: Request, model: ServedModel) -> Response:
    generation = Generation(plan, model)
    note_outcome(request.scope, generation)
    if plan.request.stream:
        return EventStream(generation)
    return await _complete_unless_gone(generation, request)


async def _complete_unless_gone(generation: Generation, request: Request) -> Response:
    """Answer when complete, or stop decoding as soon as the client is gone."""
    answer = asyncio.ensure_future(generation.complete())
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return (
            JSONResponse(answer.result()) if answer.done() else Response(status_code=_CLIENT_CLOSED_REQUEST)
        )
    finally:
        answer.cancel()
        gone.cancel()
        generation.close()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get("/v1/models")
async def list_models(model: Model) -> dict[str, object]:
    """The models requests may name."""
    return {"object": "list", "data": [_model_card(name, model) for name in model.names]}


@router.get("/v1/models/{name:path}")
async def show_model(name: str, model: Model) -> dict[str, object]:
    """One model."""
    model.answer_to(name)
    return _model_card(name, model)


def _model_card(name: str, model: ServedModel) -> dict[str, object]:
    return {
        "id": name,
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
        "served_model_names": list(model.names),
        "has_chat_template": model.has_chat_template,
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
@router.get("/ping")
@router.post("/ping")
async def health(model: Model) -> JSONResponse:
    """200 while requests are served, else 503 with the reason."""
    client = model.client
    if client.is_draining:
        return JSONResponse({"status": "draining"}, status_code=503, headers={"Retry-After": "1"})
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
