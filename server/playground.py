"""The playground at `/`: one page that needs nothing from elsewhere and runs nothing that a model says.

Knows files and the policy the page is sent with; the page itself asks the other routes.
"""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from string import Template
from typing import Final

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()


def _part(name: str) -> str:
    return files("server").joinpath("page", name).read_text(encoding="utf-8")


def _source(content: str) -> str:
    """What the policy calls an inline style or script; one that is not exactly this is not applied."""
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"


def _policy(*, style: str, script: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src {_source(style)}",
            f"script-src {_source(script)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


_STYLE: Final = _part("page.css")
_SCRIPT: Final = "\n".join(map(_part, ("asking.js", "drafts.js", "side.js", "page.js")))
_PAGE: Final = Template(_part("page.html")).substitute(style=_STYLE, script=_SCRIPT)
_HEADERS: Final = {
    "Content-Security-Policy": _policy(style=_STYLE, script=_SCRIPT),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def playground() -> HTMLResponse:
    """The page; it holds no secret and needs no key, what it asks for may."""
    return HTMLResponse(_PAGE, headers=_HEADERS)
