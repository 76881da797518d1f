"""The container files agree with each other and with what they promise; no container runtime is needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.setting_sources import ENV_PREFIX
from config.settings import Settings
from server.auth import OPEN_PATHS
from server.status_routes import router as status_router

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = {name: yaml.safe_load((DOCKER / name).read_text()) for name in ("compose.yaml", "compose.cpu.yaml")}
CPU_SERVICES = COMPOSE["compose.cpu.yaml"]["services"]


def read_stages() -> list[list[str]]:
    """The Dockerfile's instructions, comments dropped and continued lines joined, one list a stage.

    What stands before the first FROM is stage 0.
    """
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: list[list[str]] = [[]]
    for line in filter(None, text.replace("\\\n", " ").split("\n")):
        if line.startswith("FROM "):
            stages.append([])
        stages[-1].append(re.sub(r"\s+", " ", line.strip()))
    return stages


GLOBAL, BUILDER, FINAL = read_stages()


def arguments(instruction: str) -> str:
    """What the only use of an instruction in the final stage says."""
    (line,) = [line for line in FINAL if line.startswith(instruction + " ")]
    return line.removeprefix(instruction + " ")


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in arguments("ENV").split())


def test_the_base_image_is_an_argument_of_both_stages():
    assert GLOBAL == ["ARG BASE=python:3.12-slim"]
    assert BUILDER[0] == "FROM ${BASE} AS builder"
    assert FINAL[0] == "FROM ${BASE}"


def test_the_entry_point_is_exec_form_so_that_the_server_gets_the_stop_signal():
    assert json.loads(arguments("ENTRYPOINT")) == ["layerskip"]
    assert json.loads(arguments("CMD")) == ["serve", "--host", "0.0.0.0"]
    assert arguments("STOPSIGNAL") == "SIGTERM"


def test_the_image_does_not_run_as_root():
    user, _ = arguments("USER").split(":")
    assert int(user) > 0
    assert not any(line.startswith("RUN ") for line in FINAL[FINAL.index(f"USER {arguments('USER')}") :])


def test_the_health_check_is_a_program_that_compiles_and_asks_for_health():
    options, command = arguments("HEALTHCHECK").split(" CMD ")
    python, *_, program = json.loads(command)
    assert python == "python"
    compile(program, "<healthcheck>", "exec")
    assert "/health'" in program
    assert "--start-period" in options
    assert environment()["LAYERSKIP_PORT"] in arguments("EXPOSE")


def test_the_image_sets_settings_that_exist():
    names = {name.removeprefix(ENV_PREFIX).lower() for name in environment() if name.startswith(ENV_PREFIX)}
    assert names == {"host", "port"}
    assert names <= Settings.model_fields.keys()


def test_what_is_written_at_run_time_lies_on_the_volume():
    volume = arguments("VOLUME")
    assert environment()["HF_HOME"] == f"{volume}/huggingface"
    assert environment()["TRITON_CACHE_DIR"] == f"{volume}/triton"
    assert any(f"{volume}/huggingface {volume}/triton" in line for line in FINAL if line.startswith("RUN "))


def test_triton_finds_a_compiler_and_headers():
    (packages,) = [line for line in FINAL if "apt-get install" in line]
    assert {"gcc", "libc6-dev"} <= set(packages.split())
    assert any("Python.h" in line for line in FINAL if line.startswith("RUN test -f "))


def test_the_image_asks_for_the_torch_that_the_project_asks_for():
    wanted = re.search(r'"(torch[^"]*)"', (ROOT / "pyproject.toml").read_text()).group(1)
    assert any(f"'{wanted}'" in line for line in BUILDER)


def test_the_build_context_holds_what_the_dockerfile_copies():
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [word for line in BUILDER if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "README.md", "config", "decoding", "server"} <= set(copied)
    assert not set(copied) & set(ignored)
    assert [path for path in copied if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", sorted(COMPOSE))
def test_compose_refers_to_files_and_services_that_exist(name):
    for service in COMPOSE[name]["services"].values():
        if "extends" in service:
            base = yaml.safe_load((DOCKER / service["extends"]["file"]).read_text())["services"]
            assert service["extends"]["service"] in base
    assert COMPOSE[name]["services"].keys() == CPU_SERVICES.keys()
    assert COMPOSE[name]["volumes"].keys() == {source for source in mounts() if not source.startswith(".")}


def mounts() -> dict[str, str]:
    """Source → target of every mount of the base compose file."""
    lines = [line for service in CPU_SERVICES.values() for line in service["volumes"]]
    return {source: target for source, target, *_ in (line.split(":") for line in lines)}


def test_what_compose_mounts_from_the_checkout_exists_and_is_read_only():
    for line in (line for service in CPU_SERVICES.values() for line in service["volumes"]):
        if line.startswith("."):
            assert (DOCKER / line.split(":")[0]).is_dir()
            assert line.endswith(":ro")
    assert (DOCKER / CPU_SERVICES["server"]["build"]["context"] / "Dockerfile").is_file()
    assert mounts()["cache"] == arguments("VOLUME")


@pytest.mark.parametrize("service", CPU_SERVICES.values(), ids=CPU_SERVICES)
def test_every_container_is_confined(service):
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert all(published(port).startswith("127.0.0.1:") for port in service["ports"])


def published(value: str) -> str:
    """A value of compose with its variables at their defaults."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def test_only_the_gpu_file_reserves_a_gpu():
    (device,) = gpu_reservation(COMPOSE["compose.yaml"]["services"]["server"])
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in CPU_SERVICES["server"]


