"""Load on the real server, as small as it gets; nothing here says how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import long_prompt, serve
from benchmarks.load import unlike_prompts
from tests.server_process import Server


def test_load_ends_with_a_line_a_file_and_a_drawing(server: Server, tmp_path: Path, capsys):
    flags = ["--concurrency", "1", "2", "--rates", "20", "--rounds", "2", "--requests", "2", "--tokens", "12"]
    serve.main([server.url, *flags, "--front-end-requests", "3", "--out", str(tmp_path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "serve.json").read_text(encoding="utf-8")) == document
    assert (tmp_path / "serve.png").stat().st_size > 0
    assert [level.get("concurrency") or level["rate"] for level in document["levels"]] == [1, 2, 20]
    for level in document["levels"]:
        auto, plain = level["sides"]
        assert level["auto_over_plain"]["num_pairs"] == 2
        assert auto["requests"] == plain["requests"]
        assert auto["tokens"] == plain["tokens"] == 12 * auto["requests"]
        assert (auto["errors"], plain["errors"]) == ({}, {})
        assert auto["cached_prompt_tokens"] == plain["cached_prompt_tokens"] == 0
        assert plain["acceptance_rate"] is None
        assert plain["itl_ms"]["count"] > 0
    assert any(level["sides"][0]["acceptance_rate"] for level in document["levels"])
    assert document["front_end"]["engine_mean_ms"] > 0
    server.wait_idle()


def test_a_refused_request_is_an_error_of_its_level(server: Server, tmp_path: Path):
    flags = ["--concurrency", "1", "--rates", "--rounds", "1", "--requests", "1", "--tokens", "1000000"]
    with pytest.raises(SystemExit, match="failed"):
        serve.main([server.url, *flags, "--front-end-requests", "3", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "serve.json").read_text(encoding="utf-8"))
    assert document["levels"][0]["sides"][0]["errors"] == {"HTTP 400": 2}
    assert document["levels"][0]["auto_over_plain"] is None


def test_a_long_prompt_among_streams(server: Server, capsys):
    flags = ["--streams", "2", "--prompt-tokens", "96", "--rounds", "1"]
    long_prompt.main([server.url, *flags])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (arrival,) = document["rounds"]
    assert document["settings"]["prompt_tokens"] == 96
    # The second arrival finds the whole blocks of the first, but never its last token.
    assert arrival["second_cached_tokens"] == 80
    assert arrival["largest_gap_ms"] > 0
    server.wait_idle()


def test_no_two_prompts_begin_alike():
    prompts = unlike_prompts()
    beginnings = [next(prompts)[:8] for _ in range(40)]
    assert len(set(beginnings)) == 40
