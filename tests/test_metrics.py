"""What a scrape shows is what was counted, under the names that dashboards know."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from config.settings import EngineSettings
from decoding.messages import Drafter, Load, StepReport
from decoding.reports import CycleTimes
from server.histogram import WeightedHistogram
from server.metrics import Metrics, exposition
from tests.scripted_engine import scripted_ready

GAUGES = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
GAUGES |= {"vllm:cache_config_info", "layerskip_worker_up", "layerskip_heartbeat_age_seconds"}
GAUGES |= {"layerskip_kv_blocks", "layerskip_acceptance_rate", "layerskip_drafting_worthwhile"}
GAUGES |= {"layerskip_chosen_exit_layer", "layerskip_chosen_draft_length"}
COUNTERS = {
    f"vllm:{name}"
    for name in (
        "prompt_tokens",
        "generation_tokens",
        "num_preemptions",
        "request_success",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
        "spec_decode_num_accepted_tokens_per_pos",
    )
}
COUNTERS |= {
    f"layerskip_{name}"
    for name in (
        "draft_tokens",
        "kept_tokens",
        "reached_tokens",
        "drafter_draft_tokens",
        "drafter_kept_tokens",
        "cycles",
        "draft_seconds",
        "verify_seconds",
        "host_seconds",
        "discarded_tokens",
        "rejected_requests",
        "aborted_requests",
        "worker_restarts",
        "requests_resumed",
        "out_of_memory",
    )
}
HISTOGRAMS = {
    f"vllm:{name}"
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_max_tokens",
        "request_params_n",
        "iteration_tokens_total",
    )
} | {"layerskip_inter_token_latency_seconds"}


class StillWorker:
    load = Load(
        num_running=2,
        num_used_blocks=3,
        num_free_blocks=9,
        num_preemptions_total=1,
        num_out_of_memory_total=4,
    )
    num_waiting = 5
    heartbeat_age_s = 0.25
    is_up = True


def ready_metrics() -> Metrics:
    metrics = Metrics(model_name="m")
    metrics.watch(StillWorker())
    metrics.worker_ready(scripted_ready(EngineSettings(), "{}"))
    return metrics


def samples_of(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = exposition([metrics]).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples_of(metrics)[name, tuple(sorted((labels | {"model_name": "m"}).items()))]


def test_every_series_is_there_from_the_start_with_its_type_and_model():
    text = exposition([ready_metrics()]).decode()
    families = list(text_string_to_metric_families(text))
    found = {
        kind: {family.name for family in families if family.type == kind}
        for kind in ("gauge", "counter", "histogram")
    }
    assert found == {"gauge": GAUGES, "counter": COUNTERS, "histogram": HISTOGRAMS}
    assert all(family.samples for family in families)
    assert all(sample.labels["model_name"] == "m" for family in families for sample in family.samples)


def test_gauges_are_read_off_the_worker():
    metrics = ready_metrics()
    assert value(metrics, "vllm:num_requests_running") == 2
    assert value(metrics, "vllm:num_requests_waiting") == 5
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25
    assert value(metrics, "layerskip_kv_blocks", state="free") == 9
    assert value(metrics, "vllm:num_preemptions_total") == 1
    assert value(metrics, "layerskip_out_of_memory_total") == 4
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="256") == 1


def test_drafts_are_counted_by_exit_layer_and_position():
    metrics = ready_metrics()
    metrics.drafts(exit_layer=2, drafted=3, kept=1)
    metrics.drafts(exit_layer=8, drafted=1, kept=1)
    metrics.drafts(exit_layer=8, drafted=0, kept=0)
    metrics.drafts(exit_layer=2, drafted=5, kept=4, drafter=Drafter.LOOKUP)
    assert value(metrics, "vllm:spec_decode_num_drafts_total") == 3
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 9
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 6
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position="0") == 3
    assert value(metrics, "layerskip_drafter_draft_tokens_total", drafter="lookup") == 5
    assert value(metrics, "layerskip_drafter_kept_tokens_total", drafter="early_exit") == 2
    at = {"exit_layer": "2", "position": "1"}
    assert value(metrics, "layerskip_draft_tokens_total", **at) == 1
    assert value(metrics, "layerskip_reached_tokens_total", **at) == 1
    assert value(metrics, "layerskip_kept_tokens_total", **at) == 0
    assert value(metrics, "layerskip_reached_tokens_total", exit_layer="2", position="2") == 0
    assert value(metrics, "layerskip_acceptance_rate", exit_layer="2") == 1 / 3


def test_step_times_add_up():
    metrics = ready_metrics()
    times = CycleTimes(draft_s=0.5, verify_s=0.25, host_s=0.125, num_tokens=40)
    for report in (StepReport([], Load(), times), StepReport([], Load()), StepReport([], Load(), times)):
        metrics.step(report)
    assert value(metrics, "layerskip_cycles_total") == 2
    assert value(metrics, "layerskip_draft_seconds_total") == 1.0
    assert value(metrics, "vllm:iteration_tokens_total_bucket", le="64.0") == 2
    assert value(metrics, "vllm:iteration_tokens_total_bucket", le="32.0") == 0


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 9.0]), st.integers(0, 3))))
def test_weighted_histogram_is_the_library_histogram_observed_repeatedly(observations):
    ours, theirs = (
        WeightedHistogram([1, 2]),
        Histogram("h", "h", buckets=[1, 2], registry=CollectorRegistry()),
    )
    for amount, weight in observations:
        ours.observe(amount, weight=weight)
        for _ in range(weight):
            theirs.observe(amount)
    (family,) = theirs.collect()
    assert dict(ours.buckets) == {s.labels["le"]: s.value for s in family.samples if s.name == "h_bucket"}
    assert ours.total == next(sample.value for sample in family.samples if sample.name == "h_sum")
