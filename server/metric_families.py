"""Series made when someone scrapes, from numbers that are too busy to be series themselves.

Knows names and labels; the numbers' owners know what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from decoding.messages import Drafter, Limits, Load
from decoding.reports import Beliefs
from server.drafts import AcceptanceWindow, DraftTally, PositionCounts
from server.histogram import WeightedHistogram

_NOTHING: Final = PositionCounts(proposed=0, reached=0, kept=0)


class WorkerGauges(Protocol):
    """What a scrape reads off the worker's client."""

    @property
    def load(self) -> Load:
        """How full the worker was after its last step."""

    @property
    def num_waiting(self) -> int:
        """Sequences the worker does not run yet."""

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the worker was last heard."""

    @property
    def is_up(self) -> bool:
        """Whether the worker serves."""


class AtScrape(Collector):
    """Asks for families at every scrape."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """What the registry asks for."""
        return self._families()


class Families:
    """Makes families that all carry the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def gauge(
        self, name: str, help_text: str, value: float, labels: Mapping[str, str] | None = None
    ) -> Metric:
        """A gauge with one sample."""
        extra = labels or {}
        family = GaugeMetricFamily(name, help_text, labels=["model_name", *extra])
        family.add_metric([self._model_name, *extra.values()], value)
        return family

    def counter(self, name: str, help_text: str, value: float) -> Metric:
        """A counter with one sample."""
        family = CounterMetricFamily(name, help_text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def counters(
        self,
        name: str,
        help_text: str,
        *,
        labels: tuple[str, ...],
        values: Iterable[tuple[Sequence[int | str], float]],
    ) -> Metric:
        """A counter with a sample for every combination of labels of `values`."""
        family = CounterMetricFamily(name, help_text, labels=["model_name", *labels])
        for key, value in values:
            family.add_metric([self._model_name, *map(str, key)], value)
        return family

    def histogram(self, name: str, help_text: str, histogram: WeightedHistogram) -> Metric:
        """A histogram."""
        family = HistogramMetricFamily(name, help_text, labels=["model_name"])
        family.add_metric([self._model_name], histogram.buckets, histogram.total)
        return family

    def worker(self, worker: WorkerGauges) -> Iterator[Metric]:
        """How full the worker is, and whether it lives."""
        load = worker.load
        num_blocks = max(1, load.num_used_blocks + load.num_free_blocks)
        yield self.gauge("vllm:num_requests_running", "Sequences decoding.", load.num_running)
        yield self.gauge("vllm:num_requests_waiting", "Sequences waiting to decode.", worker.num_waiting)
        yield self.gauge(
            "vllm:kv_cache_usage_perc",
            "Share of KV blocks in use, 0 to 1.",
            load.num_used_blocks / num_blocks,
        )
        yield self._blocks(load)
        yield self.counter("vllm:num_preemptions", "Sequences set back.", load.num_preemptions_total)
        yield self.counter(
            "layerskip_out_of_memory",
            "Steps for which the device's memory ran out.",
            load.num_out_of_memory_total,
        )
        yield self.counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up.", load.prefix_cache_queried_tokens_total
        )
        yield self.counter(
            "vllm:prefix_cache_hits", "Prompt tokens found.", load.prefix_cache_hit_tokens_total
        )
        yield self.gauge(
            "layerskip_chosen_exit_layer",
            "Exit layer chosen last where a request left it open.",
            load.chosen_exit_layer,
        )
        yield self.gauge(
            "layerskip_chosen_draft_length",
            "Draft length chosen last where a request left it open, mean of the rows.",
            load.chosen_draft_length,
        )
        yield self.gauge(
            "layerskip_drafting_worthwhile",
            "0 once no draft of this checkpoint was found to pay.",
            load.is_drafting_worthwhile,
        )
        yield self.gauge("layerskip_worker_up", "1 while the worker serves.", worker.is_up)
        yield self.gauge(
            "layerskip_heartbeat_age_seconds", "Time since the worker was last heard.", worker.heartbeat_age_s
        )

    def _blocks(self, load: Load) -> Metric:
        family = GaugeMetricFamily(
            "layerskip_kv_blocks", "KV blocks by state.", labels=["model_name", "state"]
        )
        family.add_metric([self._model_name, "used"], load.num_used_blocks)
        family.add_metric([self._model_name, "free"], load.num_free_blocks)
        return family

    def cache(self, limits: Limits) -> Metric:
        """The size of the KV cache, as labels."""
        labels = {"block_size": str(limits.block_size), "num_gpu_blocks": str(limits.num_blocks)}
        return self.gauge("vllm:cache_config_info", "Size of the KV cache.", 1, labels)

    def expected_acceptance(self, beliefs: Beliefs) -> Metric:
        """How the drafts that choices are made of are expected to fare."""
        family = GaugeMetricFamily(
            "layerskip_expected_acceptance",
            "How likely a cycle's first draft is thought to be kept, at exit layers that were tried.",
            labels=["model_name", "exit_layer"],
        )
        for layer in beliefs.exit_layers:
            family.add_metric([self._model_name, str(layer.exit_layer)], layer.acceptance[0])
        return family

    def drafts(self, tally: DraftTally, windows: Mapping[int, AcceptanceWindow]) -> Iterator[Metric]:
        """Drafts over all, by position, and by exit layer and position; layers of `windows` always show."""
        none = {(layer, 0): _NOTHING for layer in windows}
        counts = none | tally.by_position(Drafter.EARLY_EXIT)
        by_anyone = none | tally.by_position(*Drafter)
        yield self.counter("vllm:spec_decode_num_drafts", "Cycles that drafted.", tally.num_drafts)
        yield self.counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", tally.num_draft_tokens)
        yield self.counter("vllm:spec_decode_num_accepted_tokens", "Drafts kept.", tally.num_kept_tokens)
        yield self.counters(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts kept by position.",
            labels=("position",),
            values=_kept_by_position(by_anyone).items(),
        )
        for name, help_text, values in (
            ("draft", "Tokens drafted", {key: count.proposed for key, count in counts.items()}),
            ("reached", "Drafts whose predecessors were all kept", {k: c.reached for k, c in counts.items()}),
            ("kept", "Drafts kept", {key: count.kept for key, count in counts.items()}),
        ):
            yield self.counters(
                f"layerskip_{name}_tokens",
                f"{help_text}, by exit layer and position.",
                labels=("exit_layer", "position"),
                values=values.items(),
            )
        for name, help_text, of_drafter in (
            ("draft", "Tokens drafted, by drafter.", tally.by_drafter),
            ("kept", "Drafts kept, by drafter.", tally.kept_by_drafter),
        ):
            yield self.counters(
                f"layerskip_drafter_{name}_tokens",
                help_text,
                labels=("drafter",),
                values=[((drafter,), count) for drafter, count in of_drafter.items()],
            )
        yield self._acceptance(windows)

    def _acceptance(self, windows: Mapping[int, AcceptanceWindow]) -> Metric:
        family = GaugeMetricFamily(
            "layerskip_acceptance_rate",
            "Kept over drafted of the latest thousand drafts.",
            labels=["model_name", "exit_layer"],
        )
        for layer, window in sorted(windows.items()):
            family.add_metric([self._model_name, str(layer)], window.rate)
        return family


def _kept_by_position(counts: Mapping[tuple[int, int], PositionCounts]) -> dict[tuple[int], int]:
    kept: dict[tuple[int], int] = {}
    for (_, position), count in counts.items():
        kept[position,] = kept.get((position,), 0) + count.kept
    return dict(sorted(kept.items()))
