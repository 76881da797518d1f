"""What a route may ask of the request it answers.

Knows where an application keeps its model; knows nothing of what is done with it.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.served_model import ServedModel


def served_model(request: Request) -> ServedModel:
    """The model this application serves."""
    model = request.app.state.model
    assert isinstance(model, ServedModel)
    return model


Model = Annotated[ServedModel, Depends(served_model)]
