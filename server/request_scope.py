"""What a route may ask of the request it answers.

Knows where an application keeps its models; knows nothing of what is done with them.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.auth import BEARS_KEY
from server.served_model import ServedModel
from server.served_models import ServedModels


def served_models(request: Request) -> ServedModels:
    """The models this application serves."""
    models = request.app.state.models
    assert isinstance(models, ServedModels)
    return models


def may_see_names(request: Request) -> bool:
    """Whether a request to an open path bears what others must: then it may learn what is served."""
    return bool(request.scope[BEARS_KEY])


class Chooser:
    """Finds the model that a request means by the name in its body. Raises ModelNotFound and InvalidRequest."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __call__(self, name: str | None) -> ServedModel:
        """The model; from now on what is refused counts as its own."""
        return served_models(self._request).choose(name, self._request.scope)


Models = Annotated[ServedModels, Depends(served_models)]
MaySeeNames = Annotated[bool, Depends(may_see_names)]
Choose = Annotated[Chooser, Depends(Chooser)]
