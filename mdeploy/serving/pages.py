"""The page at `/`, and the one shape of errors for routes that FastAPI serves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, RedirectResponse, Response

from mdeploy.serving import problem
from mdeploy.serving.backend import OverloadedError
from mdeploy.serving.handler import HTTPError

if TYPE_CHECKING:
    from fastapi import FastAPI


class RefusedError(HTTPException):
    """An HTTPError on its way through FastAPI, which would make a 400 of any other exception while it reads a body."""

    def __init__(self, error: HTTPError) -> None:
        super().__init__(error.status, error.message, error.headers)
        self.code = error.code or ""


def refusing(receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """The same `receive`, its errors such that FastAPI lets them through."""

    async def through() -> Any:
        try:
            return await receive()
        except HTTPError as error:
            raise RefusedError(error) from error

    return through


def add_index(app: FastAPI, index: Path | None) -> None:
    """The page at `/`; nothing else of its directory is served. Without one, `/` leads to the documentation."""

    async def page() -> Response:
        if index is not None and index.is_file():
            return FileResponse(index, media_type="text/html; charset=utf-8", headers={"cache-control": "no-cache"})
        return RedirectResponse("docs")

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)


def add_error_handlers(app: FastAPI) -> None:
    """Every error leaves a route in OpenAI's shape."""
    from fastapi.exceptions import RequestValidationError

    async def http(request: Any, error: Any) -> Response:
        return _response(error.status_code, str(error.detail), getattr(error, "code", ""), error.headers)

    async def ours(request: Any, error: Exception) -> Response:
        known = problem.known(error)
        assert known is not None
        return _response(known.status, str(known), known.code or "", known.headers, known.param)

    async def invalid(request: Any, error: Any) -> Response:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return _response(422, wrong)

    async def internal(request: Any, error: Exception) -> Response:
        return _response(500, "internal error; the service's log says why")

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(HTTPError, ours)
    app.add_exception_handler(OverloadedError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, internal)


def _response(
    status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None, param: str | None = None
) -> Response:
    body = problem.document(status, message, code, param)
    return Response(body, status, headers, media_type="application/json")
