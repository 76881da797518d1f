"""The life of the two processes: start, refusals to start, death of either, signals."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil

from tests.server_process import SCRIPTED, is_alive, run_to_end, running, wait_until

LONG = {"prompt": "!slow and long", "max_tokens": 400}


def test_loading_answers_503_with_progress_and_retry_after(tmp_path):
    with running(SCRIPTED, tmp_path, "--model", "slow") as server:
        wait_until(lambda: server.health() == 503)
        wait_until(lambda: server.get("/health").json.get("fraction") == 0.5)
        health = server.get("/health")
        progress = {"status": "loading", "models": {"slow": "loading"}, "stage": "script", "fraction": 0.5}
        assert health.json == progress
        assert server.get("/health/live").status == 200
        refusal = server.post({"prompt": "a"})
        assert refusal.status == 503
        assert int(refusal.headers["retry-after"]) >= 1
        assert refusal.error["code"] == "unavailable"
        assert server.metric("layerskip_worker_up") == 0


def test_refused_checkpoint_is_one_line_and_exit_code_1(tmp_path):
    with running(SCRIPTED, tmp_path, "--model", "refused") as server:
        assert server.process.wait(20) == 1
        lines = [line for line in server.stderr.splitlines() if not line.startswith("loading")]
        assert lines == ["layerskip: refused: this checkpoint is refused; pass another"]


def test_worker_that_crashes_while_loading_ends_the_server_with_exit_code_1(tmp_path):
    with running(SCRIPTED, tmp_path, "--model", "crashes") as server:
        assert server.process.wait(20) == 1
        assert "a bug while loading" in server.stderr
        assert "layerskip: the worker died while loading (exit code 1)" in server.stderr


def test_taken_port_is_one_line_and_exit_code_1(scripted):
    done = run_to_end(*SCRIPTED, "--port", str(scripted.port))
    assert done.returncode == 1
    assert done.stderr == f"layerskip: port {scripted.port} is in use; pass --port\n"


def test_bug_in_a_step_is_in_the_log_and_not_in_the_answer(tmp_path):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        answer = server.post({"prompt": "!raise", "max_tokens": 20})
        assert answer.status == 500
        assert answer.error["message"].startswith("the worker died while it decoded this request")
        assert server.stderr.count("RuntimeError: a bug in a step") == 2


def test_hanging_worker_lets_its_heartbeat_age_while_health_answers(tmp_path):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        with server.streaming(prompt="!hang", max_tokens=20) as events:
            next(events)
            wait_until(lambda: server.metric("layerskip_heartbeat_age_seconds") > 1.5)
            assert server.get("/health/live").status == 200


def test_idle_worker_is_heard_every_second(scripted):
    scripted.wait_idle()
    ages = []
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        ages.append(scripted.metric("layerskip_heartbeat_age_seconds"))
        time.sleep(0.05)
    assert max(ages) < 2.0


def test_killed_api_process_leaves_no_worker(tmp_path):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        worker = server.worker_pid
        assert is_alive(worker)
        server.end(signal.SIGKILL)
        wait_until(lambda: not is_alive(worker), timeout_s=5)


def test_killed_api_process_takes_a_hanging_worker_along(tmp_path):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        worker = server.worker_pid
        with server.streaming(prompt="!hang", max_tokens=20) as events:
            next(events)
            server.end(signal.SIGKILL)
        wait_until(lambda: not is_alive(worker), timeout_s=5)


def test_ctrl_c_ends_open_streams_with_an_error_and_the_process_without_a_traceback(tmp_path):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        worker = server.worker_pid
        with server.streaming(**LONG) as events:
            next(events)
            server.process.send_signal(signal.SIGINT)
            *_, last = events
        assert json.loads(last)["error"]["code"] == "unavailable"
        assert server.process.wait(3) == 0
        assert not is_alive(worker)
        assert "Traceback" not in server.stderr


def test_ctrl_c_while_loading_ends_at_once(tmp_path):
    with running(SCRIPTED, tmp_path, "--model", "slow") as server:
        wait_until(lambda: server.health() == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(3) == 0
        assert "Traceback" not in server.stderr


def test_ctrl_c_to_the_whole_group_is_the_same(tmp_path):
    with running(SCRIPTED, tmp_path) as server:
        server.wait_ready()
        for process in [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]:
            process.send_signal(signal.SIGINT)
        assert server.process.wait(3) == 0
        assert "Traceback" not in server.stderr


def test_the_only_port_is_the_http_port(scripted):
    pids = [scripted.process.pid, scripted.worker_pid]
    listening = [
        connection.laddr.port
        for pid in pids
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == [scripted.port]


def test_api_process_imports_neither_torch_nor_transformers():
    code = (
        "import sys, server.app, server.cli, server.http_server\n"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    done = run_to_end("-c", code)
    assert done.returncode == 0, done.stderr


def test_running_api_process_has_not_loaded_torch(server):
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text(encoding="utf-8")
    assert "libtorch" in Path(f"/proc/{server.worker_pid}/maps").read_text(encoding="utf-8")
