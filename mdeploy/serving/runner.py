"""A batch of requests through one handler: what goes wrong with one item stays with that item.

The same code runs in a local worker and in a Ray replica. It knows nothing of processes, sockets or HTTP servers;
what happens is told as events, in the order it happens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mdeploy.serving import answers
from mdeploy.serving.handler import Handler, HTTPError, Request
from mdeploy.serving.info import HandlerInfo, Reply
from mdeploy.serving.load import LoadError

_END = object()
_LINE_END = re.compile(r"\r\n|\r|\n")  # each of them ends a line of an event stream


@dataclass(frozen=True, slots=True)
class Answered:
    """These requests of the batch (by position) are done."""

    replies: tuple[tuple[int, Reply], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next part of a stream; `head` comes with the first one."""

    index: int
    data: bytes
    head: Reply | None = None


@dataclass(frozen=True, slots=True)
class Closed:
    """A stream is over; `error` says why where that was too early."""

    index: int
    error: Reply | None = None


Event = Answered | Chunk | Closed
_Item = tuple[int, Any]


class Runner:
    """One handler that is ready to work."""

    def __init__(self, handler: Handler, info: HandlerInfo) -> None:
        self._handler, self._info = handler, info
        self._batched = type(handler).inference is Handler.inference
        self._check = _checker(type(handler).body)

    def run(self, requests: Sequence[Request], gone: Callable[[int], bool] = lambda index: False) -> Iterator[Event]:
        """Answer a batch. Those whose client left (`gone`) are passed over, and a stream nobody reads ends early."""
        if self._batched:
            yield from self._run_batch(requests, gone)
            return
        for index, request in enumerate(requests):
            if not gone(index):
                yield from self._one(index, request, gone)

    # one at a time

    def _one(self, index: int, request: Request, gone: Callable[[int], bool]) -> Iterator[Event]:
        try:
            self._check(request)
            result = self._handler.inference(request)
            if not self._info.streams and not _is_stream(result):
                yield Answered(((index, answers.reply_of(result)),))
                return
        except Exception as error:  # whatever a user's code raises is the answer to this request
            yield Answered(((index, self._failed(error)),))
            return
        yield from self._stream(((step,) for step in result), [index], gone)

    # batches

    def _run_batch(self, requests: Sequence[Request], gone: Callable[[int], bool]) -> Iterator[Event]:
        items: list[tuple[int, Any, float]] = []
        refused: list[tuple[int, Reply]] = []
        for index, request in enumerate(requests):
            if gone(index):
                continue
            try:
                self._check(request)
                item = self._handler.preprocess(request)
                items.append((index, item, self._cost(item)))
            except Exception as error:  # see _one
                refused.append((index, self._failed(error, blames_client=True)))
        if refused:
            yield Answered(tuple(refused))
        for group in self._groups(items):
            if self._info.streams:
                yield from self._forward_streaming(group, gone)
            else:
                yield Answered(tuple(self._forward(group)))

    def _cost(self, item: Any) -> float:
        return 0.0 if self._info.max_batch_cost is None else float(self._handler.cost(item))

    def _groups(self, items: Sequence[tuple[int, Any, float]]) -> Iterator[list[_Item]]:
        """Items in their order, as many at once as their cost allows; one that costs too much goes alone."""
        most = self._info.max_batch_cost
        group: list[_Item] = []
        total = 0.0
        for index, item, cost in items:
            full = len(group) == self._info.max_batch_size or (most is not None and total + cost > most)
            if group and full:
                yield group
                group, total = [], 0.0
            group.append((index, item))
            total += cost
        if group:
            yield group

    def _forward(self, group: Sequence[_Item]) -> list[tuple[int, Reply]]:
        """One forward; one that runs out of memory is halved, one that fails is repeated item by item."""
        try:
            outputs = self._checked(self._handler.forward([item for _, item in group]), len(group))
        except Exception as error:  # see _one
            if len(group) == 1:
                return [(group[0][0], self._failed(error))]
            size = 1
            if answers.is_out_of_memory(error):
                size = (len(group) + 1) // 2
                _free_memory()
            halves = [group[start : start + size] for start in range(0, len(group), size)]
            return [reply for half in halves for reply in self._forward(half)]
        return [(index, self._finished(output)) for (index, _), output in zip(group, outputs, strict=True)]

    def _checked(self, outputs: Any, asked: int) -> Sequence[Any]:
        try:
            got = len(outputs)
        except TypeError as error:
            raise TypeError(f"forward returned {type(outputs).__name__}, a sequence of outputs is expected") from error
        if got != asked:
            raise ValueError(f"forward returned {got} outputs for {asked} items")
        return list(outputs)  # here, since what is lazy may fail only now

    def _finished(self, output: Any) -> Reply:
        """An output as an answer; an exception in its place is that item's own failure."""
        try:
            if isinstance(output, Exception):
                raise output
            return answers.reply_of(self._handler.postprocess(output))
        except Exception as error:  # see _one
            return self._failed(error)

    # streams

    def _forward_streaming(self, group: Sequence[_Item], gone: Callable[[int], bool]) -> Iterator[Event]:
        """A forward that yields lists, one value an item and None for those that are done."""
        try:
            steps = self._handler.forward([item for _, item in group])
        except Exception as error:  # see _one
            yield Answered(tuple((index, self._failed(error)) for index, _ in group))
            return
        yield from self._stream(iter(steps), [index for index, _ in group], gone)

    def _stream(
        self, steps: Iterator[Sequence[Any]], indices: Sequence[int], gone: Callable[[int], bool]
    ) -> Iterator[Event]:
        """The steps of several streams at once. A failure before the first one is an answer like any other."""
        started: set[int] = set()
        over: set[int] = set()
        while len(over) < len(indices):
            try:
                step = next(steps, _END)
                values = [] if step is _END else self._checked(step, len(indices))
                chunks = [(i, self._framed(v)) for i, v in zip(indices, values, strict=False) if v is not None]
            except Exception as error:  # see _one
                yield from self._broken(error, [i for i in indices if i not in over], started)
                return
            for index, data in chunks:
                if index not in over:
                    yield Chunk(index, data, None if index in started else self._head())
                    started.add(index)
            for position, index in enumerate(indices):
                is_over = step is _END or gone(index) or (len(indices) > 1 and values[position] is None)
                if is_over and index not in over:
                    if index not in started:
                        yield Chunk(index, b"", self._head())
                    over.add(index)
                    yield Closed(index)
        self._end(steps)

    def _end(self, steps: Iterator[Any]) -> None:
        """Tell a generator that nobody wants more; everybody is answered, so its failure is for the log only."""
        try:
            getattr(steps, "close", lambda: None)()
        except Exception as error:  # see _one
            answers.report(error)

    def _broken(self, error: Exception, indices: Sequence[int], started: set[int]) -> Iterator[Event]:
        reply = self._failed(error)
        for index in indices:
            yield Closed(index, reply) if index in started else Answered(((index, reply),))

    def _head(self) -> Reply:
        if self._info.streamed_as == "sse":
            return Reply(200, "text/event-stream")
        return Reply(200, "application/octet-stream")

    def _framed(self, value: Any) -> bytes:
        """A streamed value as bytes: an event of JSON (text as it is), or raw bytes."""
        if self._info.streamed_as == "raw":
            return value.encode() if isinstance(value, str) else bytes(value)
        text = value if isinstance(value, str) else answers.encode(value).decode()
        return "".join(f"data: {line}\n" for line in _LINE_END.split(text)).encode() + b"\n"

    def _failed(self, error: BaseException, *, blames_client: bool = False) -> Reply:
        return answers.failed(error, self._handler.errors, blames_client=blames_client)


