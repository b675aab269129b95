"""What the server counts, for Prometheus.

A request costs a few additions here; the library that knows the format is asked when somebody scrapes.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KIND = b"text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of values between ``edges``, and their sum."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self._edges, value)] += 1
        self.sum += value

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Pairs of an edge and how many values are at most that."""
        found, total = [], 0
        for edge, count in zip([*map(str, self._edges), "+Inf"], self._counts, strict=True):
            total += count
            found.append((edge, float(total)))
        return found

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)


class Metrics(Collector):
    """The counters of one server."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()
        """By model, route and status."""
        self.latency: dict[tuple[str, str], Histogram] = {}
        self.waited: dict[str, Histogram] = {}
        self.ran: dict[str, Histogram] = {}
        self.sizes: dict[str, Histogram] = {}
        self.certificates: Counter[tuple[str, str, str]] = Counter()
        """By model, norm and outcome: certified, smaller (a radius below the one asked for) or abstained."""
        self.reloads: Counter[tuple[str, str]] = Counter()
        self.gauges: dict[str, dict[str, float]] = {}
        """Filled before a scrape: a name, and its value for each model ("" for the server)."""
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def request(self, model: str, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self.requests[model, route, str(status)] += 1
        key = (model, route)
        if key not in self.latency:
            self.latency[key] = Histogram(SECONDS)
        self.latency[key].observe(seconds)

    def refused(self, status: int) -> None:
        """Counts what was refused before it was a request."""
        self.requests["", "refused", str(status)] += 1

    def batch(self, model: str, images: int, waited: float, ran: float) -> None:
        """Counts a batch."""
        if model not in self.sizes:
            self.sizes[model] = Histogram(SIZES)
            self.waited[model], self.ran[model] = Histogram(SECONDS), Histogram(SECONDS)
        self.sizes[model].observe(images)
        self.waited[model].observe(waited)
        self.ran[model].observe(ran)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What ``prometheus_client`` asks for."""
        yield _counter("fdml_requests", "Requests answered", ("model", "route", "status"), self.requests)
        yield _counter("fdml_certificates", "Certificates by outcome", ("model", "norm", "outcome"), self.certificates)
        yield _counter("fdml_reloads", "Reloads of a bundle by outcome", ("model", "outcome"), self.reloads)
        latency = HistogramMetricFamily(
            "fdml_request_seconds", "From a whole request to its answer", labels=("model", "route")
        )
        for key, histogram in self.latency.items():
            latency.add_metric(key, histogram.buckets, histogram.sum)
        yield latency
        for name, help, found in (
            ("fdml_queue_seconds", "How long the oldest image of a batch waited", self.waited),
            ("fdml_run_seconds", "How long a batch ran", self.ran),
            ("fdml_batch_images", "Images of a batch", self.sizes),
        ):
            family = HistogramMetricFamily(name, help, labels=("model",))
            for model, histogram in found.items():
                family.add_metric((model,), histogram.buckets, histogram.sum)
            yield family
        for name, values in self.gauges.items():
            gauge = GaugeMetricFamily(f"fdml_{name}", name.replace("_", " "), labels=("model",))
            for model, value in values.items():
                gauge.add_metric((model,), value)
            yield gauge


def _counter(
    name: str, help: str, labels: tuple[str, ...], values: "Counter[tuple[str, str, str]] | Counter[tuple[str, str]]"
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
