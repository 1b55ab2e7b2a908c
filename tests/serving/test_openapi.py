"""What a service says of handlers: their schemas stand with those of the document, examples can be sent again."""

from __future__ import annotations

import base64
from typing import Any

from mdeploy.serving import openapi
from mdeploy.serving.handler import File, Request
from mdeploy.serving.info import HandlerInfo

BODY = {
    "type": "object",
    "properties": {"point": {"$ref": "#/$defs/Point"}, "self": {"$ref": "#"}},
    "$defs": {"Point": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Point"}}}},
}


def _described(*infos: HandlerInfo) -> dict[str, Any]:
    return openapi.describe({"openapi": "3.1.0"}, infos, {}, has_keys=False)


def test_definitions_of_two_handlers_do_not_meet() -> None:
    document = _described(HandlerInfo("a", "/a", body=BODY), HandlerInfo("b", "/b", body=BODY, result=BODY))
    schemas = document["components"]["schemas"]
    assert set(schemas) == {
        *("Error", "a.body", "a.body.Point", "b.body", "b.body.Point", "b.result", "b.result.Point"),
    }
    assert schemas["b.body"]["properties"] == {
        "point": {"$ref": "#/components/schemas/b.body.Point"},
        "self": {"$ref": "#/components/schemas/b.body"},
    }
    assert "$defs" in BODY


def test_own_statuses_and_ours_may_be_the_same() -> None:
    info = HandlerInfo("a", "/a", responses={404: "no such voice", 400: "bad voice"})
    responses = _described(info)["paths"]["/a"]["post"]["responses"]
    assert responses["404"] == {"description": "no such voice"}
    assert responses["400"]["description"] == "bad voice"
    assert responses["413"] == {"$ref": "#/components/responses/413"}


def test_an_image_is_offered_as_a_body_and_as_a_form() -> None:
    example = Request(headers=[(b"content-type", b"image/png")], body=b"\x89PNG")
    operation = _described(HandlerInfo("a", "/a", example=example))["paths"]["/a"]["post"]
    content = operation["requestBody"]["content"]
    assert set(content) == {"image/png", "multipart/form-data"}
    assert content["multipart/form-data"]["schema"]["properties"] == {"image": {"type": "string", "format": "binary"}}
    assert operation["x-mdeploy-example"]["content_type"] == "image/png"


def test_an_example_that_is_a_form_can_be_sent_again() -> None:
    example = Request(form=[("prompt", "你")], files=[File("image", "a.png", "image/png", b"\x89PNG")])
    encoded = openapi.encoded_example(HandlerInfo("a", "/a", example=example))
    assert encoded is not None
    body = base64.b64decode(encoded["body_base64"])
    assert encoded["content_type"].startswith("multipart/form-data; boundary=")
    assert 'name="prompt"\r\n\r\n你\r\n'.encode() in body
    assert b'filename="a.png"\r\nContent-Type: image/png\r\n\r\n\x89PNG\r\n' in body


def test_a_large_example_is_left_out() -> None:
    assert openapi.encoded_example(HandlerInfo("a", "/a", example=Request(body=bytes(2 << 20)))) is None
    assert openapi.encoded_example(HandlerInfo("a", "/a")) is None
