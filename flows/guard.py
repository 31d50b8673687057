"""The servers of `camera serve` behind a guard, as ASGI applications: who asks must know the project's secret.

A server on loopback is open to every user of the machine, and to every page in a browser there: a page may send what needs no
answer, and under a name that resolves to 127.0.0.1 (DNS rebinding) read answers too. So each request must name a loopback host,
come from no other origin, and show the secret: of Prefect's API Prefect itself demands it, of MLflow the guard does.
"""

import base64
import binascii
import hmac
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

_LOOPBACK = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d+)?", re.IGNORECASE)
SECRET = "CAMERA_SERVE_SECRET"
"""The environment variable that gives `user:password` to a server of ours; arguments of processes are for all to read."""

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


class Guard:
    """An application that only those reach who may ask it."""

    def __init__(self, app: App, secret: str | None, open_paths: tuple[str, ...] = ()) -> None:
        """`secret` is `user:password`, for HTTP's basic authentication; None where the application asks itself.

        `open_paths` may be read without it: whether the server is up.
        """
        self._app = app
        self._secret = None if secret is None else secret.encode()
        self._open = open_paths

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        refused = self._refused(scope, headers)
        if refused is None:
            return await self._app(scope, receive, _unframed(send))
        status, why = refused
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": why})
        answer = [(b"content-type", b"text/plain; charset=utf-8")]
        if status is HTTPStatus.UNAUTHORIZED:
            answer.append((b"www-authenticate", b'Basic realm="camera serve", charset="UTF-8"'))
        await send({"type": "http.response.start", "status": int(status), "headers": answer})
        await send({"type": "http.response.body", "body": f"{why}\n".encode()})
        return None

    def _refused(self, scope: Message, headers: dict[str, str]) -> tuple[HTTPStatus, str] | None:
        host = headers.get("host", "")
        if not _LOOPBACK.fullmatch(host):
            return HTTPStatus.FORBIDDEN, "this server is asked for by a loopback address only"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return HTTPStatus.FORBIDDEN, "this server answers no page of another origin"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _follows_link(
            scope, headers
        ):
            return HTTPStatus.FORBIDDEN, "this server answers no page of another origin"
        if self._secret is None or (scope["type"] == "http" and scope["path"] in self._open):
            return None
        if not hmac.compare_digest(_given(headers.get("authorization", "")), self._secret):
            return HTTPStatus.UNAUTHORIZED, "`camera serve` says where user and password are"
        return None


def _follows_link(scope: Message, headers: dict[str, str]) -> bool:
    """Whether a person follows a link to a page of ours, which shows that page and tells the other nothing."""
    document = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return document and scope.get("method") == "GET"


def _given(authorization: str) -> bytes:
    scheme, _, credentials = authorization.partition(" ")
    try:
        return base64.b64decode(credentials, validate=True) if scheme.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        return b""


def _unframed(send: Any) -> Any:
    """Answers that no page of others can show inside itself."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value)
                for name, value in message.get("headers", ())
                if name.lower() != b"x-frame-options"
            ]
            message["headers"] = [*kept, (b"x-frame-options", b"DENY")]
        await send(message)

    return sent


def prefect_server() -> Guard:
    """Prefect's API and UI; for uvicorn's `--factory`. PREFECT_SERVER_API_AUTH_STRING must be set."""
    from prefect.server.api.server import create_app  # what `prefect server start` gives to uvicorn
    from prefect.settings import PREFECT_SERVER_API_AUTH_STRING

    assert PREFECT_SERVER_API_AUTH_STRING.value(), "an API that asks nobody is not started"
    return Guard(create_app(final=True), None)


def mlflow_server() -> Guard:
    """MLflow's API and UI over the store in MLFLOW_BACKEND_STORE_URI, a password and all; for uvicorn's `--factory`."""
    from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR

    # What `mlflow server` hands to uvicorn's workers. Its own options would show a database's password to all (`ps`).
    os.environ[BACKEND_STORE_URI_ENV_VAR] = os.environ["MLFLOW_BACKEND_STORE_URI"]
    os.environ[ARTIFACT_ROOT_ENV_VAR] = os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"]
    from mlflow.server.fastapi_app import app

    return Guard(app, os.environ[SECRET], ("/health",))