def _is_stream(result: Any) -> bool:
    """A generator, whoever made it: a plain inference may return one."""
    return hasattr(result, "__next__") and hasattr(result, "send")


def _free_memory() -> None:
    """What a failed forward left in torch's cache would make the next one fail too."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# declared bodies


def _checker(declared: Any) -> Callable[[Request], None]:
    """What checks a request's JSON against `Handler.body`. Raises HTTPError 422 from within."""
    if declared is None:
        return lambda request: None
    return _schema_checker(declared) if isinstance(declared, dict) else _type_checker(declared)


def _type_checker(declared: Any) -> Callable[[Request], None]:
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(declared)

    def check(request: Request) -> None:
        try:
            request.accept(adapter.validate_python(request.json()))
        except ValidationError as error:
            first = error.errors()[0]
            raise _wrong(first["loc"], first["msg"]) from error

    return check


def _schema_checker(schema: dict[str, Any]) -> Callable[[Request], None]:
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
    except ImportError as error:
        text = f"a `body` that is a JSON Schema is checked with jsonschema: {sys.executable} -m pip install jsonschema"
        raise LoadError(text) from error

    validator = Draft202012Validator(schema)

    def check(request: Request) -> None:
        error = best_match(validator.iter_errors(request.json()))
        if error is not None:
            raise _wrong(tuple(error.absolute_path), error.message)

    return check


def _wrong(where: Sequence[Any], text: str) -> HTTPError:
    at = ".".join(map(str, where))
    return HTTPError(422, f"{at}: {text}"[:1000] if at else text[:1000], code="invalid_body")
