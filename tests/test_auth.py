"""Without a key of the server's, nothing but its health can be learned; keys show up nowhere."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.errors import SettingsError
from config.settings import Settings
from server.app import create_app
from server.auth import OPEN_PATHS, ApiKeys
from tests.server_process import REAL, SCRIPTED, Server, run_to_end, running, wait_until

KEYS = ("sk-first-key-0123456789", "sk-second-key-9876543210")
BEARING = {"Authorization": f"Bearer {KEYS[1]}"}
HOSTILE_HOSTS = (
    "localhost/health?",
    "localhost/health#",
    "127.0.0.1/ping?x=",
    "health",
    "/health",
    "a@b/health",
    "[::1]/health",
    "localhost:99999",
    "x" * 300,
    "..%2fhealth",
    "localhost\\health",
    "",
)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A scripted server with one key from the environment and one from a file."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"# for the tests\n\n{KEYS[1]}\n")
    flags = ("--api-key-file", str(folder / "keys"), "--cors-origins", "https://page.example")
    with running(SCRIPTED, folder, *flags, environment={"LAYERSKIP_API_KEY": KEYS[0]}) as server:
        server.wait_ready()
        yield server


def routes(server: Server) -> list[tuple[str, str]]:
    described = server.get("/openapi.json", BEARING).json["paths"]
    return [(method.upper(), path) for path, methods in described.items() for method in methods]


def guarded_routes(server: Server) -> list[tuple[str, str]]:
    """All that the document describes but what is open, the document itself, and what is not there."""
    known = [
        (method, path.replace("{name}", "x")) for method, path in routes(server) if path not in OPEN_PATHS
    ]
    return [*known, ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "/health/x")]


def ask(server: Server, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()


def test_every_route_but_health_needs_a_key(guarded):
    assert {("POST", "/v1/completions"), ("GET", "/metrics")} <= set(guarded_routes(guarded))
    for method, path in guarded_routes(guarded):
        status, headers = ask(guarded, method, path, {"Content-Length": "0"})
        assert status == 401, path
        assert headers["www-authenticate"] == "Bearer"
    for method, path in [("GET", "/"), *routes(guarded)]:
        if path in OPEN_PATHS:
            assert ask(guarded, method, path, {"Content-Length": "0"})[0] == 200, path


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/ping"])
def test_only_who_bears_a_key_learns_from_health_what_is_served(guarded, path):
    assert guarded.get(path).json == {"status": "ready"}
    assert guarded.get(path, {"Authorization": "Bearer wrong"}).json == {"status": "ready"}
    assert list(guarded.get(path, BEARING).json["models"]) == ["python-8m"]


def test_refusal_is_openais_error_and_is_counted(guarded):
    before = metric(guarded, "unauthorized")
    answer = guarded.post({"prompt": "a"}, headers={"Authorization": "Bearer sk-wrong"})
    assert answer.status == 401
    assert answer.error["code"] == "invalid_api_key"
    assert answer.error["type"] == "invalid_request_error"
    assert "sk-wrong" not in answer.body.decode()
    assert answer.headers["x-request-id"]
    assert metric(guarded, "unauthorized") == before + 1


def metric(server: Server, reason: str) -> float:
    lines = server.get("/metrics", BEARING).body.decode().splitlines()
    (line,) = [
        line for line in lines if line.startswith("layerskip_rejected") and f'reason="{reason}"' in line
    ]
    return float(line.split()[-1])


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_every_route(guarded, key):
    headers = {"Authorization": f"bearer {key}"}
    assert guarded.post({"prompt": "a", "max_tokens": 2}, headers=headers).status == 200
    assert guarded.get("/metrics", headers).status == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {KEYS[0]}",
        KEYS[0],
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0]},{KEYS[1]}",
    ],
)
def test_what_is_not_exactly_a_bearer_key_is_refused(guarded, authorization):
    assert ask(guarded, "GET", "/v1/models", {"Authorization": authorization})[0] == 401


@pytest.mark.parametrize("host", HOSTILE_HOSTS)
def test_no_host_header_opens_a_route(guarded, host):
    for method, path in guarded_routes(guarded):
        status, _ = ask(guarded, method, path, {"Host": host, "Content-Length": "0"})
        assert status == 401, (method, path)


def test_no_other_path_is_open_than_health_and_the_page(guarded):
    """Whatever routes may come: the gate knows what is open, and all else is not."""
    assert {"/", "/health", "/health/live", "/health/ready", "/ping"} == OPEN_PATHS
    for path in OPEN_PATHS - {"/"}:
        for variant in (
            f"/{path}",
            f"{path}/",
            f"{path}/x",
            path.upper(),
            f"{path}%2f",
            f"{path};x",
            f"/v1/..{path}",
        ):
            assert ask(guarded, "GET", variant, {})[0] == 401, variant


def test_keys_are_in_no_log_answer_or_process_listing(guarded):
    guarded.post({"prompt": "a", "max_tokens": 2}, headers=BEARING)
    guarded.post({"prompt": 1}, headers=BEARING)
    shown = guarded.get("/server_info", BEARING)
    listings = [
        Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
        for pid in (guarded.process.pid, shown.json["worker_pid"])
    ]
    wait_until(lambda: "/server_info" in guarded.stderr)
    for text in (guarded.stderr, shown.body.decode(), *listings):
        assert not any(key in text for key in KEYS)


def test_pages_of_the_origins_chosen_may_read_answers_and_no_others(guarded):
    chosen, other = (
        ask(guarded, "GET", "/v1/models", {"Origin": origin, **BEARING})[1]
        for origin in ("https://page.example", "https://other.example")
    )
    assert chosen["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in other
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "authorization,content-type"}
    assert ask(guarded, "OPTIONS", "/v1/completions", asked)[0] == 200


def test_no_page_may_read_answers_unless_the_operator_says_so(scripted):
    headers = ask(scripted, "GET", "/v1/models", {"Origin": "https://page.example"})[1]
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no key"),
        ("# only this\n", "holds no key"),
        ("a key\n", "no space"),
        (None, "cannot be read"),
    ],
)
def test_file_without_usable_keys_does_not_open_the_server(tmp_path, content, words):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError) as caught:
        ApiKeys.chosen(Settings.load({"api_key_file": str(path)}))
    assert words in str(caught.value)
    assert "a key\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "sk-a b", "sk-a,,sk-b", "sk-\u00e9"])
def test_unusable_key_is_refused_and_not_shown(key):
    with pytest.raises(SettingsError) as caught:
        Settings.load({"api_key": key})
    assert str(caught.value).startswith("api-key (not shown): ")
    assert "sk-" not in str(caught.value)


def test_repeated_flag_gives_every_key(tmp_path):
    done = run_to_end(*REAL, "--api-key", "sk-good", "--api-key", "sk bad")
    assert done.returncode == 1
    assert done.stderr.startswith("layerskip: api-key (not shown): ")
    assert "sk" not in done.stderr.replace("layerskip", "").replace("LAYERSKIP", "")


def test_broken_settings_file_does_not_show_the_keys_in_it(tmp_path):
    (tmp_path / "settings.yaml").write_text('api_key: "sk-secret\nport: [')
    with pytest.raises(SettingsError) as caught:
        Settings.load({"config": str(tmp_path / "settings.yaml")})
    assert "sk-secret" not in str(caught.value)


def test_keys_are_separated_by_commas_and_hidden():
    settings = Settings.load({"api_key": "sk-a, sk-b"})
    assert settings.api_key is not None
    assert [key.get_secret_value() for key in settings.api_key] == ["sk-a", "sk-b"]
    assert "sk-a" not in repr(settings)


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "0.0.0.0", "api_key": "sk-a"}, False),
        ({"host": "127.0.0.1"}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
    ],
)
def test_listening_beyond_this_machine_without_a_key_is_warned_of(caplog, flags, warns):
    create_app(Settings.load(flags))
    assert ("without a key" in caplog.text) is warns
