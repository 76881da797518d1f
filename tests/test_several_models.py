"""Several checkpoints in one server: each answers as if alone, and fails alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from config.errors import SettingsError
from config.settings import BUNDLED_CHECKPOINT, Settings
from decoding.capacity import DeviceMemory
from tests.server_process import REAL, SCRIPTED, Server, running, text_of, wait_until
from tests.tiny import make_checkpoint

EXACT = ("--dtype", "float64", "--num-threads", "1", "--num-blocks", "512")
# Half of them draft, each in its own way; the ids are in both vocabularies.
REQUESTS = [
    {
        "prompt": [3 + index, 17, 40 + index, 17, 40],
        "max_tokens": 24,
        "temperature": 0.0 if index % 3 else 0.9,
        "seed": index,
        "exit_layer": 1 + index % 2,
        "draft_length": (0, 3, 1, 5)[index % 4],
        "ignore_eos": True,
    }
    for index in range(8)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled checkpoint and a tiny one, by the names they are served under."""
    tiny = tmp_path_factory.mktemp("several") / "tiny"
    make_checkpoint(tiny)
    return {BUNDLED_CHECKPOINT.name: BUNDLED_CHECKPOINT, "tiny": tiny}


@pytest.fixture(scope="module")
def both(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(REAL, tmp_path_factory.mktemp("both"), *map(str, folders.values()), *EXACT) as server:
        wait_until(lambda: states(server) == dict.fromkeys(folders, "ready"), timeout_s=120)
        yield server


def states(server: Server) -> dict[str, str]:
    return server.get("/health").json["models"] if server.health() else {}


def choices(server: Server, **body: object):
    return server.complete(**body)["choices"]


def test_answers_under_mixed_load_equal_those_of_each_served_alone(both, folders, tmp_path):
    alone = {}
    for name, folder in folders.items():
        with running(REAL, tmp_path, str(folder), *EXACT) as server:
            server.wait_ready()
            alone[name] = [choices(server, **request) for request in REQUESTS]
    mixed = [(name, index) for index in range(len(REQUESTS)) for name in folders]
    with ThreadPoolExecutor(len(mixed)) as pool:
        answers = pool.map(lambda asked: both.complete(model=asked[0], **REQUESTS[asked[1]]), mixed)
    drafted = dict.fromkeys(folders, 0)
    refused = dict.fromkeys(folders, 0)
    for (name, index), answer in zip(mixed, answers, strict=True):
        assert answer["model"] == name
        assert answer["choices"] == alone[name][index]
        counts = answer["metrics"]["speculative_decoding"]
        drafted[name] += counts["num_draft_tokens"]
        refused[name] += counts["num_draft_tokens"] - counts["num_accepted_draft_tokens"]
    assert min(drafted.values()) > 0
    assert min(refused.values()) > 0


def test_metrics_tell_the_models_apart(both, folders):
    before = {name: generated(both, name) for name in folders}
    both.complete(model="tiny", prompt=[5], max_tokens=7, ignore_eos=True)
    after = {name: generated(both, name) for name in folders}
    assert after["tiny"] - before["tiny"] == 7
    assert after[BUNDLED_CHECKPOINT.name] == before[BUNDLED_CHECKPOINT.name]
    exposed = both.get("/metrics").body.decode()
    kinds = [line for line in exposed.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))
    assert all(both.metric("layerskip_worker_up", model_name=name) == 1 for name in folders)


def generated(server: Server, name: str) -> float:
    return server.metric("vllm:generation_tokens_total", model_name=name)


def test_every_model_is_listed_and_found_by_the_openai_client(both, folders):
    with openai.OpenAI(base_url=f"{both.url}/v1", api_key="none", max_retries=0) as client:
        assert [card.id for card in client.models.list()] == list(folders)
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError, match=f"`{BUNDLED_CHECKPOINT.name}`, `tiny` are"):
            client.completions.create(model="none", prompt="a")


def test_server_info_is_of_the_model_asked_for(both):
    first, tiny = both.get("/server_info").json, both.get("/server_info?model=tiny").json
    assert (first["model"], tiny["model"]) == (BUNDLED_CHECKPOINT.name, "tiny")
    assert first["worker_pid"] != tiny["worker_pid"]
    assert both.get("/server_info?model=none").status == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_a_request_that_names_no_model_is_refused(both, path, body):
    answer = both.post(body, path=path)
    assert (answer.status, answer.error["param"]) == (400, "model")
    assert "tiny" in answer.error["message"]


