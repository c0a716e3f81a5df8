"""What is counted and measured, under the names that dashboards of vLLM expect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vl2_jax.serving.requests import Event, Finished, Load, Piece, Request, Started

# vLLM's, in seconds and in tokens.
_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(scale * step for scale in (1, 10, 100, 1000, 10_000, 100_000) for step in (1, 2, 5))
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")


class Metrics:
    """Of one server, in a registry of its own.

    Args:
      model: the label `model_name`.
      load: what the engine does, asked for each time the numbers are read.
    """

    def __init__(self, model: str, load: Callable[[], Load]):
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(model, load))
        self._model = model
        self.http = Counter(
            "http_requests", "Requests by route and status.", ("handler", "method", "status"), registry=self._registry
        )
        self._gone = self._counter("vllm:http_requests_client_disconnected", "Clients that left before the end.")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Positions of prompts.")
        self._new_tokens = self._counter("vllm:generation_tokens", "Tokens of answers.")
        self._success = Counter(
            "vllm:request_success", "Whole answers.", ("model_name", "finished_reason"), registry=self._registry
        )
        self._first = self._seconds("time_to_first_token", "From a request's arrival to its first token.", _FIRST)
        self._between = self._seconds("inter_token_latency", "Between tokens of an answer.", _BETWEEN)
        self._whole = self._seconds("e2e_request_latency", "From a request's arrival to its end.", _WHOLE)
        self._queue = self._seconds("request_queue_time", "Waiting, before pictures and prompt.", _WHOLE)
        self._prefill = self._seconds("request_prefill_time", "Pictures and prompt.", _WHOLE)
        self._decode = self._seconds("request_decode_time", "From the first token to the last.", _WHOLE)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Positions of a prompt.", _TOKENS)
        self._answer = self._histogram("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)

    def read(self) -> bytes:
        return generate_latest(self._registry)

    def client_left(self) -> None:
        self._gone.inc()

    def answered(self, handler: str, method: str, status: int) -> None:
        method = method if method in _METHODS else "other"
        self.http.labels(handler, method, f"{status // 100}xx").inc()

    def watch(self, requests: Sequence[Request], arrived: float) -> Callable[[int, Event, float], None]:
        """Measures the answers to some requests by their events; `arrived` by `time.perf_counter`."""
        last: dict[int, float] = {}
        first: dict[int, float] = {}

        def see(choice: int, event: Event, when: float) -> None:
            if isinstance(event, Started):
                first[choice] = when
                self._first.observe(when - arrived)
                self._prompt_tokens.inc(len(requests[choice].prompt))
            elif isinstance(event, Piece) and event.tokens:
                count = len(event.tokens)
                self._new_tokens.inc(count)
                if choice in last:
                    for _ in range(count):  # tokens of one step of several come together
                        self._between.observe((when - last[choice]) / count)
                last[choice] = when
            elif isinstance(event, Finished):
                answer = event.answer
                begun = first.get(choice, when)
                spent = answer.timings.vision_seconds + answer.timings.prefill_seconds
                self._success.labels(self._model, answer.finish_reason).inc()
                self._whole.observe(when - arrived)
                self._decode.observe(when - begun)
                self._prefill.observe(spent)
                self._queue.observe(answer.timings.waited_seconds)
                self._prompt.observe(answer.prompt_tokens)
                self._answer.observe(len(answer.token_ids))

        return see

    def _counter(self, name: str, told: str) -> Counter:
        return Counter(name, told, ("model_name",), registry=self._registry).labels(self._model)

    def _seconds(self, name: str, told: str, buckets: Sequence[float]) -> Histogram:
        return self._histogram(f"vllm:{name}_seconds", told, buckets)

    def _histogram(self, name: str, told: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(name, told, ("model_name",), registry=self._registry, buckets=buckets)
        return made.labels(self._model)


class _OfEngine(Collector):
    """What the engine knows better than those who ask it."""

    def __init__(self, model: str, load: Callable[[], Load]):
        self._model, self._load = model, load

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        used = load.pages_used / load.pages if load.pages else 0.0
        gauges = {
            "num_requests_running": ("Requests that are being answered.", load.running),
            "num_requests_waiting": ("Requests that wait.", load.waiting),
            "kv_cache_usage_perc": ("Share of the cache's pages that running requests hold, 0 to 1.", used),
        }
        counters = {
            "num_preemptions": ("Requests that gave their pages back and were computed again.", load.preemptions),
            "prefix_cache_queries": ("Positions of prompts that were looked up.", load.prefix_queries),
            "prefix_cache_hits": ("Positions of prompts that were known.", load.prefix_hits),
            "compilations": ("Programs that were compiled since the server was ready.", load.compilations),
            "engine_steps": ("Steps of the engine.", load.steps),
            "tiles_encoded": ("Tiles of pictures that were computed.", load.tiles_encoded),
        }
        for kind, told in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (meaning, value) in told.items():
                family = kind(f"vllm:{name}", meaning, labels=("model_name",))
                family.add_metric((self._model,), value)
                yield family
