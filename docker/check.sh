#!/usr/bin/env bash
# Proves the monitoring configuration against a running server with the real prometheus and promtool:
# the configuration is valid, alerts fire when they should, the server is scraped, and every query of the dashboard
# returns series.
#   docker/check.sh [SERVER_URL]        default http://127.0.0.1:8000
#   API_KEY_FILE=FILE docker/check.sh   for a server that needs a key
#   WATCH_S=120 docker/check.sh         scrapes for that long; default 5
#   PLOT=FILE.png docker/check.sh       and draws the dashboard; PYTHON is one with matplotlib
set -euo pipefail
key_file=$(realpath "${API_KEY_FILE:-$(dirname "$0")/prometheus/api_key}")
plot=$(realpath "${PLOT:-/dev/null}")
cd "$(dirname "$0")"

target=${1:-http://127.0.0.1:8000}
target=${target#http://}
target=${target%%/*}
port=${PROMETHEUS_PORT:-19090}
prometheus=http://127.0.0.1:$port

for tool in promtool prometheus; do
    command -v "$tool" >/dev/null && continue
    echo "$tool is not installed (Debian: apt-get install prometheus)" >&2
    exit 2
done
promtool check config prometheus/prometheus.yml
promtool test rules prometheus/alerts_test.yml

pid=
work=$(mktemp -d)
trap 'kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; rm -rf "$work"' EXIT
cp "$key_file" "$work/api_key"
cp prometheus/alerts.yml "$work"
# The shipped configuration with this server for a target, and fast enough for rates within seconds.
sed -e "s/server:8000/$target/" -e 's/scrape_interval: .*/scrape_interval: 1s/' \
    -e 's/scrape_timeout: .*/scrape_timeout: 1s/' prometheus/prometheus.yml >"$work/prometheus.yml"
prometheus --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/data" \
    --web.listen-address="127.0.0.1:$port" >"$work/log" 2>&1 &
pid=$!

query() { promtool query instant "$prometheus" "$1"; }

up=
for _ in $(seq 30); do
    kill -0 "$pid" 2>/dev/null || { tail -n 3 "$work/log" >&2; exit 1; }
    up=$(query 'up{job="layerskip"} == 1' 2>/dev/null || true)
    [ -n "$up" ] && break
    sleep 0.5
done
[ -n "$up" ] || { echo "prometheus could not scrape http://$target/metrics" >&2; exit 1; }
echo "$up"
watch_s=${WATCH_S:-5} # Rates need several scrapes.
sleep "$watch_s"

# One line a query: the panel's title, a tab, and the expression with Grafana's variables filled in.
python3 - grafana/dashboards/layerskip.json >"$work/queries" <<'PYTHON'
import json, sys

variables = {"$model_name": ".*", "$__rate_interval": "10s", "$__range": "10s"}
for panel in json.load(open(sys.argv[1]))["panels"]:
    for target in panel.get("targets", []):
        expression = target["expr"]
        for name, value in variables.items():
            expression = expression.replace(name, value)
        print(panel["title"], expression, sep="\t")
PYTHON

failures=0
while IFS=$'\t' read -r title expression; do
    echo "== $title"
    result=$(query "$expression") || result=
    [ -n "$result" ] || { echo "NO SERIES: $expression"; failures=$((failures + 1)); continue; }
    echo "$result"
done <"$work/queries"
echo "== Alerts"
query 'ALERTS{alertstate="firing"}'
[ -z "${PLOT:-}" ] || "${PYTHON:-python3}" plot_dashboard.py "$prometheus" "$plot" --seconds "$watch_s"
echo "$(wc -l <"$work/queries") queries, $failures without series"
[ "$failures" -eq 0 ]
