"""The Grafana dashboard and the alerts ask only for what the server emits, and Grafana can load the dashboard."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

GRAFANA = Path(__file__).parents[1] / "docker" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "layerskip.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
ALERTS = [
    rule
    for group in yaml.safe_load((GRAFANA.parent / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))[
        "groups"
    ]
    for rule in group["rules"]
]
EXPRESSIONS = [target["expr"] for target in TARGETS]

# Strings, comments and bracketed durations are one token each, so that no word in them counts as a name.
TOKEN = re.compile(
    r"""
      "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | `[^`]*`
    | \#[^\n]*
    | \[[^\]]*\]
    | \d[\w.]* | \.\d[\w.]*
    | [A-Za-z_:][\w:]*
    | \S
    """,
    re.VERBOSE,
)
WORD = re.compile(r"[A-Za-z_:][\w:]*")
AGGREGATION_CLAUSES = {"by", "without"}
LABEL_LISTS = AGGREGATION_CLAUSES | {"on", "ignoring", "group_left", "group_right"}
OPERATORS = {"and", "or", "unless", "atan2", "bool", "offset"}


@dataclass(frozen=True, slots=True)
class Query:
    """The series a PromQL expression reads, each once per use, and the labels it speaks of."""

    series: list[str]
    labels: set[str]


def read_query(expression: str) -> Query:
    """Every word that is no label, function, aggregation, operator or number is a series: none can be missed.

    Raises ValueError for a selector that names its series inside the braces.
    """
    query = Query([], set())
    closing = ""
    for token, following in pairwise([*TOKEN.findall(expression), ""]):
        if closing:
            closing = "" if token == closing else closing
            query.labels.update(WORD.findall(token) if WORD.fullmatch(token) else ())
        elif token == "{":
            closing = "}"
        elif token in LABEL_LISTS:
            closing = ")" if following == "(" else ""
        elif is_series(token, following):
            query.series.append(token)
    if "__name__" in query.labels or re.search(r"""\{\s*["'`]""", expression):
        raise ValueError(f"name the series before the braces: {expression}")
    return query


def is_series(token: str, following: str) -> bool:
    called = following == "(" or following in AGGREGATION_CLAUSES
    return bool(WORD.fullmatch(token)) and token not in OPERATORS and not called


def read_samples(text: str) -> dict[str, set[str]]:
    """Sample name → the names of its labels, from a text exposition."""
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


def missing_series(expression: str, samples: dict[str, set[str]]) -> set[str]:
    return {name for name in read_query(expression).series if name not in samples}


@pytest.fixture(scope="module")
def samples(server) -> dict[str, set[str]]:
    """What a scrape of a running server finds when it asks as Prometheus does."""
    accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return read_samples(answer.read().decode())


@pytest.mark.parametrize(
    ("expression", "series", "labels"),
    [
        ("up", ["up"], set()),
        ("1e-9 + .5 * a:b_total offset 5m", ["a:b_total"], set()),
        ("sum by (x) (rate(a{m=~\"b{c} sum(d)\", n!~'e'}[$__rate_interval]))", ["a"], {"x", "m", "n"}),
        ("sum(rate(a[5m])) without (x) / on (y) group_left (z) clamp_min(b, 1)", ["a", "b"], {"x", "y", "z"}),
        ("max_over_time(rate(a[5m])[1h:1m]) > bool a and b unless c # d", ["a", "a", "b", "c"], set()),
        ('label_replace(a, "dst", "$1", "src", "(.*)")', ["a"], set()),
    ],
)
def test_the_reader_finds_every_series_and_nothing_else(expression, series, labels):
    assert read_query(expression) == Query(series, labels)


@pytest.mark.parametrize("expression", ['{__name__="a"}', 'rate({"a", m="b"}[5m])'])
def test_the_reader_refuses_a_name_it_could_miss(expression):
    with pytest.raises(ValueError, match="name the series before the braces"):
        read_query(expression)


def test_every_query_names_series_that_the_server_emits(samples):
    assert all(read_query(expression).series for expression in EXPRESSIONS)
    missing = {expression: missing_series(expression, samples) for expression in EXPRESSIONS}
    assert {expression: names for expression, names in missing.items() if names} == {}


def test_every_alert_names_series_that_the_server_emits(samples):
    """`up` is Prometheus's own."""
    missing = {rule["alert"]: missing_series(rule["expr"], samples) - {"up"} for rule in ALERTS}
    assert {alert: names for alert, names in missing.items() if names} == {}


def test_a_made_up_series_is_found_missing(samples):
    expression = EXPRESSIONS[-1] + " + histogram_quantile(0.5, sum by (le) (rate(vllm:made_up_bucket[5m])))"
    assert missing_series(expression, samples) == {"vllm:made_up_bucket"}


def test_every_query_speaks_of_labels_that_its_series_have(samples):
    for query in map(read_query, EXPRESSIONS):
        for name in query.series:
            assert query.labels <= samples[name]


def test_every_series_of_a_query_is_filtered_by_the_chosen_model():
    for expression in EXPRESSIONS:
        filtered = re.findall(r'([\w:]+)\{model_name=~"\$model_name"\}', expression)
        assert filtered == read_query(expression).series


def test_no_query_divides_by_zero():
    for expression in EXPRESSIONS:
        assert expression.count("/") == expression.count(" / clamp_min(")


def test_a_legend_shows_only_labels_that_its_query_keeps():
    for target in TARGETS:
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept - {"le"}


def test_the_main_questions_have_a_panel():
    shown = {name for expression in EXPRESSIONS for name in read_query(expression).series}
    assert shown >= {
        "layerskip_acceptance_rate",
        "layerskip_kept_tokens_total",
        "layerskip_draft_tokens_total",
        "layerskip_reached_tokens_total",
        "vllm:spec_decode_num_drafts_total",
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:time_to_first_token_seconds_bucket",
        "layerskip_inter_token_latency_seconds_bucket",
        "vllm:kv_cache_usage_perc",
    }


def test_panels_are_numbered_once_and_do_not_overlap():
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    cells = {panel["id"]: set(grid_cells(panel)) for panel in DASHBOARD["panels"]}
    assert all(0 <= x < 24 for covered in cells.values() for x, _ in covered)
    assert not any(cells[one] & cells[other] for one, other in combinations(numbers, 2))


def grid_cells(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    at = panel["gridPos"]
    return ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))


def test_queries_of_a_panel_are_lettered_once():
    for panel in PANELS:
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


def test_the_dashboard_asks_the_provisioned_data_source():
    (source,) = read_yaml("provisioning/datasources/prometheus.yaml")["datasources"]
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    assert variables["datasource"]["query"] == source["type"] == "prometheus"
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}


def test_the_model_variable_lists_the_models_of_a_series_that_the_server_emits(samples):
    (variable,) = [each for each in DASHBOARD["templating"]["list"] if each["name"] == "model_name"]
    series, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", variable["definition"]).groups()
    assert label in samples[series]
    assert variable["query"]["query"] == variable["definition"]


def test_the_provisioned_folder_is_where_compose_mounts_the_dashboards():
    (provider,) = read_yaml("provisioning/dashboards/layerskip.yaml")["providers"]
    grafana = yaml.safe_load((GRAFANA.parent / "compose.cpu.yaml").read_text())["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]


def read_yaml(path: str) -> dict[str, Any]:
    return yaml.safe_load((GRAFANA / path).read_text(encoding="utf-8"))