def gpu_reservation(service: dict[str, Any]) -> list[dict[str, Any]]:
    return service["deploy"]["resources"]["reservations"]["devices"]


def test_the_dashboard_opens_when_there_is_something_to_see():
    conditions = {name: each["condition"] for name, each in CPU_SERVICES["grafana"]["depends_on"].items()}
    assert conditions == {"prometheus": "service_healthy", "server": "service_healthy"}
    assert "healthcheck" in CPU_SERVICES["prometheus"]


def test_prometheus_and_grafana_find_each_other_by_the_names_in_compose():
    scraped = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{environment()['LAYERSKIP_PORT']}"]}]
    provisioned = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    (source,) = provisioned["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]


def test_prometheus_sends_the_key_that_the_server_asks_for():
    (job,) = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    key_file = job["authorization"]["credentials_file"]
    (secret,) = CPU_SERVICES["prometheus"]["secrets"]
    assert secret == {"source": "api_key", "target": f"{mounts()['./prometheus']}/{key_file}"}
    assert CPU_SERVICES["server"]["secrets"] == ["api_key"]
    chosen = CPU_SERVICES["server"]["environment"]["LAYERSKIP_API_KEY_FILE"]
    assert chosen == "${API_KEY_FILE:+/run/secrets/api_key}"
    assert "api_key_file" in Settings.model_fields


@pytest.mark.parametrize("name", sorted(COMPOSE))
def test_without_a_key_file_prometheus_has_a_placeholder_to_mount(name):
    file = published(COMPOSE[name]["secrets"]["api_key"]["file"])
    assert (DOCKER / file).read_text() == "none\n"


@pytest.mark.parametrize("name", sorted(COMPOSE))
def test_containers_are_not_killed_while_they_drain(name):
    service = COMPOSE[name]["services"]["server"]
    grace = service.get("stop_grace_period", CPU_SERVICES["server"]["stop_grace_period"])
    assert float(grace.removesuffix("s")) > Settings.model_fields["drain_timeout_s"].default


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_configuration():
    command = ["promtool", "check", "config", str(DOCKER / "prometheus/prometheus.yml")]
    assert subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_every_query_of_the_dashboard(tmp_path):
    panels = json.loads((DOCKER / "grafana/dashboards/layerskip.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    numbered = enumerate(re.sub(r"\[\$\w+\]", "[1m]", query) for query in queries)
    rules = [{"record": f"query:{number}", "expr": query} for number, query in numbered]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    command = ["promtool", "check", "rules", str(tmp_path / "rules.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_alerts_fire_when_they_should_and_not_otherwise():
    command = ["promtool", "test", "rules", str(DOCKER / "prometheus/alerts_test.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_has_a_summary_a_remedy_and_a_case_that_fires():
    rules = yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    names = [rule["alert"] for rule in rules]
    assert len(names) == len(set(names))
    cases = (DOCKER / "prometheus/alerts_test.yml").read_text()
    assert set(re.findall(r'alertname="(\w+)", alertstate="firing"', cases)) == set(names)
    for rule in rules:
        assert rule["annotations"].keys() == {"summary", "remedy"}
        assert rule["labels"]["severity"] in {"critical", "warning"}


MANIFEST = list(yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text()))
POD = MANIFEST[0]["spec"]["template"]["spec"]
(POD_SERVER,) = POD["containers"]


def test_probes_ask_routes_that_exist_and_need_no_key():
    asked = {
        kind: POD_SERVER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")
    }
    assert set(asked.values()) <= {route.path for route in status_router.routes} & OPEN_PATHS
    # A server that loads or drains is alive and not ready.
    assert asked == {"startup": "/health/live", "liveness": "/health/live", "readiness": "/health/ready"}


def test_the_documented_routes_of_health_exist():
    text = (DOCKER / "README.md").read_text()
    section = text[text.index("## Health") : text.index("## The dashboard")]
    named = set(re.findall(r"`(/[a-z/]+)`", section))
    assert {"/health/live", "/health/ready", "/ping"} <= named
    assert named <= {route.path for route in status_router.routes}


def test_a_pod_has_time_to_pause_and_to_drain():
    chosen = {pair["name"]: pair["value"] for pair in POD_SERVER["env"]}
    names = {name.removeprefix(ENV_PREFIX).lower() for name in chosen}
    assert names <= Settings.model_fields.keys()
    _, pause_s = POD_SERVER["lifecycle"]["preStop"]["exec"]["command"]
    drain_s = float(chosen["LAYERSKIP_DRAIN_TIMEOUT_S"])
    assert POD["terminationGracePeriodSeconds"] > int(pause_s) + drain_s


def test_a_pod_is_confined_as_the_image_is():
    assert f"{POD['securityContext']['runAsUser']}:{POD['securityContext']['fsGroup']}" == arguments("USER")
    assert POD_SERVER["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    mounted = {mount["mountPath"]: mount["name"] for mount in POD_SERVER["volumeMounts"]}
    assert {arguments("VOLUME"), "/tmp"} <= mounted.keys()
    assert set(mounted.values()) == {volume["name"] for volume in POD["volumes"]}
    (port,) = POD_SERVER["ports"]
    assert str(port["containerPort"]) == environment()["LAYERSKIP_PORT"]
    assert MANIFEST[1]["spec"]["selector"] == MANIFEST[0]["spec"]["selector"]["matchLabels"]
