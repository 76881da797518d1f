"""What schemathesis is told of our server: the bounds of the one it meets, and the shape of a refusal.

Knows documents and answers; imports nothing of the server.
"""

from __future__ import annotations

import schemathesis

MODEL = "python-8m"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
# Beside the document, which holds for every checkpoint and operator, these flags bound a request.
FLAGS = {"max_model_len": 48, "num_blocks": 512, "max_n": 2, "max_prompts": 4, "max_sequences_per_request": 4}
_BOUNDS = {
    "exit_layer": 15,
    "draft_length": 16,
    "n": FLAGS["max_n"],
    "max_tokens": 12,
    "max_completion_tokens": 12,
    "min_tokens": 1,
    "truncate_prompt_tokens": FLAGS["max_model_len"],
}
_VOCABULARY = 4096
_REFUSAL_FIELDS = {"message", "type", "param", "code"}


@schemathesis.hook
def before_load_schema(_, raw_schema):
    """Narrow requests to what the server at hand allows, or hardly one would be decoded."""
    for title, schema in raw_schema["components"]["schemas"].items():
        for name, described in schema.get("properties", {}).items():
            for kind in (described, *described.get("anyOf", ())) if title.endswith("Request") else ():
                _narrow(name, kind)
    for schema in ("ChatRequest", "CompletionRequest"):
        del raw_schema["components"]["schemas"][schema]["properties"]["best_of"]
    prompt = raw_schema["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    prompt["anyOf"][0]["minLength"] = 1
    path = raw_schema["paths"]["/v1/models/{name}"]["get"]
    path["parameters"][0]["schema"]["anyOf"] = [{"const": MODEL}, {"type": "string"}]


def _narrow(name, kind):
    if name in _BOUNDS and kind.get("type") == "integer":
        kind["maximum"] = _BOUNDS[name]
    elif name == "model" and kind.get("type") == "string":
        kind["enum"] = [MODEL]
    while items := kind.get("items"):
        kind = items
        if kind.get("type") == "integer":
            kind["maximum"] = _VOCABULARY - 1


@schemathesis.hook
def before_call(_, case, __):
    """Make parameters agree that each fit the document: rules over two of them are no part of it."""
    body = case.body
    if not case.meta.generation.mode.is_positive or not isinstance(body, dict):
        return
    if body.get("max_tokens") == 0:
        body["echo"] = True
    if body.get("truncate_prompt_tokens") == 0:
        body["truncate_prompt_tokens"] = -1
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("stream"):
        body.pop("prompt_logprobs", None)
    if body.get("continue_final_message"):
        body["add_generation_prompt"] = False
    if case.path == "/tokenize" and body.get("messages") is not None:
        body["prompt"] = None


@schemathesis.check
def refusal_is_openais_error(_, response, __):
    if 400 <= response.status_code < 500:
        error = response.json()["error"]
        assert set(error) == _REFUSAL_FIELDS, error
        assert error["message"], error
        kind = "rate_limit_error" if response.status_code == 429 else "invalid_request_error"
        assert error["type"] == kind, error
