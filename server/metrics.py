"""Everything `/metrics` shows of one model, under vLLM's names where vLLM has the series.

Knows what is counted and in which buckets. What happens on every token is counted in plain numbers and
becomes series at a scrape (`metric_families`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import Metric

from decoding.messages import Drafter, Ready, StepReport
from decoding.reports import Beliefs, CycleTimes
from server.drafts import AcceptanceWindow, DraftTally
from server.histogram import WeightedHistogram
from server.metric_families import AtScrape, Families, WorkerGauges

# The one format every scraper reads. The library's OpenMetrics writer turns the colon of a name into an
# underscore, and no dashboard would find it again.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# fmt: off
_TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560,
)
_TOKEN_TIME_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)
# Steps of a small or well-drafted model take milliseconds, where the bounds above see nothing.
_FINE_TOKEN_TIME_BUCKETS: Final = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1,
)
_REQUEST_TIME_BUCKETS: Final = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
_STEP_TOKEN_BUCKETS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TOKEN_BUCKETS: Final = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
_CHOICE_BUCKETS: Final = (1, 2, 5, 10, 20)
# fmt: on

_FINISHED: Final = ("stop", "length", "abort", "error")
_REJECTED: Final = (
    *("invalid", "unsupported", "context", "model", "too_large", "unauthorized", "draining", "queue_full"),
    *("queue_timeout", "request_timeout", "slow_reader", "unavailable"),
)


class StepTotals:
    """Sums over the worker's steps."""

    def __init__(self) -> None:
        self.num_cycles = 0
        self.draft_s = 0.0
        self.verify_s = 0.0
        self.host_s = 0.0
        self.step_tokens = WeightedHistogram(_STEP_TOKEN_BUCKETS)

    def add(self, times: CycleTimes) -> None:
        """Count a step that decoded."""
        self.num_cycles += 1
        self.draft_s += times.draft_s
        self.verify_s += times.verify_s
        self.host_s += times.host_s
        self.step_tokens.observe(times.num_tokens, weight=1)

    def families(self, make: Families) -> Iterator[Metric]:
        """The sums as series."""
        yield make.counter("layerskip_cycles", "Steps that decoded.", self.num_cycles)
        yield make.counter("layerskip_draft_seconds", "Time spent drafting.", self.draft_s)
        yield make.counter("layerskip_verify_seconds", "Time spent verifying.", self.verify_s)
        yield make.counter("layerskip_host_seconds", "Time spent outside the model.", self.host_s)
        yield make.histogram("vllm:iteration_tokens_total", "Tokens computed in one step.", self.step_tokens)


def exposition(models: Iterable[Metrics]) -> bytes:
    """The body of a scrape, of type `CONTENT_TYPE`: every family once, with the samples of every model."""
    together: dict[str, Metric] = {}
    for family in chain.from_iterable(metrics.families() for metrics in models):
        together.setdefault(
            family.name, Metric(family.name, family.documentation, family.type)
        ).samples.extend(family.samples)
    registry = CollectorRegistry()
    registry.register(AtScrape(together.values))
    return generate_latest(registry)


