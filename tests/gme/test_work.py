from __future__ import annotations

import random
from typing import Any

import pytest

from mdeploy.apps.gme import work
from mdeploy.apps.gme.work import Input, Picture


def picture(height: int, width: int) -> Picture:
    return Picture(height, width, random.Random(height * width).randbytes(height * width * 3))


def plain(inputs: Any) -> list[Any]:
    return [
        (list(each.ids), each.picture and (each.picture.height, each.picture.width, bytes(each.picture.pixels)))
        for each in inputs
    ]


def test_what_is_packed_is_unpacked() -> None:
    inputs = [
        Input([1, 2, 3]),
        Input([7], picture(28, 56)),
        Input([9] * 400),
        Input([1, 4_000_000_000], picture(56, 28)),
    ]
    found = work.unpack(work.pack(inputs, 17))
    assert (found.dim, found.tokens, plain(found.inputs)) == (17, 406, plain(inputs))
    assert plain(work.unpack(work.pack(inputs[:1])).inputs) == plain(inputs[:1])


def test_a_picture_alone() -> None:
    one = picture(28, 56)
    found = work.picture(work.pack_picture(28, 56, bytes(one.pixels)))
    assert plain([Input([], found)]) == plain([Input([], one)])


def test_what_is_cut_off_is_noticed() -> None:
    body = work.pack([Input([1, 2], picture(28, 28)), Input([3])])
    for size in range(0, len(body), 7):
        with pytest.raises(ValueError):
            work.unpack(body[:size])
    with pytest.raises(ValueError, match="cut off"):
        work.unpack(body + b"x")
    answer = work.pack_picture(28, 28, bytes(28 * 28 * 3))
    for wrong in (b"", answer[:5], answer[:-1], answer + b"x"):
        with pytest.raises(ValueError, match=r"no picture|cut off"):
            work.picture(wrong)
