"""Django's request and response as modelserve handlers know them, without Django.

What is here behaves as in Django's documentation of HttpRequest, QueryDict, UploadedFile, HttpResponse and
JsonResponse. A class may as well use Django's own responses: they are told by their attributes, not their type.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import urlencode

from mdeploy.serving import handler

T = TypeVar("T")


class MultiValueDictKeyError(KeyError):
    """A field that the request does not have."""

    def __str__(self) -> str:
        return f"the request has no {self.args[0]!r}"


class MultiValueDict(dict[str, T], Generic[T]):
    """Names with one or more values: `[]` and `get` give the last one, `getlist` all of them."""

    def __init__(self, pairs: Iterable[tuple[str, T]] = ()) -> None:
        self._lists: dict[str, list[T]] = {}
        for name, value in pairs:
            self._lists.setdefault(name, []).append(value)
        super().__init__({name: values[-1] for name, values in self._lists.items()})

    def __missing__(self, name: str) -> T:
        raise MultiValueDictKeyError(name)

    def getlist(self, name: str, default: list[T] | None = None) -> list[T]:
        """Every value of a name, in the order of the request."""
        return list(self._lists.get(name, default or []))

    def lists(self) -> Iterator[tuple[str, list[T]]]:
        """Names with all their values."""
        return iter((name, list(values)) for name, values in self._lists.items())

    def dict(self) -> dict[str, T]:
        """A plain dict of last values."""
        return {name: values[-1] for name, values in self._lists.items()}


class QueryDict(MultiValueDict[str]):
    """Text values of a query string or form."""

    def urlencode(self) -> str:
        """The query string again."""
        return urlencode([(name, value) for name, values in self._lists.items() for value in values])


class UploadedFile(io.BytesIO):
    """An uploaded file: a binary file in memory with its name, size and media type."""

    DEFAULT_CHUNK_SIZE: ClassVar[int] = 64 * 1024

    def __init__(self, file: handler.File) -> None:
        super().__init__(file.data)
        self.field_name, self.name = file.field, file.name
        self.content_type, self.size, self.charset = file.type, len(file.buffer), None

    @property
    def file(self) -> UploadedFile:
        """The file itself: Django wraps one, ours is one."""
        return self

    def open(self, mode: str | None = None) -> UploadedFile:
        """Back to the beginning."""
        self.seek(0)
        return self

    def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:
        """The content from its beginning, in pieces."""
        self.seek(0)
        while piece := self.read(chunk_size or self.DEFAULT_CHUNK_SIZE):
            yield piece

    def multiple_chunks(self, chunk_size: int | None = None) -> bool:
        """Whether `chunks` gives more than one piece."""
        return self.size > (chunk_size or self.DEFAULT_CHUNK_SIZE)

    def __bool__(self) -> bool:
        return bool(self.name)


class HttpHeaders(dict[str, str]):
    """Headers, found in any spelling; listed as `Content-Type`."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__({name.title(): value for name, value in headers.items()})

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.title().replace("_", "-"))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.title().replace("_", "-"))

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a header."""
        return super().get(name.title().replace("_", "-"), default)


class HttpRequest:
    """One request as a Django view sees it. A multipart `body` is empty: it is in POST and FILES already."""

    encoding = "utf-8"

    def __init__(self, request: handler.Request) -> None:
        self._request = request
        self.method, self.path = request.method, request.path
        self.path_info = request.path
        self._stream: io.BytesIO | None = None
        self._parts: dict[str, Any] = {}

    def _once(self, name: str, value: Any) -> Any:
        if name not in self._parts:
            self._parts[name] = value(self._request)
        return self._parts[name]

    @property
    def GET(self) -> QueryDict:  # noqa: N802 Django's name
        """The query string."""
        found: QueryDict = self._once("GET", lambda r: QueryDict((n, v) for n in r.query for v in r.query.getlist(n)))
        return found

    @property
    def POST(self) -> QueryDict:  # noqa: N802 Django's name
        """Text fields of a posted form; empty for other methods and bodies."""
        found: QueryDict = self._once("POST", lambda r: QueryDict(_fields(r) if r.method == "POST" else ()))
        return found

    @property
    def FILES(self) -> MultiValueDict[UploadedFile]:  # noqa: N802 Django's name
        """Files of a posted form, by field."""
        found: MultiValueDict[UploadedFile] = self._once("FILES", lambda r: MultiValueDict(_uploads(r)))
        return found

    @property
    def headers(self) -> HttpHeaders:
        """All headers."""
        found: HttpHeaders = self._once("headers", lambda r: HttpHeaders(r.headers))
        return found

    @property
    def META(self) -> dict[str, str]:  # noqa: N802 Django's name
        """Headers and request line under their CGI names."""
        found: dict[str, str] = self._once("META", lambda r: _meta(r, self.headers))
        return found

    @property
    def COOKIES(self) -> dict[str, str]:  # noqa: N802 Django's name
        """Cookies of the client."""
        found: dict[str, str] = self._once("COOKIES", lambda _: _cookies(self.headers.get("Cookie", "")))
        return found

    @property
    def body(self) -> bytes:
        """The raw body."""
        return self._request.body

    @property
    def content_type(self) -> str:
        """Media type of the body, without parameters."""
        return _media_type(self._request)

    @property
    def scheme(self) -> str:
        """What the proxy in front says it was, else http."""
        return str(self.headers.get("X-Forwarded-Proto", "http"))

    def is_secure(self) -> bool:
        """Whether it came over TLS."""
        return self.scheme == "https"

    def get_host(self) -> str:
        """Host and port that the client asked."""
        return str(self.headers.get("Host", ""))

    def get_full_path(self) -> str:
        """Path and query string."""
        query = self.GET.urlencode()
        return f"{self.path}?{query}" if query else self.path

    def read(self, size: int = -1) -> bytes:
        """The next part of the body."""
        self._stream = self._stream or io.BytesIO(self.body)
        return self._stream.read(size)

    def __repr__(self) -> str:
        return f"<HttpRequest: {self.method} {self.path!r}>"


def _media_type(request: handler.Request) -> str:
    return str(request.headers.get("content-type", "")).partition(";")[0].strip().lower()


def _fields(request: handler.Request) -> list[tuple[str, str]]:
    form = request.form
    return [(name, value) for name in form for value in form.getlist(name)]


def _uploads(request: handler.Request) -> list[tuple[str, UploadedFile]]:
    return [(file.field, UploadedFile(file)) for field in request.files for file in request.filelist(field)]


def _meta(request: handler.Request, headers: Mapping[str, str]) -> dict[str, str]:
    cgi = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if f"HTTP_{name}" in cgi:
            cgi[name] = cgi.pop(f"HTTP_{name}")
    query = urlencode([(name, value) for name in request.query for value in request.query.getlist(name)])
    return {"REQUEST_METHOD": request.method, "PATH_INFO": request.path, "QUERY_STRING": query, **cgi}


def _cookies(header: str) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header).items()}
    except CookieError:
        return {}


class HttpResponse:
    """An answer: text, bytes or an iterator of them, text/html where nothing else is said."""

    status_code = 200

    def __init__(
        self,
        content: Any = b"",
        content_type: str | None = None,
        status: int | None = None,
        reason: str | None = None,
        charset: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.charset = charset or "utf-8"
        self.headers = dict(headers or {})
        self.headers.setdefault("Content-Type", content_type or f"text/html; charset={self.charset}")
        self.status_code = self.status_code if status is None else int(status)
        self.reason_phrase = reason or ""
        self.content = content

    @property
    def content(self) -> bytes:
        """The body."""
        return self._content

    @content.setter
    def content(self, value: Any) -> None:
        one = isinstance(value, (str, bytes, bytearray, memoryview)) or not isinstance(value, Iterable)
        self._content = b"".join(_bytes(part, self.charset) for part in ([value] if one else value))

    def write(self, content: Any) -> None:
        """Append to the body."""
        self._content += _bytes(content, self.charset)

    def __getitem__(self, header: str) -> str:
        return self.headers[header]

    def __setitem__(self, header: str, value: str) -> None:
        self.headers[header] = str(value)


class JsonResponse(HttpResponse):
    """An answer in JSON. `safe` is Django's: only a dict may be sent unless it is False."""

    def __init__(
        self,
        data: Any,
        encoder: type[json.JSONEncoder] | None = None,
        safe: bool = True,
        json_dumps_params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if safe and not isinstance(data, dict):
            raise TypeError("only a dict may be sent as JSON: pass safe=False for others")
        kwargs.setdefault("content_type", "application/json")
        super().__init__(json.dumps(data, cls=encoder, **dict(json_dumps_params or {})), **kwargs)


class HttpResponseBadRequest(HttpResponse):
    """400: the request is wrong."""

    status_code = 400


class HttpResponseForbidden(HttpResponse):
    """403: not for this client."""

    status_code = 403


class HttpResponseNotFound(HttpResponse):
    """404: there is no such thing."""

    status_code = 404


class HttpResponseServerError(HttpResponse):
    """500: it went wrong here."""

    status_code = 500


class Http404(Exception):  # noqa: N818 Django's name
    """Raised for what is not there."""


def _bytes(value: Any, charset: str) -> bytes:
    return bytes(value) if isinstance(value, (bytes, bytearray, memoryview)) else str(value).encode(charset)


_RAISED = {"Http404": 404, "PermissionDenied": 403, "SuspiciousOperation": 400, "BadRequest": 400}
"""Exceptions that Django answers with a status of their own, by name: they may be Django's or ours."""


def refusal(error: Exception) -> handler.HTTPError | None:
    """The error answer for what Django's views may raise; None for an exception that means a fault of the model."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "MultiValueDictKeyError" in kinds:
        return handler.HTTPError(400, str(error), code="missing_field")
    status = next((status for name, status in _RAISED.items() if name in kinds), None)
    return handler.HTTPError(status, str(error) or HTTPStatus(status).phrase) if status else None


def answer(value: Any) -> Any:
    """What a view returned as our core takes it: Django's responses and ours become a Response, text is HTML."""
    if isinstance(value, str):
        return handler.Response(value.encode(), media_type="text/html; charset=utf-8")
    if isinstance(value, handler.Response) or not hasattr(value, "status_code"):
        return value
    headers = {name: text for name, text in _items(value.headers) if name.lower() != "content-length"}
    media_type = next((headers.pop(name) for name in list(headers) if name.lower() == "content-type"), None)
    return handler.Response(_content(value), value.status_code, media_type, headers)


def _items(headers: Any) -> list[tuple[str, str]]:
    return [(str(name), str(text)) for name, text in headers.items()]


def _content(response: Any) -> bytes:
    """A streaming response is collected: modelserve's controller did so too."""
    if getattr(response, "streaming", False):
        return b"".join(_bytes(part, "utf-8") for part in response.streaming_content)
    return bytes(response.content)
