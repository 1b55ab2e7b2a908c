"""Texts as arrays: nothing is lost, swapped or cut on the way to the model and back."""

from __future__ import annotations

import numpy as np
import pytest

from mdeploy.apps.embed import rows, work

TEXTS = [work.Tokens([7, 8, 9]), work.Tokens([1]), work.Tokens([4, 5, 6, 2], second=2), work.Tokens([3, 3])]


def lists(texts: rows.Texts) -> list[list[int]]:
    """Each text's ids."""
    return [part.tolist() for part in np.split(texts.ids, np.cumsum(texts.lengths)[:-1])]


def test_packed_work_is_read_back() -> None:
    found = rows.unpack(memoryview(work.pack(TEXTS, 32)))
    assert (found.dim, found.tokens, len(found)) == (32, 10, 4)
    assert lists(found) == [list(text.ids) for text in TEXTS]
    assert found.seconds.tolist() == [0, 0, 2, 0]


@pytest.mark.parametrize("body", [b"", b"12345678901", work.pack([]), work.pack(TEXTS)[:-4], work.pack(TEXTS) + b"1234",
                                  work.pack([work.Tokens([])])])  # fmt: skip
def test_what_is_no_work_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="packed texts"):
        rows.unpack(body)


def test_texts_are_put_in_another_order() -> None:
    found = rows.taken(rows.unpack(work.pack(TEXTS)), np.array([2, 0, 3, 1]))
    assert lists(found) == [[4, 5, 6, 2], [7, 8, 9], [3, 3], [1]]
    assert found.seconds.tolist() == [2, 0, 0, 0]


def test_rows_hold_what_they_may_and_long_texts_go_alone() -> None:
    texts = rows.unpack(work.pack(TEXTS))
    assert [lists(row) for row in rows.cut(texts, 4)] == [[[7, 8, 9], [1]], [[4, 5, 6, 2]], [[3, 3]]]
    assert [len(row) for row in rows.cut(texts, 1)] == [1, 1, 1, 1]
    assert [len(row) for row in rows.cut(texts, 1e9)] == [4]


def test_padded_rows_count_their_padding() -> None:
    texts = rows.taken(rows.unpack(work.pack(TEXTS)), np.array([1, 3, 0, 2]))
    assert [lists(row) for row in rows.cut_padded(texts, 4)] == [[[1], [3, 3]], [[7, 8, 9]], [[4, 5, 6, 2]]]


def test_several_requests_become_one() -> None:
    one, other = rows.unpack(work.pack(TEXTS[:2])), rows.unpack(work.pack(TEXTS[2:]))
    assert lists(rows.joined([one, other])) == [list(text.ids) for text in TEXTS]


def test_second_texts_have_type_one() -> None:
    assert rows.types(rows.unpack(work.pack(TEXTS))).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0]
