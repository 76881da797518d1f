"""The paths of the server.

Knows HTTP and who answers what; each answer is made elsewhere.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.answer_types import ChatAnswer, CompletionAnswer, ModelCard, ModelList
from server.chat import plan_chat
from server.chat_types import ChatRequest
from server.completions import plan_completion
from server.described import generates, looks, plain_text
from server.edge import REQUEST_ID
from server.errors import ModelNotFound
from server.generation import Generation, GenerationPlan
from server.json_route import FastJsonRoute
from server.metrics import CONTENT_TYPE
from server.openai_params import GenerationParams
from server.openai_types import CompletionRequest
from server.request_log import note_outcome
from server.request_scope import Choose, Models
from server.served_model import ServedModel
from server.sse import EventStream
from server.status_routes import router as status_router
from server.tokenize_routes import router as tokenize_router

router = APIRouter(route_class=FastJsonRoute)
router.include_router(status_router)
router.include_router(tokenize_router)

_CLIENT_CLOSED_REQUEST = 499


@router.post("/v1/completions", response_model=None, responses=generates(CompletionAnswer))
async def complete(body: CompletionRequest, request: Request, choose: Choose) -> Response:
    """Complete prompts, at once or as a stream."""
    model = choose(body.model)
    plan = await plan_completion(body, model, answer_id=f"cmpl-{_own_id(body, request)}")
    return await _answer(plan, request, model)


@router.post("/v1/chat/completions", response_model=None, responses=generates(ChatAnswer))
async def chat(body: ChatRequest, request: Request, choose: Choose) -> Response:
    """Say what comes next in a conversation, at once or as a stream."""
    model = choose(body.model)
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


@router.get("/v1/models", response_model=None, responses=looks(ModelList))
async def list_models(models: Models) -> dict[str, object]:
    """The models requests may name; those that do not serve at the moment are left out."""
    cards = [_model_card(name, model) for model in models.serving for name in model.names]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{name:path}", response_model=None, responses=looks(ModelCard, ModelNotFound))
async def show_model(name: str, choose: Choose) -> dict[str, object]:
    """One model."""
    return _model_card(name, choose(name))


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


@router.get("/metrics", response_class=Response, responses=plain_text())
async def metrics(models: Models) -> Response:
    """Everything Prometheus scrapes."""
    return Response(models.exposition(), headers={"Content-Type": CONTENT_TYPE})