def test_refusals_count_for_the_model_that_was_asked(both):
    before = rejected(both, "tiny")
    assert both.post({"model": "tiny", "prompt": "a", "exit_layer": 99}).status == 400
    assert both.post({"model": "none", "prompt": "a"}).status == 404
    assert rejected(both, "tiny") - before == 1


def rejected(server: Server, name: str) -> float:
    return server.metric("layerskip_rejected_requests_total", model_name=name)


def test_a_killed_worker_is_restarted_while_the_others_serve(tmp_path):
    with running(SCRIPTED, tmp_path, "--models", "one,other") as server:
        wait_until(lambda: states(server) == {"one": "ready", "other": "ready"}, timeout_s=60)
        slow = {"prompt": "!slow and long", "max_tokens": 100}
        ends: dict[str, list[str]] = {}
        readers = [
            threading.Thread(target=lambda name=name: ends.update({name: server.stream(model=name, **slow)}))
            for name in ("one", "other")
        ]
        for reader in readers:
            reader.start()
        wait_until(lambda: server.metric("vllm:num_requests_running") == 2)
        kill_worker(server, "one")
        wait_until(lambda: states(server) == {"one": "restarting", "other": "ready"})
        refusal = server.post({"model": "one", "prompt": "a"})
        assert (refusal.status, refusal.error["code"]) == (503, "unavailable")
        assert server.complete(model="other", prompt="a", max_tokens=1)["model"] == "other"
        assert server.health() == 200
        assert [card["id"] for card in server.get("/v1/models").json["data"]] == ["other"]
        assert server.metric("layerskip_worker_up", model_name="one") == 0
        for reader in readers:
            reader.join(30)
        assert [ends[name][-1] for name in ("one", "other")] == ["[DONE]"] * 2
        assert text_of(ends["one"]) == text_of(ends["other"])
        assert restarts(server, "one") == 1
        assert restarts(server, "other") == 0
        assert "layerskip: one: the worker died (exit code -9)" in server.stderr


def kill_worker(server: Server, name: str) -> None:
    os.kill(server.get(f"/server_info?model={name}").json["worker_pid"], signal.SIGKILL)


def restarts(server: Server, name: str) -> float:
    return server.metric("layerskip_worker_restarts_total", model_name=name)


def test_one_that_dies_again_and_again_leaves_the_other_serving(tmp_path):
    with running(SCRIPTED, tmp_path, "--models", "one,other") as server:
        wait_until(lambda: states(server) == {"one": "ready", "other": "ready"}, timeout_s=60)
        for num_restarts in range(5):
            wait_until(lambda: states(server)["one"] == "ready", timeout_s=60)
            assert restarts(server, "one") == num_restarts
            kill_worker(server, "one")
            wait_until(lambda: states(server)["one"] != "ready")
        wait_until(lambda: states(server) == {"one": "dead", "other": "ready"})
        assert (server.health(), server.get("/health/live").status) == (200, 200)
        refusal = server.post({"model": "one", "prompt": "a"})
        assert (refusal.status, refusal.error["code"]) == (503, "unavailable")
        assert server.complete(model="other", prompt="a", max_tokens=1)["model"] == "other"
        assert server.stderr.count("no other is started") == 1


@pytest.mark.parametrize("script", ["refused", "crashes"])
def test_one_that_does_not_load_leaves_the_other_serving(tmp_path, script):
    with running(SCRIPTED, tmp_path, "--models", f"{script},other") as server:
        wait_until(lambda: states(server) == {script: "dead", "other": "ready"}, timeout_s=60)
        assert server.post({"model": script, "prompt": "a"}).status == 503
        assert server.complete(model="other", prompt="a", max_tokens=1)["model"] == "other"
        assert f"layerskip: {script}: " in server.stderr
        # Where no model is named, the first that serves is meant.
        assert server.get("/server_info").json["model"] == "other"
        assert server.get(f"/server_info?model={script}").status == 503


