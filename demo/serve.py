"""The API without a page."""

import socket
from collections.abc import Sequence

import uvicorn
from fastapi import APIRouter, FastAPI

from demo.guard import middleware
from mllm.common.errors import UserError


def serve(api: APIRouter, *, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> None:
    """Serves until interrupted. Raises `UserError` when the port is taken."""
    app = build_server(api, hosts={host.lower(), *(name.lower() for name in allowed_hosts)})
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UserError(f"Cannot serve on {host} port {port}: {error} Give another one with --port.") from error
        print(f"Serving http://{host}:{listener.getsockname()[1]}/v1 (Ctrl+C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def build_server(api: APIRouter, *, hosts: set[str]) -> FastAPI:
    """What answers programs, behind the same door as the page."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=middleware(hosts=hosts))
    app.include_router(api)
    return app
