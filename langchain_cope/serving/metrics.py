"""What Prometheus reads: counts of the engine, times of answers, refusals; no id of anybody.

Names follow vLLM's, with the prefix `cope_`. Labels come from closed sets: the number of series
does not grow with users, keys or what strangers send.
"""

import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from langchain_cope.serving.state import ServerState

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# Name, help and the engine's statistic.
_COUNTERS = (
    ("cope_engine_steps", "Forwards that gave answers their next tokens.", "steps"),
    ("cope_generation_tokens", "Tokens answered.", "tokens"),
    ("cope_prefix_cache_queries", "Tokens of prompts, a row each.", "prompt_tokens"),
    ("cope_prefix_cache_hits", "Those of them that were not computed.", "prefix_tokens_reused"),
    ("cope_drafted_tokens", "Tokens that speculation had checked.", "drafted"),
    ("cope_accepted_tokens", "Those of them that came true.", "accepted"),
    ("cope_adapter_loads", "Adapters loaded into a slot.", "adapters_loaded"),
    ("cope_adapter_evictions", "Adapters that made room for another.", "adapters_evicted"),
)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, processor time, open files
        self.first_token = Histogram(
            "cope_time_to_first_token_seconds",
            "From request to first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "cope_inter_token_latency_seconds",
            "Between two pieces.",
            buckets=_SHORT,
            registry=self.registry,
        )
        self.whole = Histogram(
            "cope_e2e_request_latency_seconds",
            "From request to end.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue = Histogram(
            "cope_request_queue_time_seconds",
            "Waiting for room.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "cope_prompt_tokens", "Tokens of prompts.", registry=self.registry
        )
        self.success = Counter(
            "cope_request_success",
            "Answers that ended.",
            ["finished_reason"],
            registry=self.registry,
        )
        self.responses = Counter(
            "cope_http_responses",
            "Responses, by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.rejected = Counter(
            "cope_rejected", "Refused with 429 or 503.", ["reason"], registry=self.registry
        )

    def watch(self, state: "ServerState") -> None:
        """Read the engine's own counts, too, whenever somebody asks."""
        self.registry.register(_ServerCounts(state))

    def text(self) -> bytes:
        """Return what Prometheus reads."""
        return generate_latest(self.registry)


class _ServerCounts(Collector):
    def __init__(self, state: "ServerState") -> None:
        self._state = state
        self._build = {
            "version": version("langchain-cope"),
            "python": platform.python_version(),
            "model": state.settings.name,
        }

    def collect(self) -> "Iterator[Metric]":
        """Yield the counts as they are now."""
        build = GaugeMetricFamily("cope_build_info", "What runs.", labels=list(self._build))
        build.add_metric(list(self._build.values()), 1)
        yield build
        engine = self._state.engine
        if engine is None:
            return
        now = engine.statistics()
        for name, documentation, field in _COUNTERS:
            yield CounterMetricFamily(name, documentation, value=getattr(now, field))
        state = self._state
        lines = (state.finding, state.preparing, state.admission)
        waiting = now.waiting + sum(line.num_waiting for line in lines)
        gauges = (
            ("cope_num_requests_running", "Requests in the batch.", now.running),
            ("cope_num_requests_waiting", "Requests that wait for room.", waiting),
            (
                "cope_kv_cache_bytes",
                "Bytes of keys and values, beginnings that are kept among them.",
                now.kv_bytes,
            ),
            (
                "cope_kv_cache_usage_ratio",
                "Share of the bytes that keys and values may take.",
                now.kv_bytes / now.max_kv_bytes,
            ),
            ("cope_adapters_in_use", "Adapters that a request holds.", now.adapters_in_use),
        )
        for name, documentation, value in gauges:
            yield GaugeMetricFamily(name, documentation, value=value)
