"""Against plain transformers: prompts, pictures and vectors are the same, whatever the batch-mates."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.embed.served import Service
from tests.gme.given import INPUTS
from tests.gme.pictures import encoded, noise, uri

Found = dict[str, Any]


def test_vectors_are_those_of_transformers(reference: Found) -> None:
    assert len(reference["worst"]) == 12
    assert {name: worst for name, worst in reference["worst"].items() if not worst > 0.99999} == {}


def test_vectors_differ_so_that_this_says_something(reference: Found) -> None:
    vectors = np.array(reference["vectors"])
    likeness = vectors @ vectors.T - np.eye(len(vectors))
    assert likeness.max() < 0.99


def test_prompts_are_those_of_transformers(reference: Found) -> None:
    assert all(reference["prompts"]) and len(reference["prompts"]) == 7


def test_pictures_are_those_of_transformers(reference: Found) -> None:
    assert max(reference["pixels"]) < 1e-5
    assert reference["sizes"] == []


def test_the_check_at_start_notices_what_is_wrong(reference: Found) -> None:
    found = reference["choices"]
    assert (found["as it is"], found["packed is wrong"]) == ("packed", "padded")
    assert found["pictures are packed wrongly"] == "padded"
    assert "cannot be packed: packed and single vectors have cosine" in found["packed is asked for"]
    assert "other vectors in a batch than alone" in found["all is wrong"]


def test_the_service_gives_the_same(gme: Service, reference: Found) -> None:
    for (text, size, instruction), vector in zip(INPUTS, reference["vectors"], strict=True):
        given: dict[str, str] = {"text": text} if text else {}
        if size:
            given["image"] = uri(encoded(noise(*size)))
        [row] = gme.rows([given], instruction=instruction)
        assert row @ np.array(vector) > 0.99999
