"""Routers: from a token to one logit for each expert. One file each; the file's name is the router's name.

A new router is a new file here that holds one subclass of `Router`; `find_router("name")` finds it by that name.
"""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches

from mllm.common.errors import UserError
from mllm.routing.routers.base import Router, RouterSpec

ROUTERS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))


def find_router(name: str) -> type[Router]:
    """The router class in the file of that name.

    Raises UserError for a name that is none of `ROUTERS`, with the nearest one.
    """
    if name not in ROUTERS:
        near = get_close_matches(name, ROUTERS, n=1)
        question = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(f"router={name!r} is not known. {question}Choose one of {', '.join(ROUTERS)}.")
    module = importlib.import_module(f"{__name__}.{name}")
    (router,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Router) and value.__module__ == module.__name__
    )
    return router


__all__ = ["ROUTERS", "Router", "RouterSpec", "find_router"]
