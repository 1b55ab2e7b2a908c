"""What the author of a model writes: one class. Light to import, nothing but the standard library.

    class Sentiment(Handler):
        max_batch_size = 32
        example = {"text": "what a day"}

        def init(self, device):
            self.model = load(device)

        def preprocess(self, request):
            return request.json()["text"]

        def forward(self, batch):
            return self.model(batch)

        def postprocess(self, output):
            return {"label": output}

A class has either `inference` (one request at a time) or `forward` (a batch), with `preprocess` and
`postprocess` around it where they are needed. The class runs unchanged in a local worker process, as
a Ray replica and with --reload.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qsl

Buffer = bytes | memoryview
Pairs = Sequence[tuple[str, str]]

STREAMED_AS = ("sse", "raw")

LARGE = 32 << 10
"""Bytes from which a buffer travels beside a message, in shared memory, and not in it."""

MODEL_VARIABLE = "MDEPLOY_MODEL_DIR"
"""Tells workers where the model of their service lies."""


def sendable(buffer: Buffer) -> bytes | pickle.PickleBuffer:
    """A buffer as pickle may carry it between edge and worker: large ones out of band (PEP 574)."""
    return pickle.PickleBuffer(buffer) if len(buffer) >= LARGE else bytes(buffer)


class HTTPError(Exception):
    """The answer to a request is an error with this status (400 to 599); the message goes to the client.

    `param` names the part of the request that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"status {status}: an error is 400 to 599")
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})


