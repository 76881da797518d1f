"""What is served and what is refused, before any weight is read: each refusal is one line with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer

from config.settings import BUNDLED_CHECKPOINT
from decoding.checkpoint import (
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    sampling_defaults,
    text_assets,
)
from decoding.messages import SamplingParams
from tests.tiny import END_OF_TEXT, make_checkpoint

HUB_ID = "facebook/layerskip-llama3.2-1B"
Folder = Callable[..., Path]


def refusal(model: str, revision: str | None = None) -> str:
    """The one line that says why."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model, revision=revision)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(model)
    return message


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), num_layers=2)


@pytest.fixture
def changed(original: Path, tmp_path: Path) -> Folder:
    """A folder whose config.json differs in some keys; None takes a key out."""

    def write(**changes: object) -> Path:
        config = json.loads((original / "config.json").read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        return tmp_path

    return write


def test_a_llama_folder_is_described_by_its_config(original: Path) -> None:
    shape = open_checkpoint(str(original), revision=None).shape
    assert (shape.num_layers, shape.model_width, shape.vocab_size) == (2, 32, 97)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_width) == (4, 2, 8)
    assert (shape.max_positions, shape.is_head_tied, shape.stored_dtype) == (512, False, "float32")


def test_a_config_of_an_older_release_is_understood(changed: Folder) -> None:
    """Llama 2's has neither key/value heads nor a head width nor today's RoPE and dtype keys."""
    folder = changed(
        num_key_value_heads=None, head_dim=None, rope_parameters=None, dtype=None, torch_dtype="float16"
    )
    shape = open_checkpoint(str(folder), revision=None).shape
    assert (shape.num_kv_heads, shape.head_width, shape.stored_dtype) == (4, 8, "float16")


def test_a_config_with_rope_scaling_of_an_older_release_keeps_it(changed: Folder) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = changed(rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling)
    rope = vars(open_checkpoint(str(folder), revision=None).config)["rope_parameters"]
    assert rope == scaling | {"rope_theta": 500000.0}


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "{}", "3"], ids=repr)
def test_a_folder_without_a_usable_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    message = refusal(str(tmp_path))
    assert "config.json" in message


def test_a_config_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json" in refusal(str(tmp_path))


