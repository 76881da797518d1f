"""A server that was started with a draft model, and what it reports of its drafts."""

from __future__ import annotations

from msgspec.structs import replace

from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from server.banner import Site, banner
from tests.scripted_engine import scripted_ready
from tests.server_process import REAL, Server, running


def test_a_draft_model_s_drafts_are_asked_for_and_counted(server: Server, tmp_path) -> None:
    asked = {"prompt": "def area(radius):\n", "max_tokens": 24, "seed": 5, "draft_length": 3}
    with running(
        REAL, tmp_path, "--num-threads", "1", "--num-blocks", "128", "--draft-model", str(BUNDLED_CHECKPOINT)
    ) as pair:
        pair.wait_ready()
        assert pair.get("/server_info").json["has_draft_model"] is True
        for temperature in (0, 0.8):
            expected = server.text(**asked, temperature=temperature, drafter="none")
            got = pair.complete(**asked, temperature=temperature, drafter="model")
            assert got["choices"][0]["text"] == expected
            statistics = got["metrics"]["speculative_decoding"]
            assert statistics["drafts_by_drafter"] == {
                "early_exit": 0,
                "model": statistics["num_draft_tokens"],
            }
            # It drafts for itself, so that nearly all is kept: float32 rounds passes of other widths otherwise.
            assert statistics["num_accepted_draft_tokens"] >= statistics["num_draft_tokens"] - 3 > 9
        drafted = pair.metric("layerskip_drafter_draft_tokens_total", drafter="model")
        kept = pair.metric("layerskip_drafter_kept_tokens_total", drafter="model")
        assert drafted - 6 <= kept <= drafted
        assert pair.metric("vllm:spec_decode_num_draft_tokens_total") == drafted


def test_the_banner_names_a_draft_model() -> None:
    alone = scripted_ready(EngineSettings(), "{}")
    site = Site("http://here")
    assert "draft model" not in banner(alone, site, model_name="m")
    assert "\n  draft model  a/b; for requests" in banner(
        replace(alone, draft_model="a/b"), site, model_name="m"
    )


def test_without_a_draft_model_its_drafts_are_refused_by_name(server: Server) -> None:
    assert server.get("/server_info").json["has_draft_model"] is False
    answer = server.post({"prompt": "a", "drafter": "model"})
    assert answer.status == 400
    assert answer.error["param"] == "drafter"
