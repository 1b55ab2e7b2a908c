from __future__ import annotations

import base64
from typing import Any

import pytest

from mdeploy.apps.gme import items
from mdeploy.apps.gme.items import Item
from mdeploy.serving.handler import HTTPError

DATA = base64.b64encode(b"picture").decode()
URI = f"data:image/png;base64,{DATA}"
IMAGE = {"type": "image_url", "image_url": {"url": URI}}


def short(item: Item) -> tuple[str, str, str | None]:
    return item.text, bytes(item.image.data).decode() if item.image else "", item.instruction


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", ("a", "", None)),
        ({"text": "a"}, ("a", "", None)),
        ({"image": URI}, ("", DATA, None)),
        ({"image": {"url": URI}, "text": "a"}, ("a", DATA, None)),
        ({"image": f"DATA:;BASE64,{DATA}", "text": None}, ("", DATA, None)),
        (IMAGE, ("", DATA, None)),
        ({"type": "image_url", "image_url": URI}, ("", DATA, None)),
        ({"type": "text", "text": "a"}, ("a", "", None)),
        ([{"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"}], ("ab", DATA, None)),
        ({"role": "user", "content": "a"}, ("a", "", None)),
        ({"role": "user", "content": [IMAGE, {"type": "text", "text": "a"}]}, ("a", DATA, None)),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, ("", DATA, None)),
        ({"messages": [{"role": "system", "content": "do"}, {"role": "user", "content": "a"}]}, ("a", "", "do")),
    ],
)
def test_shapes(value: Any, expected: Any) -> None:
    assert short(items.parse(value, "input")) == expected


@pytest.mark.parametrize(
    ("value", "param", "code"),
    [
        ("", "input[3]", "empty_input"),
        ({}, "input[3]", "empty_input"),
        ({"text": ""}, "input[3]", "empty_input"),
        ([{"type": "text", "text": ""}], "input[3]", "empty_input"),
        (None, "input[3]", "invalid_type"),
        (True, "input[3]", "invalid_type"),
        ([], "input[3]", "invalid_type"),
        ([["a"]], "input[3]", "invalid_type"),
        ([1, 2], "input[3]", "token_ids_not_supported"),
        ({"text": 5}, "input[3].text", "invalid_type"),
        ({"image": 5}, "input[3].image", "invalid_type"),
        ({"image": {}}, "input[3].image", "invalid_type"),
        ({"image": ""}, "input[3].image", "invalid_image"),
        ({"img": URI}, "input[3]", "invalid_value"),
        ({"type": "audio"}, "input[3]", "invalid_type"),
        ([IMAGE, 5], "input[3][1]", "invalid_type"),
        ([IMAGE, IMAGE], "input[3]", "invalid_value"),
        ({"role": "user", "content": None}, "input[3].content", "invalid_type"),
        ({"role": "user", "content": "a", "name": "x"}, "input[3]", "invalid_value"),
        ({"messages": "a"}, "input[3].messages", "invalid_type"),
        ({"messages": []}, "input[3].messages", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "input[3].messages", "invalid_value"),
        (
            {"messages": [{"role": "system", "content": [IMAGE]}, {"role": "user", "content": "a"}]},
            "input[3].messages[0]",
            "invalid_value",
        ),
    ],
)
def test_refusals_name_the_place(value: Any, param: str, code: str) -> None:
    with pytest.raises(HTTPError) as caught:
        items.parse(value, "input[3]")
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/a.png", "https://example.com/a.png", "http://169.254.169.254/latest/meta-data", "ftp://x/a",
        "file:///etc/passwd", "/etc/passwd", "data:image/png,abc", "data:image/png;base64", DATA,
        f"data:{'x' * 300};base64,{DATA}", f"http://x/data:;base64,{DATA}",
    ],
)  # fmt: skip
def test_nothing_is_fetched(address: str) -> None:
    with pytest.raises(HTTPError, match="addresses and paths are not fetched") as caught:
        items.parse({"image": address}, "input")
    assert caught.value.status == 400