@pytest.mark.parametrize("model_type", ["gpt2", "mistral", "qwen2", "llama4", None])
def test_another_architecture_is_named_with_what_is_served(changed: Folder, model_type: str | None) -> None:
    message = refusal(str(changed(model_type=model_type, architectures=["SomethingForCausalLM"])))
    assert (model_type or "SomethingForCausalLM") in message
    assert "Llama" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("hidden_act", "gelu"),
    ],
)
def test_what_would_be_computed_wrongly_or_run_foreign_code_is_refused(
    changed: Folder, key: str, value: object
) -> None:
    message = refusal(str(changed(**{key: value})))
    assert key in message
    assert "config.json" in message
    assert "Llama" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", "four"),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 0),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 3),
        ("vocab_size", -1),
        ("hidden_size", 31),
        ("head_dim", 7),
        ("rope_parameters", {"rope_type": "unheard-of", "rope_theta": 10000.0}),
    ],
)
def test_sizes_that_make_no_model_are_refused_in_one_line(changed: Folder, key: str, value: object) -> None:
    assert "config.json" in refusal(str(changed(**{key: value})))


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "nowhere", "a/b/c"])
def test_a_path_that_is_no_folder_is_not_looked_up_on_the_hub(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_answers(monkeypatch, AssertionError("the hub was asked"))
    message = refusal(model)
    assert "folder" in message
    assert "owner/name" in message


def hub_answers(monkeypatch: pytest.MonkeyPatch, answer: Exception | Path) -> list[dict[str, object]]:
    """What the hub's client does from now on, and the list of calls it gets."""
    calls: list[dict[str, object]] = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        calls.append({"repo_id": repo_id, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def hub_response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.example/api"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError("403\nlong text", response=hub_response(403)), ["gated", "HF_TOKEN", "licence"]),
        (RepositoryNotFoundError("404\n", response=hub_response(404)), ["no such repository", "HF_TOKEN"]),
        (RevisionNotFoundError("404\n", response=hub_response(404)), ["'v9'", "--revision"]),
        (LocalEntryNotFoundError("offline\n"), ["cannot be reached", "folder"]),
        (ConnectionError("refused"), ["cannot be reached", "folder"]),
        (httpx2.ConnectError("refused"), ["folder"]),
        (httpx2.ReadTimeout("slow"), ["folder"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_keeps_a_hub_checkpoint_away_is_said_with_a_remedy(
    error: Exception, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_answers(monkeypatch, error)
    message = refusal(HUB_ID, revision="v9")
    assert all(part in message for part in said), message


def test_without_network_and_cache_a_hub_id_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The hub's own client, told to stay offline, over an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(HUB_ID)
    assert "cannot be reached" in message
    assert "folder" in message


def test_from_the_hub_come_only_files_that_cannot_run_code(
    monkeypatch: pytest.MonkeyPatch, original: Path
) -> None:
    calls = hub_answers(monkeypatch, original)
    opened = open_checkpoint(HUB_ID, revision="main")
    assert opened.folder == original
    assert [call["repo_id"] for call in calls] == [HUB_ID]
    assert calls[0]["revision"] == "main"
    allowed = calls[0]["allow_patterns"]
    assert isinstance(allowed, list)
    assert {pattern.rpartition(".")[2] for pattern in allowed} <= {"json", "safetensors", "jinja"}


def with_generation_config(original: Path, tmp_path: Path, content: dict[str, object] | None) -> Checkpoint:
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "generation_config.json"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(json.dumps(content), encoding="utf-8")
    return open_checkpoint(str(tmp_path), revision=None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, SamplingParams()),
        ({}, SamplingParams()),
        ({"temperature": 0.3, "top_p": 0.5}, SamplingParams()),
        ({"do_sample": True}, SamplingParams()),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": 0.1},
            SamplingParams(temperature=0.6, top_k=50, top_p=0.9, min_p=0.1),
        ),
        ({"do_sample": True, "temperature": None, "top_p": 0.9}, SamplingParams(top_p=0.9)),
    ],
)
def test_sampling_defaults_are_the_authors_or_neutral(
    content: dict[str, object] | None, expected: SamplingParams, original: Path, tmp_path: Path
) -> None:
    assert sampling_defaults(with_generation_config(original, tmp_path, content)) == expected


@pytest.mark.parametrize(
    ("listed", "expected"),
    [(None, [0]), (5, [0, 5]), ([7, 5, 0], [0, 5, 7]), ([], [0]), ([5, 1 << 20], [0, 5])],
    ids=str,
)
def test_every_end_of_sequence_id_is_known(
    listed: object, expected: list[int], original: Path, tmp_path: Path
) -> None:
    """The generation config's and the tokenizer's: Llama 3 ends on either of two."""
    checkpoint = with_generation_config(original, tmp_path, {"eos_token_id": listed})
    assert text_assets(checkpoint).eos_token_ids == expected


def test_the_tokenizer_travels_as_text(original: Path) -> None:
    assets = text_assets(open_checkpoint(str(original), revision=None))
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    ids = tokenizer.encode("def f(x):").ids
    assert len(ids) == 9
    assert tokenizer.decode(ids) == "def f(x):"
    assert assets.special_token_ids == [tokenizer.token_to_id(END_OF_TEXT)]
    assert assets.chat_template is None


def test_a_chat_template_is_handed_on(original: Path, tmp_path: Path) -> None:
    checkpoint = with_generation_config(original, tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert text_assets(checkpoint).chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'], ids=repr)
def test_a_checkpoint_without_a_usable_tokenizer_is_refused(
    content: str | None, original: Path, tmp_path: Path
) -> None:
    checkpoint = with_generation_config(original, tmp_path, None)
    (tmp_path / "tokenizer.json").unlink()
    if content is None:
        (tmp_path / "tokenizer_config.json").unlink()
    else:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        text_assets(checkpoint)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_bundled_checkpoint_is_one_we_serve() -> None:
    checkpoint = open_checkpoint(str(BUNDLED_CHECKPOINT), revision=None)
    assert checkpoint.shape.num_layers > 1
    assert text_assets(checkpoint).eos_token_ids
