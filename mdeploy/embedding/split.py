"""Finds the texts of a batch that a service does not take, so that the others get their vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mdeploy.embedding.types import Answer, Failure, Item, RefusedError, Vector

Ask = Callable[[Sequence[Item]], Answer]


def embed(ask: Ask, inputs: Sequence[Item]) -> tuple[list[Vector | Failure], int]:
    """A vector or the reason why not for each input, and the tokens of all.

    A batch that is refused is asked in halves: n texts with one bad among them take about 2 log2(n) requests.
    Raises what `ask` raises, RefusedError excepted.
    """
    if not inputs:
        return [], 0
    try:
        answer = ask(inputs)
    except RefusedError as error:
        if len(inputs) == 1:
            return [Failure(error.message)], 0
    else:
        return list(answer.vectors), answer.tokens
    middle = len(inputs) // 2
    (left, left_tokens), (right, right_tokens) = embed(ask, inputs[:middle]), embed(ask, inputs[middle:])
    return left + right, left_tokens + right_tokens
