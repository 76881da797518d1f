"""The processes of one model end together, and are started again together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from decoding.messages import SamplingParams, sequence_seed
from tests.mixes import one_request
from tests.oracle import NaiveDecoder
from tests.server_process import REAL, ROOT, is_alive, running, wait_until
from tests.tiny import make_checkpoint

FIRST = """
import threading
from server.ranks import start_ranks
if __name__ == "__main__":
    [channel] = start_ranks(2)
    print(channel.pid, flush=True)
    threading.Event().wait(60)
"""


@contextmanager
def first_rank() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A first rank that waits for something else, and the process id of the second."""
    arguments = [sys.executable, "-c", FIRST]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_the_first_rank_ends_as_soon_as_another_is_killed() -> None:
    """And says so."""
    with first_rank() as (first, other_pid):
        os.kill(other_pid, signal.SIGKILL)
        assert first.wait(10) == 1
        assert first.stderr is not None
        assert (
            first.stderr.read()
            == "layerskip: layerskip-rank-1 ended (exit code -9), and with it the worker\n"
        )


def test_the_other_ranks_end_when_the_first_is_killed() -> None:
    with first_rank() as (first, other_pid):
        assert is_alive(other_pid)
        first.kill()
        wait_until(lambda: not is_alive(other_pid), timeout_s=10)


@pytest.mark.slow
def test_a_server_with_two_ranks_says_what_naive_decoding_says_until_one_dies(tmp_path: Path) -> None:
    """That death is the worker's, so that it is started again as any other is."""
    make_checkpoint(tmp_path, num_layers=5, vocab=98, dtype=torch.float64)
    flags = {"model": tmp_path, "tensor-parallel-size": 2, "device": "cpu", "dtype": "float64"}
    flags |= {"num-threads": 2, "num-blocks": 256, "max-model-len": 384, "exit-layer": 2, "draft-length": 3}
    prompt_ids = [5, 9, 2, 7]
    body = {"prompt": prompt_ids, "max_tokens": 40, "temperature": 0.7, "seed": 3, "ignore_eos": True}
    request = one_request(
        prompt_ids=prompt_ids,
        max_new_tokens=40,
        sampling=SamplingParams(temperature=0.7),
        seed=sequence_seed(3, prompt_index=0, choice_index=0),
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = tokenizer.decode(NaiveDecoder(tmp_path).decode(request))
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with running(REAL, tmp_path, *words) as server:
        server.wait_ready()
        assert server.get("/server_info").json["tensor_parallel_size"] == 2
        assert "on 2 × cpu" in server.stderr
        assert server.text(**body) == text
        worker = server.worker_pid
        [other] = children_of(worker)
        os.kill(other, signal.SIGKILL)
        wait_until(lambda: server.health() == 503)
        assert "the worker died (exit code 1); another starts" in server.stderr
        assert not is_alive(worker)


def children_of(pid: int) -> list[int]:
    """Its ranks: multiprocessing has a process of its own beside them."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed if b"resource_tracker" not in command_of(int(child))]


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
