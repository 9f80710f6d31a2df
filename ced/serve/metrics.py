"""Metrics for Prometheus."""

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

import ced

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # environment variable: folder in which processes share their values


class Metrics:
    """The metrics of one server, in a registry of its own; several worker processes share their values in files.

    Attributes:
        pending: uploads that wait or are being tagged.
        live: live connections.
        sound: seconds of sound that were tagged.
        call_windows: windows scored in one call of the model.
    """

    def __init__(self, model: str) -> None:
        self._is_shared = METRICS_FOLDER in os.environ
        self._registry = registry = CollectorRegistry()
        if not self._is_shared:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
        info = Gauge(
            "ced_info", "Version and model.", ["version", "model"], registry=registry, multiprocess_mode="livemax"
        )
        info.labels(ced.__version__, model).set(1)
        self.pending = Gauge(
            "ced_pending_requests",
            "Uploads that wait or are worked on.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.live = Gauge("ced_live_connections", "Live connections.", registry=registry, multiprocess_mode="livesum")
        self.sound = Counter("ced_sound_seconds", "Seconds of sound that were tagged.", registry=registry)
        self.call_windows = Histogram(
            "ced_call_windows", "Windows scored in one call.", buckets=(1, 2, 4, 8, 16), registry=registry
        )
        self._requests = Counter("ced_requests", "Requests to tag, by status.", ["status"], registry=registry)
        self._seconds = Histogram(
            "ced_request_seconds", "Time from a request to its answer, for status 200.", registry=registry
        )

    def count_request(self, status: int, seconds: float) -> None:
        """Count a request to tag that was answered after some seconds."""
        self._requests.labels(status).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def report(self) -> bytes:
        """Return the values in Prometheus' text format, of all worker processes together."""
        if not self._is_shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
