"""What the README shows works as shown, and its table of settings is the settings'."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from config.setting_texts import settings_table
from config.settings import Settings
from tests.server_process import ROOT, Server

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN_URL = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run(command: list[str]) -> str:
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_there_are_blocks_to_run_and_no_gaps() -> None:
    assert "@@" not in README
    assert len(blocks("bash")) >= 3
    assert len(blocks("python")) >= 2


@pytest.mark.parametrize("block", blocks("bash"))
def test_every_shell_block_answers(block: str, server: Server) -> None:
    answer = run(["bash", "-c", block.replace(SHOWN_URL, server.url)])
    if "metrics" in block:
        assert "vllm:spec_decode_num_accepted_tokens_total" in answer
    elif '"stream": true' in block:
        assert answer.rstrip().endswith("data: [DONE]")
    else:
        assert json.loads(answer)["choices"][0]["text"]


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_runs(block: str, server: Server) -> None:
    assert run([sys.executable, "-W", "ignore", "-c", block.replace(SHOWN_URL, server.url)]).strip()


def test_its_settings_files_are_accepted(tmp_path) -> None:
    files = blocks("yaml")
    assert files
    for number, file in enumerate(files):
        path = tmp_path / f"{number}.yaml"
        path.write_text(file)
        assert Settings.load({"config": str(path)}).per_model()


def test_the_table_of_settings_is_current() -> None:
    assert settings_table() in README


def test_the_metrics_shown_are_emitted(server: Server) -> None:
    shown = re.findall(r"^((?:vllm:|layerskip_)\w+)\{", README, flags=re.MULTILINE)
    assert shown
    emitted = server.get("/metrics").body.decode()
    assert all(name in emitted for name in shown)


def test_what_has_not_run_on_a_gpu_is_said_with_the_command_that_runs_it() -> None:
    box = re.search(r"^> \*\*Not yet run on a GPU\.\*\*.*?(?=^[^>])", README, flags=re.MULTILINE | re.DOTALL)
    assert box is not None
    module = re.search(r"^> +python -m (\S+)$", box[0], flags=re.MULTILINE)
    assert module is not None
    assert find_spec(module[1]) is not None
    assert "docker run --rm --gpus all" in README
