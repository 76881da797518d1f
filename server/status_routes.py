"""What the server says of itself: whether it serves, what, and since which version.

Knows states and bounds; takes no work.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from server.answer_types import ServerInfoAnswer
from server.described import is_healthy, looks, refused
from server.engine_client import WorkerState
from server.errors import InvalidRequest, ModelNotFound, Unauthorized
from server.limits import or_auto
from server.request_scope import Choose, MaySeeNames, Models
from server.served_model import ServedModel

router = APIRouter()


@router.get("/server_info", responses=looks(ServerInfoAnswer, InvalidRequest, ModelNotFound))
async def server_info(
    models: Models, choose: Choose, model: Annotated[str | None, Query(max_length=1024)] = None
) -> dict[str, object]:
    """What is served, and within which bounds; of several models the one asked for, else the first that is up."""
    return _model_info(models.serving[0] if model is None else choose(model)) | {"models": models.states}


def _model_info(model: ServedModel) -> dict[str, object]:
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
        "tensor_parallel_size": ready.tensor_parallel_size,
        "is_compiled": ready.is_compiled,
        "num_layers": limits.num_layers,
        "vocab_size": limits.vocab_size,
        "allowed_exit_layers": limits.allowed_exit_layers,
        "default_exit_layer": or_auto(limits.default_exit_layer),
        "default_draft_length": or_auto(limits.default_draft_length),
        "default_drafter": limits.default_drafter,
        "first_exit_layer": limits.first_exit_layer,
        "first_draft_length": limits.first_draft_length,
        "has_draft_model": limits.has_draft_model,
        "scheduling_policy": settings.scheduling_policy,
        "is_drafting_worthwhile": model.client.load.is_drafting_worthwhile,
        "controller": _controller(model),
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


def _controller(model: ServedModel) -> dict[str, object] | None:
    """What choices rest on; None where nothing is chosen, or nothing was heard yet."""
    beliefs, load = model.metrics.beliefs, model.client.load
    if beliefs is None:
        return None
    last = {"exit_layer": load.chosen_exit_layer, "draft_length": round(load.chosen_draft_length, 2)}
    told: dict[str, object] = msgspec.to_builtins(beliefs)
    return {"last_choice": last if load.chosen_exit_layer else None} | told


@router.get("/health", response_model=None, responses=is_healthy())
@router.get("/health/ready", response_model=None, responses=is_healthy())
@router.get("/ping", response_model=None, responses=is_healthy())
@router.post("/ping", response_model=None, responses=is_healthy())
async def health(models: Models, may_see_names: MaySeeNames) -> JSONResponse:
    """200 while any model is served, else 503; to whoever has a key it says how each of them is."""
    states = models.states
    named: dict[str, object] = {"models": states} if may_see_names else {}
    if models.are_draining:
        return _unready({"status": "draining"} | named)
    if WorkerState.READY in states.values():
        return JSONResponse({"status": "ready"} | named)
    for state in (WorkerState.LOADING, WorkerState.RESTARTING):
        for model in models:
            if model.client.state is state:
                progress = {"stage": model.client.stage, "fraction": model.client.fraction}
                return _unready({"status": state} | named | progress)
    return JSONResponse({"status": "dead"} | named, status_code=503)


def _unready(answer: dict[str, object]) -> JSONResponse:
    return JSONResponse(answer, status_code=503, headers={"Retry-After": "1"})


@router.get("/health/live", response_model=None, responses=is_healthy())
async def live(models: Models) -> JSONResponse:
    """200 while a restart of the server would not help: a worker that is loaded or restarted counts as alive, one
    that is gone only while others live.
    """
    is_dead = set(models.states.values()) == {WorkerState.DEAD}
    return JSONResponse({"status": "dead" if is_dead else "live"}, status_code=503 if is_dead else 200)


@router.get("/version", responses=refused(Unauthorized))
async def show_version() -> dict[str, str]:
    """The server's version."""
    return {"version": _version()}


def _version() -> str:
    try:
        return version("layerskip-server")
    except PackageNotFoundError:
        return "not installed"