def test_a_server_none_of_whose_models_loads_ends_with_exit_code_1(tmp_path):
    with running(SCRIPTED, tmp_path, "--models", "refused,crashes") as server:
        assert server.process.wait(20) == 1


def test_health_says_who_is_down_when_nobody_serves(tmp_path):
    with running(SCRIPTED, tmp_path, "--models", "one,other") as server:
        wait_until(lambda: states(server) == {"one": "ready", "other": "ready"}, timeout_s=60)
        for name in ("one", "other"):
            kill_worker(server, name)
        wait_until(lambda: server.health() == 503)
        health = server.get("/health")
        assert health.json["status"] == "restarting"
        assert health.json["models"] == {"one": "restarting", "other": "restarting"}
        assert health.headers["retry-after"] == "1"
        assert server.get("/health/live").status == 200
        wait_until(lambda: states(server) == {"one": "ready", "other": "ready"}, timeout_s=60)


def test_sigterm_waits_for_the_streams_of_every_model(tmp_path):
    with running(SCRIPTED, tmp_path, "--models", "one,other") as server:
        wait_until(lambda: states(server) == {"one": "ready", "other": "ready"}, timeout_s=60)
        slow = {"prompt": "!slow and long", "max_tokens": 60}
        with server.streaming(model="one", **slow) as ours, server.streaming(model="other", **slow) as theirs:
            next(ours), next(theirs)
            server.process.send_signal(signal.SIGTERM)
            assert [list(ours)[-1], list(theirs)[-1]] == ["[DONE]", "[DONE]"]
        assert server.process.wait(20) == 0


def test_yaml_gives_each_model_settings_of_its_own(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(
        "max_num_seqs: 8\nmodels:\n- big\n"
        "- {model: small, max_num_seqs: 2, served_model_name: [s, t], num_threads: 3}\n"
    )
    big, small = Settings.load({"config": str(file)}).per_model()
    assert (big.model_names, big.max_num_seqs) == (("big",), 8)
    assert (small.model_names, small.max_num_seqs, small.num_threads) == (("s", "t"), 2, 3)
    assert big.engine.memory_fraction == small.engine.memory_fraction == 0.45


def test_memory_is_given_to_each_model_under_either_name(tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(
        "gpu_memory_utilization: 0.5\nmodels:\n- {model: big, memory_fraction: 0.6}\n"
        "- {model: small, gpu_memory_utilization: 0.2}\n- other\n"
    )
    models = Settings.load({"config": str(file)}).per_model()
    assert [each.engine.memory_fraction for each in models] == [0.6, 0.2, 0.5]


def test_shares_of_the_machine_are_divided_unless_chosen():
    one, two, three = Settings.load({"models": "a,b,c"}).per_model()
    assert one.num_threads == two.num_threads == three.num_threads >= 1
    assert sum(each.memory_fraction for each in (one, two, three)) == pytest.approx(0.9)
    assert [
        each.num_threads for each in Settings.load({"models": "a,b", "num_threads": "5"}).per_model()
    ] == [5, 5]
    assert Settings.load({}).per_model()[0].num_threads is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"models": "a,a"}, ["2 checkpoints", "answer to a", "served_model_name"]),
        ({"models": "a,b", "served_model_name": "x"}, ["answer to x"]),
        ({"models": "a,b", "model": "c"}, ["model c", "models"]),
        ({"models": [{"model": "a", "dtyp": "x"}]}, ["models", "not permitted"]),
        ({"models": [{"dtype": "auto"}]}, ["models", "required"]),
    ],
)
def test_models_that_leave_something_open_are_refused_in_one_line(flags, words):
    with pytest.raises(SettingsError) as refused:
        Settings.load(flags)
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(
    ("free", "ours", "fraction", "expected"),
    [
        (70, 20, 0.9, 62),  # alone: all but the spare twentieth
        (75, 20, 0.9, 67),  # all but the tenth that was not asked for
        (70, 20, 0.45, 22),  # one of two: its own share less its weights
        (20, 20, 0.45, 12),  # another process was faster: never into the spare twentieth
    ],
)
def test_cache_takes_its_share_of_the_devices_memory_less_what_a_step_takes(free, ours, fraction, expected):
    memory = DeviceMemory(free=free, total=100, ours=ours, activations=3)
    assert memory.for_cache(fraction) == expected
