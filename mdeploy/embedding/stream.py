"""Texts of a source to vectors of a target: several requests at once, rows in order, memory that does not grow.

One thread reads, waits for the oldest request and writes; the others ask. An interrupt at any place leaves a target
that a later run goes on from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from mdeploy.embedding import split
from mdeploy.embedding.client import Client
from mdeploy.embedding.lines import Line, Source
from mdeploy.embedding.sinks import Target
from mdeploy.embedding.types import Failure, RefusedError, Vector, Wish, cosine, numbers
from mdeploy.errors import ConfigError, MdeployError, UsageError

BATCH, CONCURRENCY = 32, 8
_BATCH_BYTES = 1 << 20
"""A request is not filled further than this, whatever --batch says."""

_KEEP_S = 1.0
"""How often what was written is made to last: a run that is killed loses about this much."""

_PROBE = "Is it the same model as before?"
_SAME_MODEL = 0.99
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How a file goes through: texts in a request, requests at once, whether bad lines end the run."""

    batch: int = BATCH
    concurrency: int = CONCURRENCY
    skip_errors: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """What answers: its name, the size of its vectors, and one of them."""

    name: str
    dim: int
    probe: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. `read` are bytes of the input, `resumed` the rows an earlier run made."""

    rows: int
    tokens: int
    failed: int
    read: int
    resumed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run that came to its end. `errors` are the first failures: line (from 1) and reason."""

    rows: int
    failed: int
    tokens: int
    resumed: int
    seconds: float
    errors: tuple[tuple[int, str], ...]


class LineError(MdeployError):
    """A line has no vector, and that was to end the run."""


class ChangedError(ConfigError):
    """What an earlier run left does not go with this one: the same command would end the same way."""

    def __init__(self, text: str) -> None:
        super().__init__(text, hint="--overwrite begins anew")


OnProgress = Callable[[Progress], None]
Rows = tuple[list[Vector | Failure], int]


def probe(client: Client, wish: Wish) -> Model:
    """Ask for one vector: whatever is wrong with the wish itself shows here, and not at every line."""
    name = client.model()
    try:
        answer = client.embed(name, [_PROBE], wish)
    except RefusedError as error:
        raise UsageError(f"the service refuses such a request: {error.message}") from error
    vector = numbers(answer.vectors[0])
    return Model(name, len(vector), tuple(round(value, 5) for value in vector))


def run(
    client: Client,
    model: Model,
    wish: Wish,
    source: Source,
    target: Target,
    options: StreamOptions,
    on_progress: OnProgress = lambda _: None,
) -> Outcome:
    """Embed every line of `source` into `target`, going on from what is there.

    However it ends, what was written lasts. Raises LineError for a line that cannot be embedded unless
    `skip_errors`, ChangedError where the lines already done, or the model, are not what they were.
    """
    return _Run(client, model, wish, source, target, options, on_progress).run()