class Metrics:
    """The series of one model. Only the event loop writes and reads them."""

    def __init__(self, *, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._drafts = DraftTally()
        self._windows: dict[int, AcceptanceWindow] = {}
        self._steps = StepTotals()
        self._discarded_tokens = 0
        self._token_times = WeightedHistogram(_TOKEN_TIME_BUCKETS)
        self._fine_token_times = WeightedHistogram(_FINE_TOKEN_TIME_BUCKETS)
        self._worker: WorkerGauges | None = None
        self._ready: Ready | None = None
        self.beliefs: Beliefs | None = None
        self._make_counters()
        self._make_histograms()
        self._registry.register(AtScrape(self._at_scrape))

    def _make_counters(self) -> None:
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of answers that began.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens delivered to answers.")
        self.aborted = self._counter("layerskip_aborted_requests", "Sequences their client gave up.")
        self.restarts = self._counter("layerskip_worker_restarts", "Workers started after one had died.")
        self.resumed = self._counter("layerskip_requests_resumed", "Requests that outlived their worker.")
        self._finished = self._counter_by("vllm:request_success", "Finished sequences.", "finished_reason")
        self._rejected = self._counter_by(
            "layerskip_rejected_requests", "Requests refused or given up.", "reason"
        )
        for reason in _FINISHED:
            self._finished.labels(self._model_name, reason)
        for reason in _REJECTED:
            self._rejected.labels(self._model_name, reason)

    def _make_histograms(self) -> None:
        self.first_token_s = self._histogram("time_to_first_token_seconds", _TTFT_BUCKETS)
        self.per_token_s = self._histogram("request_time_per_output_token_seconds", _TOKEN_TIME_BUCKETS)
        self.end_to_end_s = self._histogram("e2e_request_latency_seconds", _REQUEST_TIME_BUCKETS)
        self.queue_s = self._histogram("request_queue_time_seconds", _REQUEST_TIME_BUCKETS)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", _TOKEN_BUCKETS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", _TOKEN_BUCKETS)
        self.request_max_tokens = self._histogram("request_params_max_tokens", _TOKEN_BUCKETS)
        self.request_n = self._histogram("request_params_n", _CHOICE_BUCKETS)

    def watch(self, worker: WorkerGauges) -> None:
        """Read the gauges off `worker` at every scrape."""
        self._worker = worker

    def worker_ready(self, ready: Ready) -> None:
        """Show the cache's size, and the first exit layer's series at 0; a new worker has beliefs of its own."""
        self._ready, self.beliefs = ready, None
        self._windows.setdefault(ready.limits.first_exit_layer, AcceptanceWindow())

    def step(self, report: StepReport) -> None:
        """Count a step of the worker, and take over what it believes by now if it says so."""
        if report.times is not None:
            self._steps.add(report.times)
        if report.beliefs is not None:
            self.beliefs = report.beliefs

    def discarded(self, num_tokens: int) -> None:
        """Count tokens that were decoded and not delivered."""
        self._discarded_tokens += num_tokens

    def drafts(
        self, *, exit_layer: int, drafted: int, kept: int, drafter: Drafter = Drafter.EARLY_EXIT
    ) -> None:
        """Count one sequence's cycle, as its answer does. Only drafts by early exit say anything of a layer."""
        self._drafts.record(exit_layer=exit_layer, drafted=drafted, kept=kept, drafter=drafter)
        if drafted and drafter is Drafter.EARLY_EXIT:
            self._windows.setdefault(exit_layer, AcceptanceWindow()).record(drafted=drafted, kept=kept)

    def token_gap(self, seconds_per_token: float, *, num_tokens: int) -> None:
        """Count the time between tokens; those of one run share the time since the run before."""
        self._token_times.observe(seconds_per_token, weight=num_tokens)
        self._fine_token_times.observe(seconds_per_token, weight=num_tokens)

    def finished(self, reason: str) -> None:
        """Count a sequence's end."""
        self._finished.labels(self._model_name, reason).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that was not let in."""
        self._rejected.labels(self._model_name, reason).inc()

    def families(self) -> Iterable[Metric]:
        """All series as they are now."""
        return self._registry.collect()

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _counter_by(self, name: str, help_text: str, label: str) -> Counter:
        return Counter(name, help_text, ["model_name", label], registry=self._registry)

    def _histogram(self, name: str, buckets: Sequence[float]) -> Histogram:
        help_text = f"{name.replace('_', ' ').capitalize()}."
        histogram = Histogram(
            f"vllm:{name}", help_text, ["model_name"], registry=self._registry, buckets=list(buckets)
        )
        return histogram.labels(self._model_name)

    def _at_scrape(self) -> Iterator[Metric]:
        make = Families(self._model_name)
        if self._worker is not None:
            yield from make.worker(self._worker)
        if self._ready is not None:
            yield make.cache(self._ready.limits)
        if self.beliefs is not None:
            yield make.expected_acceptance(self.beliefs)
        yield from self._steps.families(make)
        yield from make.drafts(self._drafts, self._windows)
        yield make.counter("layerskip_discarded_tokens", "Tokens not delivered.", self._discarded_tokens)
        gap = "Time between two tokens of a sequence."
        yield make.histogram("vllm:inter_token_latency_seconds", gap, self._token_times)
        yield make.histogram("layerskip_inter_token_latency_seconds", gap, self._fine_token_times)