class Params(dict[str, str]):
    """Names and values of a query or form: the last value of a name, and all of them by `getlist`."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = tuple(pairs)
        super().__init__(self._pairs)

    def getlist(self, name: str) -> list[str]:
        """Every value of a name, in the order of the request."""
        return [value for key, value in self._pairs if key == name]

    def __reduce__(self) -> Any:
        return Params, (self._pairs,)


class Headers(Mapping[str, str]):
    """Headers of a request; names are found in any spelling."""

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        self.raw = tuple(pairs)
        self._values = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.raw}

    def __getitem__(self, name: str) -> str:
        return self._values[name.lower()]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Headers({self._values!r})"

    def __reduce__(self) -> Any:
        return Headers, (self.raw,)


class File:
    """An uploaded file: its field in the form, its name and media type as the client gave them, its content."""

    __slots__ = ("_data", "buffer", "field", "name", "type")

    def __init__(self, field: str, name: str, type: str, buffer: Buffer) -> None:  # noqa: A002 the field's own word
        self.field, self.name, self.type, self.buffer = field, name, type, buffer
        self._data: bytes | None = None

    @property
    def data(self) -> bytes:
        """The content as bytes; `buffer` is the same without a copy."""
        if self._data is None:
            self._data = self.buffer if isinstance(self.buffer, bytes) else bytes(self.buffer)
        return self._data

    def open(self) -> io.BytesIO:
        """The content as a binary file."""
        return io.BytesIO(self.data)

    def __repr__(self) -> str:
        return f"File(field={self.field!r}, name={self.name!r}, type={self.type!r}, {len(self.buffer)} bytes)"


class Request:
    """One HTTP request. What takes work (query, headers, JSON) is done when it is asked for."""

    __slots__ = (
        "_body",
        "_data",
        "_files",
        "_form",
        "_headers",
        "_json",
        "_query",
        "_raw_headers",
        "_raw_query",
        "buffer",
        "id",
        "method",
        "path",
    )

    def __init__(
        self,
        method: str = "POST",
        path: str = "/",
        query: bytes = b"",
        headers: Sequence[tuple[bytes, bytes]] = (),
        body: Buffer = b"",
        form: Pairs = (),
        files: Sequence[File] = (),
        id: str = "",  # noqa: A002 what the header calls it
    ) -> None:
        self.method, self.path, self.buffer, self.id = method, path, body, id
        self._raw_query, self._raw_headers = query, headers
        self._form, self._files = form, files
        self._body: bytes | None = None
        self._query: Params | None = None
        self._headers: Headers | None = None
        self._json: tuple[Any] | None = None
        self._data: tuple[Any] | None = None

    @property
    def body(self) -> bytes:
        """The raw body (empty for multipart, which is taken apart already); `buffer` is the same without a copy."""
        if self._body is None:
            self._body = self.buffer if isinstance(self.buffer, bytes) else bytes(self.buffer)
        return self._body

    @property
    def query(self) -> Params:
        """The query string, percent-decoded."""
        if self._query is None:
            text = self._raw_query.decode("latin-1")
            self._query = Params(parse_qsl(text, keep_blank_values=True))
        return self._query

    @property
    def headers(self) -> Headers:
        """All headers."""
        if self._headers is None:
            self._headers = Headers(self._raw_headers)
        return self._headers

    @property
    def form(self) -> Params:
        """Text fields of a form (urlencoded or multipart)."""
        return Params(self._form)

    @property
    def files(self) -> dict[str, File]:
        """Uploaded files by field; the last one where a field has several (see `filelist`)."""
        return {file.field: file for file in self._files}

    def filelist(self, field: str) -> list[File]:
        """Every file of a field, in the order of the request."""
        return [file for file in self._files if file.field == field]

    def json(self) -> Any:
        """The body as JSON. Raises HTTPError 400 for what is none."""
        if self._json is None:
            self._json = (_parsed(self.body),)
        return self._json[0]

    @property
    def data(self) -> Any:
        """The JSON body as `Handler.body` made it: an instance of that type, checked."""
        return self._data[0] if self._data else self.json()

    def accept(self, data: Any) -> None:
        """Remember the checked body."""
        self._data = (data,)

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.method} {self.path}, {len(self.buffer)} bytes>"

    def __reduce__(self) -> Any:
        files = tuple((f.field, f.name, f.type, sendable(f.buffer)) for f in self._files)
        raw = (self.method, self.path, self._raw_query, self._raw_headers, sendable(self.buffer), tuple(self._form))
        return _request, (*raw, files, self.id)


def _request(  # pickle calls with positions only
    method: str, path: str, query: bytes, headers: Any, body: Buffer, form: Pairs, files: Any, id_: str
) -> Request:
    return Request(method, path, query, headers, body, form, [File(*file) for file in files], id_)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


def _parsed(body: bytes) -> Any:
    if not body:
        raise HTTPError(400, "the body is empty, JSON is expected", code="invalid_json")
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise HTTPError(400, f"the body is no JSON: {why}", code="invalid_json") from error


class Response:
    """An answer with a status, media type or headers of its own.

    A plain return value does for most: bytes are sent as they are (application/octet-stream), everything else as
    JSON.
    """

    __slots__ = ("content", "headers", "media_type", "status")

    def __init__(
        self,
        content: Any = b"",
        status: int = 200,
        media_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.content, self.status, self.media_type, self.headers = content, status, media_type, dict(headers or {})


class Handler:
    """Base of a model's class. Class attributes are its defaults; recipe and command line win over them."""

    name: ClassVar[str | None] = None
    """What it is called; the class's name in lower case where it is None."""

    path: ClassVar[str | None] = None
    """Its URL path; `/<name>` where it is None."""

    methods: ClassVar[Sequence[str]] = ("GET", "POST")

    max_batch_size: ClassVar[int] = 1
    """Items that `forward` gets at once, at most."""

    max_batch_cost: float | None = None
    """Sum of `cost` over a batch, at most; an item that costs more goes alone. `init` may set what it measured."""

    max_wait_ms: ClassVar[float] = 0
    """How long an idle worker waits for a fuller batch. Under load batches fill by themselves."""

    timeout: ClassVar[float] = 60
    """Seconds a request may take, queue included, before it is answered 504. A worker that is busy with one batch
    for longer is killed and replaced."""

    queue_size: ClassVar[int] = 256
    """Requests that may wait for a worker; one more is answered 503 with Retry-After."""

    workers_per_device: ClassVar[int] = 1

    example: ClassVar[Any] = None
    """A request for warm-up and for /ready: a JSON value, bytes or a Request. None: neither asks the model."""

    body: ClassVar[Any] = None
    """What the JSON body looks like, for checks and /docs: a type pydantic understands, or a JSON Schema (a dict)."""

    result: ClassVar[Any] = None
    """What the JSON answer looks like, for /docs: as `body`."""

    errors: ClassVar[Mapping[type[BaseException], int]] = {}
    """Statuses for exceptions that are not our HTTPError; their text goes to the client."""

    responses: ClassVar[Mapping[int, str]] = {}
    """Further statuses it answers with, for /docs: {404: "no such voice"}."""

    facts: Mapping[str, Any] = {}
    """What `init` found out about device and model, for /health; plain values."""

    streamed_as: ClassVar[Literal["sse", "raw"]] = "sse"
    """How the values of a generator reach the client: server-sent events, or bytes as they come."""

    @property
    def model_dir(self) -> Path:
        """Directory of the model that the service names (--model, or `model` of its recipe).

        Raises RuntimeError where it names none.
        """
        found = os.environ.get(MODEL_VARIABLE)
        if not found:
            raise RuntimeError("this handler needs a model: mdeploy serve app … --model ID|DIR")
        return Path(found)

    def init(self, device: str) -> None:
        """Load the model onto `device`: cuda:0 (each worker sees only its own GPU) or cpu."""

    def close(self) -> None:
        """Let go of what `init` took; called when the worker is told to end."""

    def inference(self, request: Request) -> Any:
        """One request, one answer; a generator streams. Write this or `forward`."""
        raise NotImplementedError

    def preprocess(self, request: Request) -> Any:
        """One request to one item of a batch. ValueError is the client's fault (400)."""
        return request.json()

    def forward(self, batch: list[Any]) -> Sequence[Any]:
        """A batch of items to as many outputs, in the same order. Write this or `inference`."""
        raise NotImplementedError

    def postprocess(self, output: Any) -> Any:
        """One output to one answer."""
        return output

    def cost(self, item: Any) -> float:
        """What an item counts against `max_batch_cost`: tokens, pixels, frames."""
        return 1.0