class _Run:
    """One run; its mark moves with every batch written."""

    def __init__(
        self,
        client: Client,
        model: Model,
        wish: Wish,
        source: Source,
        target: Target,
        options: StreamOptions,
        on_progress: OnProgress,
    ) -> None:
        self._client, self._model, self._wish, self._source = client, model, wish, source
        self._target, self._options, self._on_progress = target, options, on_progress
        self._mark = dataclasses.replace(target.mark, probe=target.mark.probe or model.probe)
        self._resumed = target.mark.rows
        self._digest = hashlib.blake2b(digest_size=16)
        self._errors: list[tuple[int, str]] = []
        self._begun, self._kept = time.monotonic(), -math.inf

    def run(self) -> Outcome:
        """See `run`."""
        if cosine(self._mark.probe, self._model.probe) < _SAME_MODEL:
            raise ChangedError("the service does not give the vectors it gave before")
        lines = self._source.lines()
        self._pass_over(lines)
        with _Crew(self._options.concurrency) as crew:
            try:
                self._embed(lines, crew)
            except BaseException:
                with contextlib.suppress(MdeployError):  # a full disk: the mark before stands
                    self._keep()
                raise
        self._target.finish(self._mark, self._model.dim)
        seconds = time.monotonic() - self._begun
        mark = self._mark
        return Outcome(mark.rows, mark.failed, mark.tokens, self._resumed, seconds, tuple(self._errors))

    def _pass_over(self, lines: Iterator[Line]) -> None:
        """Read what is done already. Raises ChangedError where it is not what it was."""
        count = 0
        for line in itertools.islice(lines, self._mark.rows):
            self._digest.update(line.digest)
            count += 1
        if self._mark.rows and (count, self._digest.hexdigest()) != (self._mark.rows, self._mark.digest):
            raise ChangedError(
                f"{self._source.path} has changed: its first {self._mark.rows} lines are not those that are done"
            )

    def _embed(self, lines: Iterator[Line], crew: _Crew) -> None:
        waiting: deque[tuple[list[Line], Future[Rows]]] = deque()
        for batch in _batches(lines, self._options.batch):
            waiting.append((batch, crew.submit(partial(self._ask, batch))))
            while len(waiting) >= 2 * self._options.concurrency or (waiting and waiting[0][1].done()):
                self._take(*waiting.popleft())
        while waiting:
            self._take(*waiting.popleft())

    def _ask(self, batch: Sequence[Line]) -> Rows:
        """In a thread of the crew."""
        encoding = self._target.sink.encoding
        ask = lambda inputs: self._client.embed(self._model.name, inputs, self._wish, encoding)  # noqa: E731
        found, tokens = split.embed(ask, [line.item for line in batch if not isinstance(line.item, Failure)])
        vectors = iter(found)
        return [line.item if isinstance(line.item, Failure) else next(vectors) for line in batch], tokens

    def _take(self, batch: list[Line], answer: Future[Rows]) -> None:
        rows, tokens = answer.result()
        bad = next((i for i, row in enumerate(rows) if isinstance(row, Failure)), None)
        if bad is None or self._options.skip_errors:
            self._write(batch, rows, tokens)
            return
        self._write(batch[:bad], rows[:bad], 0)
        failure = rows[bad]
        assert isinstance(failure, Failure)
        raise LineError(
            f"{self._source.path}, line {self._mark.rows + 1}: {failure.reason}",
            hint="--skip-errors goes on without its vector, or mend the line and give the command again",
        )

    def _write(self, batch: Sequence[Line], rows: Sequence[Vector | Failure], tokens: int) -> None:
        self._check_sizes(rows)
        mark = self._mark
        failures = [(mark.rows + i, row.reason) for i, row in enumerate(rows, 1) if isinstance(row, Failure)]
        self._errors += failures[: _SHOWN - len(self._errors)]
        data = self._target.sink.render(mark.rows, batch, rows, self._model.dim)
        self._target.write(data)
        for line in batch:
            self._digest.update(line.digest)
        self._mark = dataclasses.replace(
            mark,
            rows=mark.rows + len(rows),
            bytes=mark.bytes + len(data),
            failed=mark.failed + len(failures),
            tokens=mark.tokens + tokens,
        )
        self._on_progress(
            Progress(self._mark.rows, self._mark.tokens, self._mark.failed, self._source.position, self._resumed)
        )
        if time.monotonic() - self._kept > _KEEP_S:
            self._keep()

    def _check_sizes(self, rows: Iterable[Vector | Failure]) -> None:
        for row in rows:
            size = self._model.dim if isinstance(row, Failure) else len(numbers(row))
            if size != self._model.dim:
                raise MdeployError(f"the service gave {size} numbers, {self._model.dim} before: is it another model?")

    def _keep(self) -> None:
        self._mark = dataclasses.replace(self._mark, digest=self._digest.hexdigest())
        self._target.keep(self._mark)
        self._kept = time.monotonic()


def _batches(lines: Iterable[Line], count: int) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        if batch and (len(batch) == count or size + line.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += line.size
    if batch:
        yield batch


class _Crew:
    """Threads that ask. They end with the process, whatever they wait for: an interrupt is not to wait for them."""

    def __init__(self, count: int) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Rows], Callable[[], Rows]] | None] = queue.SimpleQueue()
        self._count = count

    def __enter__(self) -> _Crew:
        for number in range(self._count):
            threading.Thread(target=self._work, name=f"ask-{number}", daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        for _ in range(self._count):
            self._jobs.put(None)

    def submit(self, job: Callable[[], Rows]) -> Future[Rows]:
        """Have it done by the next thread that is free."""
        future: Future[Rows] = Future()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        while (task := self._jobs.get()) is not None:
            future, job = task
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
