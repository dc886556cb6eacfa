"""Metrics of the server in the text format of Prometheus."""

from collections.abc import Callable

import prometheus_client as prometheus
from prometheus_client import process_collector

CONTENT_TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4
_SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
  """Counters and histograms of one server.

  Args:
    images: number of images of the index.
  """

  def __init__(self, images: int):
    self._registry = prometheus.CollectorRegistry()
    process_collector.ProcessCollector(registry=self._registry)
    self._requests = prometheus.Counter(
      "ov_requests", "Requests by route and status.", ("route", "status"), registry=self._registry
    )
    self._seconds = prometheus.Histogram(
      "ov_request_seconds", "Time to answer a request.", ("route",), registry=self._registry
    )
    self._batches = prometheus.Histogram(
      "ov_batch_size", "Items per batch of the model.", ("kind",), buckets=_SIZES,
      registry=self._registry,
    )  # fmt: skip
    self._waiting = prometheus.Gauge(
      "ov_waiting", "Items that wait for the model.", ("kind",), registry=self._registry
    )
    self._buffered = prometheus.Gauge(
      "ov_buffered_bytes", "Bytes of request bodies in memory.", registry=self._registry
    )
    prometheus.Gauge("ov_images", "Images of the index.", registry=self._registry).set(images)

  def request(self, route: str, status: int, seconds: float) -> None:
    """Count a request."""
    self._requests.labels(route, str(status)).inc()
    self._seconds.labels(route).observe(seconds)

  def batch(self, kind: str, size: int) -> None:
    """Count a batch."""
    self._batches.labels(kind).observe(size)

  def watch(self, kind: str, waiting: Callable[[], int]) -> None:
    """Report the number of waiting items whenever the metrics are read."""
    self._waiting.labels(kind).set_function(waiting)

  def watch_buffered(self, buffered: Callable[[], int]) -> None:
    """Report the bytes of request bodies whenever the metrics are read."""
    self._buffered.set_function(buffered)

  def render(self) -> bytes:
    """Return all metrics as text."""
    return prometheus.generate_latest(self._registry)
