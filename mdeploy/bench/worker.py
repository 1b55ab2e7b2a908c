"""A load process: one epoll loop over raw sockets, a closed loop in each of its slots.

Started by `load` as `python -m mdeploy.bench.worker`; it shares nothing with its siblings. Nothing
here may wait for anything but `epoll.poll`, and what is done per chunk is kept to a few microseconds.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
import sys
import time

from mdeploy.bench import clock, targets
from mdeploy.bench.plan import request_bytes
from mdeploy.bench.stats import Histogram
from mdeploy.bench.stream import Counters, PlainAnswer, Stream
from mdeploy.bench.types import Sample
from mdeploy.bench.wire import CANCELLED, READY, Job, Tick, WorkerReport, frame, read_frame

_READ_BYTES = 65_536
_TICK_S = 0.05
_REPORT_NS = 250_000_000
_STDIN, _STDOUT = 0, 1
# A slot whose request failed waits before the next one, so that a dead server is not hammered.
_PAUSE_NS, _LONGEST_PAUSE_NS = 50_000_000, 1_000_000_000
# Of each worker's answers the first few and every 64th are parsed in full beside the byte search.
_CHECK_FIRST, _CHECK_EVERY = 4, 64
_PRECONNECT_S = 5.0


class Slot:
    """One place in the loop: a connection and the request on it."""

    __slots__ = (
        "begun_ns",
        "connect_ns",
        "due_ns",
        "failures",
        "fd",
        "out",
        "resume_ns",
        "sent_ns",
        "sock",
        "stream",
        "writing",
    )

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.fd = -1
        self.stream: Stream | None = None
        self.out: memoryview | None = None
        self.due_ns = self.begun_ns = self.connect_ns = self.sent_ns = self.resume_ns = 0
        self.failures = 0
        self.writing = False


class Worker:
    """The loop and everything it counts."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._plan = job.plan
        self._target = targets.for_endpoint(job.plan.endpoint)
        self._answer = PlainAnswer if job.plan.endpoint == "http" else Stream
        self._timeout_ns = int(job.plan.timeout_s * 1e9)
        self._epoll = select.epoll()
        self._slots = [Slot() for _ in range(job.concurrency)]
        self._by_fd: dict[int, Slot] = {}
        self._counters = Counters()
        self._lag = Histogram()
        self._samples: list[Sample] = []
        self._watch = clock.StepWatch()
        self._begun = self._running = self._failed = 0
        self._reads = self._unstamped = 0
        self._start_ns = self._drain_ns = self._stop_ns = 0
        self._cpu = (0.0, 0.0)
        self._stopping = self._realtime = False

    def connect(self) -> None:
        """Open all connections before the clock runs; what fails here fails again, and counts, later."""
        for slot in self._slots:
            sock = self._socket(slot)
            sock.settimeout(_PRECONNECT_S)
            try:
                sock.connect(self._plan.address[1])
            except OSError:
                self._disconnect(slot)
                return
            sock.setblocking(False)

    def run(self) -> WorkerReport:
        """Start all slots and keep them busy until the plan is done or stdin closes."""
        self._realtime = _prefer()
        self._epoll.register(_STDIN, select.EPOLLIN)
        self._watch = clock.StepWatch()
        self._start_ns = now = time.time_ns()
        self._cpu = (time.process_time(), 0.0)
        if self._plan.duration_s is not None:
            self._stop_ns = now + int(self._plan.duration_s * 1e9)
        for slot in self._slots:
            slot.due_ns = now
            self._begin(slot)
        self._loop()
        self._drain(time.time_ns())
        self._cut_off()
        return self._report()

    def _loop(self) -> None:
        next_tick = next_report = 0
        while not self._stopping and (self._running or not self._drain_ns):
            events = self._epoll.poll(_TICK_S)
            polled = time.time_ns()
            for fd, mask in events:
                self._on_event(fd, mask, polled)
            if polled >= next_tick:
                self._tick(polled)
                next_tick = polled + int(_TICK_S * 1e9)
            if polled >= next_report:
                self._tell()
                next_report = polled + _REPORT_NS

    def _cut_off(self) -> None:
        """Note what an interrupt left unfinished."""
        now = time.time_ns()
        for slot in self._slots:
            if slot.stream is not None:
                self._samples.append(_sample(slot, slot.stream, CANCELLED, now))

    def _on_event(self, fd: int, mask: int, polled: int) -> None:
        slot = self._by_fd.get(fd)
        if slot is None:
            self._stopping = self._stopping or fd == _STDIN
        elif slot.out is not None and mask & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
            self._on_writable(slot)
        elif mask & (select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP):
            self._on_readable(slot, polled)

    def _on_readable(self, slot: Slot, polled: int) -> None:
        sock, stream = slot.sock, slot.stream
        assert sock is not None
        try:
            data, at_ns = clock.receive(sock, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(slot, _name(error))
            return
        if stream is None or not data:
            self._lost(slot, None)
            return
        self._reads += 1
        if at_ns:
            self._lag.add(time.time_ns() - at_ns)
        else:
            at_ns = time.time_ns()
            self._unstamped += 1
            self._lag.add(at_ns - polled)  # the part of the lag we can see ourselves
        stream.feed(data, at_ns)
        if stream.complete:
            self._finish(slot, stream.verdict(), at_ns)

    def _lost(self, slot: Slot, error: str | None) -> None:
        """The connection ended; nobody's fault where no request was on it."""
        stream = slot.stream
        if stream is None:
            self._disconnect(slot)
        else:
            self._finish(slot, error or stream.eof(), time.time_ns())

    def _may_begin(self, now: int) -> bool:
        over = (self._stop_ns and now >= self._stop_ns) or self._begun == self._job.requests
        if over:
            self._drain(now)
        return not over

    def _drain(self, now: int) -> None:
        """Nothing more will be started: the steady window ends here."""
        if not self._drain_ns:
            self._drain_ns = min(now, self._stop_ns or now)
            self._cpu = (self._cpu[0], time.process_time())

    def _begin(self, slot: Slot) -> None:
        now = time.time_ns()
        if not self._may_begin(now):
            slot.resume_ns = 0
            return
        number = self._job.first + self._begun * self._job.stride
        check = self._begun < _CHECK_FIRST or self._begun % _CHECK_EVERY == 0
        self._begun += 1
        self._running += 1
        slot.begun_ns, slot.resume_ns, slot.connect_ns, slot.sent_ns = now, 0, 0, 0
        slot.stream = self._answer(self._target, self._counters, check)
        slot.out = memoryview(request_bytes(self._plan, number))
        if slot.sock is None:
            self._open(slot)
        else:
            self._send(slot)

    def _socket(self, slot: Slot) -> socket.socket:
        sock = socket.socket(self._plan.address[0], socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        clock.stamp_receives(sock)
        slot.sock, slot.fd, slot.writing = sock, sock.fileno(), False
        self._by_fd[slot.fd] = slot
        self._epoll.register(slot.fd, select.EPOLLIN)
        return sock

    def _open(self, slot: Slot) -> None:
        sock = self._socket(slot)
        sock.setblocking(False)
        code = sock.connect_ex(self._plan.address[1])
        if code not in (0, errno.EINPROGRESS):
            self._finish(slot, _name(OSError(code, "")), time.time_ns())
            return
        self._watch_writes(slot, True)

    def _on_writable(self, slot: Slot) -> None:
        sock = slot.sock
        assert sock is not None
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._finish(slot, _name(OSError(code, "")), time.time_ns())
            return
        if not slot.sent_ns:
            slot.connect_ns = time.time_ns() - slot.begun_ns
        self._send(slot)

    def _send(self, slot: Slot) -> None:
        sock, out = slot.sock, slot.out
        assert sock is not None
        assert out is not None
        if not slot.sent_ns:
            slot.sent_ns = time.time_ns()
        try:
            sent = sock.send(out)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._finish(slot, _name(error), time.time_ns())
            return
        slot.out = None if sent == len(out) else out[sent:]
        self._watch_writes(slot, slot.out is not None)

    def _watch_writes(self, slot: Slot, wanted: bool) -> None:
        if wanted != slot.writing:
            slot.writing = wanted
            self._epoll.modify(slot.fd, select.EPOLLIN | select.EPOLLOUT if wanted else select.EPOLLIN)

    def _finish(self, slot: Slot, error: str | None, at_ns: int) -> None:
        stream = slot.stream
        assert stream is not None
        self._samples.append(_sample(slot, stream, error, at_ns))
        self._running -= 1
        stream.close()
        slot.stream, slot.out = None, None
        if error is not None or not stream.reusable:
            self._disconnect(slot)
        if error is None:
            slot.failures, slot.due_ns = 0, at_ns
            self._begin(slot)
        else:
            self._failed += 1
            self._pause(slot)

    def _pause(self, slot: Slot) -> None:
        now = time.time_ns()
        wait = min(_PAUSE_NS << min(slot.failures, 8), _LONGEST_PAUSE_NS)
        slot.failures += 1
        if self._may_begin(now):
            slot.resume_ns = now + wait

    def _disconnect(self, slot: Slot) -> None:
        if slot.sock is not None:
            del self._by_fd[slot.fd]
            slot.sock.close()  # also leaves the epoll set
            slot.sock = None

    def _tick(self, now: int) -> None:
        self._watch.check()
        if self._stop_ns and now >= self._stop_ns:
            self._drain(now)
        for slot in self._slots:
            if slot.stream is not None:
                if now - slot.begun_ns > self._timeout_ns:
                    self._finish(slot, "timeout", now)
            elif slot.resume_ns and now >= slot.resume_ns:
                slot.due_ns = now
                self._begin(slot)

    def _tell(self) -> None:
        completed = len(self._samples) - self._failed
        _write(frame(Tick(self._running, completed, self._failed, self._counters.chunks)))

    def _report(self) -> WorkerReport:
        counters = self._counters
        wall = max(self._drain_ns - self._start_ns, 1) / 1e9
        return WorkerReport(
            start_ns=self._start_ns,
            drain_ns=self._drain_ns,
            end_ns=time.time_ns(),
            samples=self._samples,
            gaps=counters.gaps,
            lag=self._lag,
            cpu_share=(self._cpu[1] - self._cpu[0]) / wall,
            reads=self._reads,
            unstamped_reads=self._unstamped,
            coalesced_reads=counters.coalesced_reads,
            gaps_omitted=counters.gaps_omitted,
            checked=counters.checked,
            mismatches=counters.mismatches,
            clock_step_ns=self._watch.worst_ns,
            realtime=self._realtime,
        )


def _prefer() -> bool:
    """Go before ordinary processes where we may (root, CAP_SYS_NICE). A server on the same cores holds
    them for milliseconds at a time; we need microseconds, but at once. Measured beside vLLM on two
    cores: client lag p99 2 ms -> 0.1 ms.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        return False
    return True


def _sample(slot: Slot, stream: Stream, error: str | None, at_ns: int) -> Sample:
    return Sample(
        due_ns=slot.due_ns,
        connect_ns=slot.connect_ns,
        sent_ns=slot.sent_ns,
        ttfb_ns=stream.ttfb_ns,
        first_ns=stream.first_ns,
        answer_ns=stream.answer_ns,
        last_ns=stream.last_ns,
        end_ns=at_ns,
        prompt_tokens=stream.prompt_tokens,
        output_tokens=stream.output_tokens,
        chunks=stream.chunks,
        first_coalesced=stream.first_coalesced,
        error=error,
    )


def _name(error: OSError) -> str:
    """An operating system's error in the words of the report."""
    if error.errno == errno.ECONNREFUSED:
        return "connection_refused"
    if error.errno in (errno.ECONNRESET, errno.EPIPE):
        return "reset"
    if error.errno == errno.ETIMEDOUT:
        return "timeout"
    return "connection_failed"


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(_STDOUT, view) :]


def main() -> int:
    """Read the job, connect, wait for "go", run, report; a parent that went away ends all of it."""
    try:
        job = read_frame(sys.stdin.buffer)
        worker = Worker(job)
        worker.connect()
        _write(frame(READY))
        if not sys.stdin.buffer.read(1):
            return 0
        gc.collect()
        gc.freeze()
        gc.disable()
        _write(frame(worker.run()))
    except (EOFError, BrokenPipeError):
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
