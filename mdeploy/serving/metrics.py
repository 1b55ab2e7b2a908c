"""What a service counts, for Prometheus and for the supervisor, in a registry of its own.

Counters move as things happen; gauges are read from the backends when somebody scrapes. Label values come from
handlers and from HTTP, never from a path or header of a client, so that nobody can fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mdeploy.serving.backend import Backend

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STATES = ("starting", "ready", "busy", "retiring", "stopped")


class Metrics:
    """Everything counted of one service; it is the Observer of its backends."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each one, which nobody reads
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mdeploy_requests", "Requests answered", ("handler", "method", "status"), registry=registry
        )
        self._latency = Histogram(
            "mdeploy_request_seconds",
            "Time from the head of a request to the end of its answer",
            ("handler",),
            registry=registry,
            buckets=_SECONDS,
        )
        self._sizes = Histogram(
            "mdeploy_batch_size", "Requests a model got at once", ("handler",), registry=registry, buckets=_SIZES
        )
        self._batches = Histogram(
            "mdeploy_batch_seconds", "Time a worker took for a batch", ("handler",), registry=registry, buckets=_SECONDS
        )
        self._waits = Histogram(
            "mdeploy_queue_wait_seconds", "Time in the queue", ("handler",), registry=registry, buckets=_SECONDS
        )
        self._restarts = Counter(
            "mdeploy_worker_restarts", "Workers replaced", ("handler", "reason"), registry=registry
        )
        self._inferences = Counter("mdeploy_inference", "Answers that a model gave", ("handler",), registry=registry)
        ProcessCollector(registry=registry)
        # `labels` takes a lock and builds a key: kept, it is a look-up in a dict.
        self._answered: dict[tuple[str, str, int], Counter] = {}
        self._latencies: dict[str, Histogram] = {}
        self._batched: dict[str, tuple[Histogram, Histogram, Counter]] = {}
        self._waited: dict[str, Histogram] = {}

    def watch(self, backends: Mapping[str, Backend]) -> None:
        """Show the queues and workers of these at every scrape."""
        self.registry.register(_Gauges(backends))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """A request was answered; `handler` is empty for what no handler took."""
        key = (handler, method, status)
        counter = self._answered.get(key)
        if counter is None:
            counter = self._answered[key] = self._requests.labels(handler, method, str(status))
        counter.inc()
        histogram = self._latencies.get(handler)
        if histogram is None:
            histogram = self._latencies[handler] = self._latency.labels(handler)
        histogram.observe(seconds)

    def batch(self, handler: str, size: int, seconds: float) -> None:
        """A model answered `size` requests together."""
        sizes, batches, inferences = self._of(handler)
        sizes.observe(size)
        batches.observe(seconds)
        inferences.inc(size)

    def chunk(self, handler: str) -> None:
        """A model got on with a stream."""
        self._of(handler)[2].inc()

    def waited(self, handler: str, seconds: float) -> None:
        """A request left the queue."""
        histogram = self._waited.get(handler)
        if histogram is None:
            histogram = self._waited[handler] = self._waits.labels(handler)
        histogram.observe(seconds)

    def restarted(self, handler: str, reason: str) -> None:
        """A worker is replaced."""
        self._restarts.labels(handler, reason).inc()

    def _of(self, handler: str) -> tuple[Histogram, Histogram, Counter]:
        found = self._batched.get(handler)
        if found is None:
            found = self._sizes.labels(handler), self._batches.labels(handler), self._inferences.labels(handler)
            self._batched[handler] = found
        return found


class _Gauges(Collector):
    """The state of the backends at the moment of a scrape."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        queued = GaugeMetricFamily("mdeploy_queue_length", "Requests that wait", labels=["handler"])
        in_flight = GaugeMetricFamily("mdeploy_in_flight", "Requests that workers have", labels=["handler"])
        workers = GaugeMetricFamily("mdeploy_workers", "Workers by state", labels=["handler", "state"])
        memory = GaugeMetricFamily(
            "mdeploy_worker_gpu_memory_bytes", "GPU memory of a worker", labels=["handler", "device", "pid"]
        )
        for name, backend in self._backends.items():
            queued.add_metric([name], backend.queued)
            in_flight.add_metric([name], backend.in_flight)
            found = backend.workers()
            for state in _STATES:
                workers.add_metric([name, state], sum(worker.state == state for worker in found))
            for worker in found:
                if worker.gpu_memory_bytes:
                    memory.add_metric([name, worker.device, str(worker.pid)], worker.gpu_memory_bytes)
        return (queued, in_flight, workers, memory)
