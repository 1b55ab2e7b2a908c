"""How workers tell a controller that they are there: POST /workers, before everything else the edge answers.

    {"address": "http://HOST:PORT", "name": "custom", "state": "ready" | "leaving"}     Authorization: Bearer TOKEN

Whoever joins gets the requests of clients, so nobody may without the token; a client's API key is not enough.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any

from mdeploy.compat import address
from mdeploy.compat.fleet import Fleet
from mdeploy.serving import problem

PATH = "/workers"

_MAX_BYTES = 16 * 1024

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Registrar:
    """An ASGI app in front of the edge. `joined` is called after each heartbeat of a worker that is not in rotation."""

    def __init__(self, app: App, fleet: Fleet, names: Container[str], token: str, joined: Callable[[], None]) -> None:
        self._app, self._fleet, self._names, self._joined = app, fleet, names, joined
        self._digest = hashlib.sha256(token.encode()).digest()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] == "http" and scope["path"] == PATH:
            status, body = await self._answer(scope, receive)
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            headers += [(b"allow", b"POST")] if status == 405 else []
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Message, receive: Receive) -> tuple[int, bytes]:
        if scope["method"] != "POST":
            return 405, problem.document(405, "workers join by POST")
        if not self._may_join(dict(scope["headers"]).get(b"authorization", b"")):
            return 401, problem.document(401, "this needs the controller's token")
        body = await _body(receive)
        if body is None:
            return 413, problem.document(413, f"at most {_MAX_BYTES} bytes")
        try:
            return 200, self._take(json.loads(body))
        except (ValueError, TypeError, RecursionError) as error:
            return 400, problem.document(400, str(error))

    def _may_join(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._digest)
        return scheme.lower() == b"bearer" and same

    def _take(self, document: Any) -> bytes:
        """Raises ValueError for what is no message of a worker."""
        fields = ("address", "name", "state")
        if not isinstance(document, dict) or not all(isinstance(document.get(field), str) for field in fields):
            raise ValueError(f"expected a JSON object with the texts {', '.join(fields)}")
        where = address.checked(document["address"])
        if document["name"] not in self._names:
            raise ValueError(f"there is no model {document['name']!r} here")
        if document["state"] == "leaving":
            self._fleet.left(where)
        elif document["state"] != "ready":
            raise ValueError("state must be ready or leaving")
        elif not self._fleet.heard(where, document["name"]).is_up:
            self._joined()
        return json.dumps({"workers": len(self._fleet)}).encode()


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None for one that is too large, or that broke off."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.disconnect" or len(body) > _MAX_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(body)
