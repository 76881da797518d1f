"""Puts a conversation into the words a checkpoint was trained on, with the template that came with it.

Knows templates and messages; knows no tokens. A template is somebody else's program: it runs in a sandbox, and
what it writes is bounded.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from config.errors import SettingsError
from server.chat_types import ChatMessage
from server.codec import PromptLimit
from server.errors import InvalidRequest
from server.vocabulary import Vocabulary

# Stands behind the final message while the template runs; whether its last space survives tells whether the
# template trims messages.
_END_MARK: Final = "\N{OBJECT REPLACEMENT CHARACTER}end of the final message\N{OBJECT REPLACEMENT CHARACTER} "
_FAULTS: Final = (
    TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
_MAX_REASON_CHARS: Final = 200


class _GenerationTag(Extension):
    """`{% generation %}`, which marks an assistant's words for training: they are rendered as they stand."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox; repeating a string or raising to a power could fill the memory in one step."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        if not all(isinstance(value, int | float) and abs(value) < 2**32 for value in (left, right)):
            raise TemplateError(f"`{operator}` is for small numbers only")
        if operator == "**" and abs(right) > 64:
            raise TemplateError("an exponent may be at most 64")
        return super().call_binop(context, operator, left, right)


class TemplateSource:
    """Where a model's template is from: the operator's file, else the checkpoint.

    Raises SettingsError if the file cannot be read or is no template.
    """

    def __init__(self, path: Path | None) -> None:
        self._own = None if path is None else _read(path)
        self.why_none = "this model has no chat template; the operator can give one with --chat-template"

    def compile(self, of_checkpoint: str | None, vocabulary: Vocabulary) -> ChatTemplate | None:
        """The template of a model; None, with the reason in `why_none`, if it has none that can be compiled."""
        source = of_checkpoint if self._own is None else self._own
        if source is None:
            return None
        try:
            return ChatTemplate(source, bos_token=vocabulary.bos_token, eos_token=vocabulary.eos_token)
        except TemplateSyntaxError as error:
            self.why_none = f"this model's chat template is broken ({error.message}); see --chat-template"
            return None


def _read(path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
        ChatTemplate(source, bos_token="", eos_token="")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"chat-template {path}: cannot be read; pass a readable file") from error
    except TemplateSyntaxError as error:
        raise SettingsError(
            f"chat-template {path}: line {error.lineno}: {error.message}; pass a Jinja template"
        ) from error
    return source


class ChatTemplate:
    """A compiled template. Raises TemplateSyntaxError if it is none."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": _now,
            "bos_token": bos_token,
            "eos_token": eos_token,
        }
        self._template = environment.from_string(source)

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        limit: PromptLimit,
    ) -> str:
        """The prompt. With `continue_final_message` it ends with the final message's own words.

        Raises InvalidRequest if the template refuses the messages, and PromptTooLong.
        """
        turns = [_turn(message) for message in messages]
        if not continue_final_message:
            return self._run(turns, add_generation_prompt=add_generation_prompt, limit=limit)
        turns[-1]["content"] += _END_MARK
        return _until_end_mark(self._run(turns, add_generation_prompt=False, limit=limit))

    def _run(self, turns: list[dict[str, str]], *, add_generation_prompt: bool, limit: PromptLimit) -> str:
        pieces, num_bytes = [], 0
        try:
            for piece in self._template.generate(
                messages=turns, add_generation_prompt=add_generation_prompt, tools=None, documents=None
            ):
                pieces.append(piece)
                num_bytes += len(piece.encode())
                limit.check_bytes(num_bytes)
        except _FAULTS as error:
            reason = " ".join(str(error).split())[:_MAX_REASON_CHARS]
            raise InvalidRequest(
                f"the chat template does not take these messages: {reason}", param="messages"
            ) from error
        return "".join(pieces)


async def render_messages(
    template: ChatTemplate,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    limit: PromptLimit,
) -> str:
    """The prompt of a request, which by default ends where an answer begins. Rendered beside the event loop."""
    return await asyncio.to_thread(
        template.render,
        messages,
        add_generation_prompt=add_generation_prompt is not False,
        continue_final_message=bool(continue_final_message),
        limit=limit,
    )


def _turn(message: ChatMessage) -> dict[str, str]:
    turn = {"role": message.role, "content": message.content}
    return turn if message.name is None else turn | {"name": message.name}


def _until_end_mark(rendered: str) -> str:
    before, mark, after = rendered.rpartition(_END_MARK.rstrip())
    if not mark:
        raise InvalidRequest(
            "the chat template does not end with the final message, so it cannot be continued",
            param="continue_final_message",
        )
    return before if after.startswith(" ") else before.rstrip()


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
