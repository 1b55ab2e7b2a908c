"""What a service says of itself: /openapi.json, and /docs and /redoc without a line from the internet.

FastAPI describes its own routes; handlers, which do not go through its machinery, are described here from what their
classes say. Every operation declares the errors that the edge itself can answer with.
"""

from __future__ import annotations

import base64
import copy
import json
import secrets
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from mdeploy.serving.handler import Request
from mdeploy.serving.info import HandlerInfo

ASSETS = "/docs-assets"
PAGES = ("/docs", "/redoc", "/openapi.json")

_LARGEST_EXAMPLE = 1 << 20

_OPERATIONS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")

_MEANINGS = {
    400: "The request is malformed",
    401: "The API key is missing or wrong",
    408: "The request did not arrive in time",
    413: "The body is too large",
    414: "The URL is too long",
    415: "The content encoding is not supported",
    422: "The input does not fit",
    431: "The headers are too large",
    500: "The handler failed",
    503: "Overloaded, or no worker lives; see Retry-After",
    504: "No answer within the deadline",
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_TEXT, _BINARY = {"type": "string"}, {"type": "string", "format": "binary"}
_ERROR_REF = {"$ref": "#/components/schemas/Error"}


def add_docs(app: FastAPI) -> None:
    """The pages that show the document, from files of an installed package."""
    files = Path(str(resources.files("fastapi_offline"))) / "static"
    app.mount(ASSETS, StaticFiles(directory=files), name="docs-assets")

    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url=f".{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f".{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f".{ASSETS}/favicon.png",
        )

    async def redoc() -> HTMLResponse:
        return get_redoc_html(
            openapi_url="openapi.json",
            title=app.title,
            redoc_js_url=f".{ASSETS}/redoc.standalone.js",
            redoc_favicon_url=f".{ASSETS}/favicon.png",
            with_google_fonts=False,
        )

    async def document() -> Mapping[str, Any]:
        return app.openapi()

    app.add_api_route("/openapi.json", document, include_in_schema=False)
    app.add_api_route("/docs", docs, include_in_schema=False)
    app.add_api_route("/redoc", redoc, include_in_schema=False)


def is_page(path: str) -> bool:
    """Whether a browser asks for the documentation or for what belongs to it."""
    return path in PAGES or path.startswith(ASSETS + "/")


def describe(
    document: dict[str, Any], infos: Iterable[HandlerInfo], others: Mapping[str, Any], *, has_keys: bool
) -> dict[str, Any]:
    """Add handlers, `others` (paths that are described already), our own endpoints and errors to what FastAPI wrote."""
    paths = document.setdefault("paths", {})
    paths.update(copy.deepcopy(dict(others)))
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["Error"] = _ERROR
    meanings = {status: text for status, text in _MEANINGS.items() if has_keys or status != 401}
    components["responses"] = {
        str(status): {"description": text, "content": {"application/json": {"schema": _ERROR_REF}}}
        for status, text in meanings.items()
    }
    for info in infos:
        for path in (info.path, *info.aliases):
            paths[path] = _handler(info, path, schemas)
    paths.update(_service_paths())
    for path, item in paths.items():
        for method in set(item) & set(_OPERATIONS):
            _add_errors(item[method].setdefault("responses", {}), meanings)
            if has_keys and path != "/health":
                item[method]["security"] = [{"bearer": []}]
    if has_keys:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return document


def _add_errors(responses: dict[str, Any], statuses: Iterable[int]) -> None:
    """What an operation does not say itself it may still answer with."""
    for status in statuses:
        response = responses.setdefault(str(status), {"$ref": f"#/components/responses/{status}"})
        if "$ref" not in response and status != 422:
            kinds = response.setdefault("content", {}).setdefault("application/json", {})
            known = kinds.get("schema")
            kinds["schema"] = {"anyOf": [known, _ERROR_REF]} if known else _ERROR_REF


def _service_paths() -> dict[str, Any]:
    def item(summary: str, kind: str, methods: Iterable[str], statuses: Iterable[int] = ()) -> dict[str, Any]:
        schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
        response = {"description": summary, "content": {kind: {"schema": schema}}}
        responses = {str(status): response for status in (200, *statuses)}
        operation = {"summary": summary, "tags": ["service"], "responses": responses}
        return {method: copy.deepcopy(operation) for method in methods}

    both = ("get", "post")
    return {
        "/health": item("Whether every handler has a worker that lives", "application/json", both, (503,)),
        "/ready": item("Whether every model answered lately", "application/json", both, (422, 503)),
        "/metrics": item("Figures for Prometheus", "text/plain", ("get",)),
    }


def _handler(info: HandlerInfo, path: str, schemas: dict[str, Any]) -> dict[str, Any]:
    return {m.lower(): _operation(info, path, m, schemas) for m in info.methods}


def _operation(info: HandlerInfo, path: str, method: str, schemas: dict[str, Any]) -> dict[str, Any]:
    summary, _, rest = info.doc.strip().partition("\n")
    operation: dict[str, Any] = {
        "summary": summary or info.name,
        "description": rest.strip(),
        "operationId": f"{method.lower()}{path.replace('/', '_')}",
        "tags": [info.name],
        "x-mdeploy-handler": info.name,
        "responses": {"200": {"description": "The answer", "content": _answer(info, schemas)}},
    }
    for status, meaning in info.responses.items():
        operation["responses"][str(status)] = {"description": meaning}
    if method not in ("GET", "HEAD", "DELETE"):
        operation["requestBody"] = _request_body(info, schemas)
        example = encoded_example(info)
        if example:
            operation["x-mdeploy-example"] = example
    return operation


def _answer(info: HandlerInfo, schemas: dict[str, Any]) -> dict[str, Any]:
    if info.streams:
        return {"text/event-stream" if info.streamed_as == "sse" else "*/*": {}}
    if info.result is None:
        return {"*/*": {}}
    return {"application/json": {"schema": _lifted(info.result, f"{info.name}.result", schemas)}}


def _request_body(info: HandlerInfo, schemas: dict[str, Any]) -> dict[str, Any]:
    example = _json_example(info.example)
    if info.body is not None:
        content: dict[str, Any] = {"application/json": {"schema": _lifted(info.body, f"{info.name}.body", schemas)}}
    elif info.example is None:
        content = {"application/json": {}, "application/octet-stream": {}}
    elif example is not None:
        content = {"application/json": {}}
    else:
        content = _uploads(info.example)
    if example is not None:
        content["application/json"]["example"] = example[0]
    return {"required": info.body is not None, "content": content}


def _uploads(example: Request) -> dict[str, Any]:
    """Media types of a handler that takes a file: as the body, as in its example, or in a form.

    The fields of the form are those of the example; a plain image is guessed to be called `image`.
    """
    kind = example.headers.get("content-type", "application/octet-stream")
    if example.files or example.form:
        fields = {**dict.fromkeys(example.form, _TEXT), **dict.fromkeys(example.files, _BINARY)}
        return {"multipart/form-data": {"schema": {"type": "object", "properties": fields}}}
    form = {"type": "object", "properties": {kind.partition("/")[0]: _BINARY}}
    return {"multipart/form-data": {"schema": form}, kind: {"schema": _BINARY}}


def _lifted(schema: Mapping[str, Any], name: str, schemas: dict[str, Any]) -> dict[str, Any]:
    """A schema of its own with its definitions moved to where those of the document stand."""
    own = dict(schema)
    for key in own.pop("$defs", {}):
        schemas[f"{name}.{key}"] = _pointing(schema["$defs"][key], name)
    schemas[name] = _pointing(own, name)
    return {"$ref": f"#/components/schemas/{name}"}


def _pointing(value: Any, name: str) -> Any:
    """The same with `#/$defs/X` rewritten."""
    if isinstance(value, Mapping):
        return {key: _ref(item, name) if key == "$ref" else _pointing(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pointing(item, name) for item in value]
    return value


def _ref(ref: Any, name: str) -> Any:
    if not isinstance(ref, str) or not ref.startswith("#"):
        return ref
    return f"#/components/schemas/{name}" + ref[1:].replace("/$defs/", ".", 1)


# examples


def _json_example(example: Request | None) -> tuple[Any] | None:
    """The example where it is JSON, in a tuple, because null is JSON as well."""
    if example is None or "json" not in example.headers.get("content-type", "json"):
        return None
    try:
        return (json.loads(example.body),)
    except ValueError:
        return None


def encoded_example(info: HandlerInfo) -> dict[str, str] | None:
    """The example as it travels: what a load tester posts. None where there is none, or a large one."""
    example = info.example
    if example is None:
        return None
    kind, body = _wire(example)
    if len(body) > _LARGEST_EXAMPLE:
        return None
    return {
        "method": example.method,
        "path": info.path,
        "content_type": kind,
        "body_base64": base64.b64encode(body).decode(),
    }


def _wire(example: Request) -> tuple[str, bytes]:
    if example.form or example.files:
        return _as_multipart(example)
    default = "application/json" if _json_example(example) else "application/octet-stream"
    return example.headers.get("content-type", default), example.body


def _as_multipart(example: Request) -> tuple[str, bytes]:
    boundary = secrets.token_hex(16)
    parts = [(f'name="{name}"', "", value.encode()) for name, value in example.form.items()]
    parts += [(f'name="{f.field}"; filename="{f.name}"', f.type, f.data) for f in example.files.values()]
    body = bytearray()
    for disposition, kind, data in parts:
        typed = f"\r\nContent-Type: {kind}" if kind else ""
        body += (
            f"--{boundary}\r\nContent-Disposition: form-data; {disposition}{typed}\r\n\r\n".encode() + data + b"\r\n"
        )
    body += f"--{boundary}--\r\n".encode()
    return f"multipart/form-data; boundary={boundary}", bytes(body)
