"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from ..reply import Reply

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_EACH = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "siglance_requests", "Requests by protocol and status.", ("protocol", "status"), registry=self.registry
        )
        self._prompt = Counter(
            "siglance_prompt_tokens", "Tokens of prompts.", ("model", "modality"), registry=self.registry
        )
        self._cached = Counter(
            "siglance_cached_prompt_tokens", "Tokens of prompts that were not run again.", ("model",),
            registry=self.registry,
        )  # fmt: skip
        self._generated = Counter("siglance_generated_tokens", "Tokens of replies.", ("model",), registry=self.registry)
        self._first = Histogram(
            "siglance_time_to_first_token_seconds", "From the arrival of a request to the first piece of its reply.",
            ("model",), buckets=_FIRST, registry=self.registry,
        )  # fmt: skip
        self._each = Histogram(
            "siglance_time_per_token_seconds", "Mean of each reply, after its first token.", ("model",), buckets=_EACH,
            registry=self.registry,
        )  # fmt: skip
        self.waited = Histogram(
            "siglance_queue_seconds", "Time that requests waited for their turn.", ("model",), buckets=_FIRST,
            registry=self.registry,
        )  # fmt: skip
        self._started = time.time()
        Gauge("siglance_start_time_seconds", "When the server started.", registry=self.registry).set(self._started)
        Gauge("siglance_resident_memory_bytes", "Memory of the process.", registry=self.registry).set_function(
            resident_bytes
        )

    def watch(self, name: str, help: str, read: Callable[[], Mapping[str, float]], *, counter: bool = False) -> None:
        """Report what `read` gives by model whenever the metrics are read."""
        self.registry.register(_Watched(name, help, read, counter))

    def first_token(self, model: str, seconds: float) -> None:
        """The first piece of a reply is there."""
        self._first.labels(model).observe(seconds)

    def finished(self, model: str, reply: Reply) -> None:
        """A reply is whole."""
        for modality, tokens in reply.usage.by_modality.items():
            self._prompt.labels(model, modality).inc(tokens)
        self._cached.labels(model).inc(reply.usage.cached_tokens)
        self._generated.labels(model).inc(reply.usage.completion_tokens)
        if reply.usage.completion_tokens > 1:
            self._each.labels(model).observe(reply.timings.per_token / 1e3)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Watched(Collector):
    """Numbers by model that live elsewhere."""

    def __init__(self, name: str, help: str, read: Callable[[], Mapping[str, float]], counter: bool):
        self._name, self._help, self._read = name, help, read
        self._kind = CounterMetricFamily if counter else GaugeMetricFamily

    def collect(self) -> Iterator[Metric]:
        family = self._kind(self._name, self._help, labels=["model"])
        for model, value in self._read().items():
            family.add_metric([model], value)
        yield family


def resident_bytes() -> float:
    """Memory of this process, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return 4096.0 * pages
