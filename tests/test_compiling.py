"""Whether layers are compiled: where that is possible and faster, unless the operator says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config.errors import SettingsError
from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding import compiled_library, compiling
from decoding.engine import Engine
from tests.test_compiled import engine, needs_compiler
from tests.tiny import make_checkpoint


@pytest.fixture(autouse=True)
def _threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@needs_compiler
def test_float64_and_odd_widths_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, head_dim=8)
    with pytest.raises(SettingsError, match="not cpu and float64"):
        engine(folder, compile_layers=True, dtype="float64")
    with pytest.raises(SettingsError, match="multiples of 16"):
        engine(folder, compile_layers=True)


@needs_compiler
@pytest.mark.parametrize(
    ("settings", "is_compiled"),
    [
        ({}, True),
        ({"num_threads": 2}, True),
        ({"dtype": "bfloat16"}, True),
        ({"dtype": "float64"}, False),
        ({"attention": "gather"}, False),
        ({"compile_layers": False}, False),
        ({"draft_model": str(BUNDLED_CHECKPOINT)}, True),
    ],
)
def test_layers_are_compiled_where_that_is_possible(settings: dict[str, object], is_compiled: bool) -> None:
    asked = {"num_threads": 1, "exit_layer": 1, "draft_length": 1, "num_blocks": 64} | settings
    assert (
        Engine.load(EngineSettings(model=str(BUNDLED_CHECKPOINT), **asked)).ready.is_compiled is is_compiled
    )


def test_large_models_keep_their_threads_and_odd_ones_their_layers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiling, "_SMALL_BYTES", 1 << 20)
    for folder, num_threads in ((BUNDLED_CHECKPOINT, 2), (make_checkpoint(tmp_path, head_dim=8), 1)):
        settings = EngineSettings(
            model=str(folder), num_threads=num_threads, exit_layer=1, draft_length=1, num_blocks=64
        )
        assert not Engine.load(settings).ready.is_compiled


def test_without_a_compiler_layers_stay_uncompiled_and_it_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stages = []
    loaded = Engine.load(
        EngineSettings(num_threads=1, exit_layer=1, draft_length=1, num_blocks=64),
        progress=lambda stage, _: stages.append(stage),
    )
    assert not loaded.ready.is_compiled
    assert any("layers stay uncompiled: compile_layers: no C++ compiler" in stage for stage in stages)


def test_without_a_compiler_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match=r"no C\+\+ compiler"):
        compiled_library.build(tmp_path)


@needs_compiler
def test_what_was_compiled_is_found_again(tmp_path: Path) -> None:
    compiled_library.build(tmp_path)
    (made,) = (tmp_path / "compiled").iterdir()
    before = made.stat().st_mtime_ns
    compiled_library.build(tmp_path)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "compiled").iterdir()] == [before]


@needs_compiler
def test_half_of_what_was_compiled_is_compiled_anew(tmp_path: Path) -> None:
    """What a power cut leaves, say; in a file of its own, since what is loaded must not change."""
    compiled_library.build(tmp_path / "whole")
    (made,) = (tmp_path / "whole" / "compiled").iterdir()
    cut = tmp_path / "cut" / "compiled" / made.name
    cut.parent.mkdir(parents=True)
    cut.write_bytes(made.read_bytes()[:500])
    assert compiled_library.build(tmp_path / "cut").run_layers
    assert cut.stat().st_size > 500


@needs_compiler
def test_what_anybody_may_have_put_there_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(SettingsError, match="not yours alone"):
        compiled_library.build(tmp_path)


def _unreachable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)


def _compiler_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "g++").write_bytes(b"\x7fELF of another kind")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def _compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "g++").write_text(
        '#!/bin/sh\necho "caf\351: no such header" >&2; exit 1\n', encoding="latin-1"
    )
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("hinder", "reason"),
    [
        (_unreachable_cache, "Not a directory"),
        (_no_home, "set XDG_CACHE_HOME"),
        (_compiler_of_another_machine, "Exec format error"),
        (_compiler_that_fails, "no such header"),
    ],
)
@needs_compiler
def test_whatever_hinders_compiling_layers_stay_uncompiled_and_it_says_so(
    hinder: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hinder(tmp_path, monkeypatch)
    settings = EngineSettings(num_threads=1, exit_layer=1, draft_length=1, num_blocks=64)
    stages = []
    assert not Engine.load(settings, progress=lambda stage, _: stages.append(stage)).ready.is_compiled
    assert any("layers stay uncompiled" in stage and reason in stage for stage in stages)
    with pytest.raises(SettingsError, match=reason):
        Engine.load(settings.model_copy(update={"compile_layers": True}))
