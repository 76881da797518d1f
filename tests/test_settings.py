"""Settings: one definition, four sources, and errors that say what would do."""

from __future__ import annotations

import re

import pytest

from config.errors import SettingsError
from config.setting_sources import flag_name, variable_name
from config.setting_texts import settings_table
from config.settings import BUNDLED_CHECKPOINT, EngineSettings, Settings
from server.cli import chosen_settings
from tests.server_process import REAL, run_to_end


@pytest.fixture
def environment(monkeypatch):
    """Set LAYERSKIP_* variables; none is set otherwise."""

    def set_variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"LAYERSKIP_{name}", value)

    return set_variables


def test_flags_win_over_environment_over_yaml_over_defaults(environment, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1\nhost: from-yaml\nmax-n: 3\nlog_level: debug\n")
    environment(CONFIG=str(file), PORT="2", HOST="from-environment")
    settings = Settings.load({"port": "3"})
    assert (settings.port, settings.host, settings.max_n, settings.max_prompts) == (
        3,
        "from-environment",
        3,
        64,
    )


def test_config_flag_wins_over_config_variable(environment, tmp_path):
    for port in (1, 2):
        (tmp_path / f"{port}.yaml").write_text(f"port: {port}")
    environment(CONFIG=str(tmp_path / "1.yaml"))
    assert Settings.load({"config": str(tmp_path / "2.yaml")}).port == 2


def test_default_model_is_the_bundled_checkpoint():
    settings = Settings.load({})
    assert settings.model == str(BUNDLED_CHECKPOINT)
    assert (BUNDLED_CHECKPOINT / "model.safetensors").is_file()
    assert settings.model_name == "python-8m"


def test_model_name_is_the_folder_or_the_hub_id_or_the_chosen_one(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert Settings.load({"model": f"{tmp_path}/my-model/"}).model_name == "my-model"
    assert (
        Settings.load({"model": "facebook/layerskip-llama3.2-1B"}).model_name
        == "facebook/layerskip-llama3.2-1B"
    )
    assert Settings.load({"model": "a/b", "served_model_name": "c"}).model_name == "c"


@pytest.mark.parametrize(
    ("flags", "variables", "yaml", "words"),
    [
        ({}, {"PROT": "1"}, "", ["LAYERSKIP_PROT", "did you mean LAYERSKIP_PORT?"]),
        ({}, {}, "exit-lyaer: 3", ["exit_lyaer", "did you mean exit_layer?"]),
        ({}, {}, "- a list", ["key: value"]),
        ({}, {}, "port: [", ["not YAML"]),
        ({"port": "99999"}, {}, "", ["port", "99999", "65535", "--port", "LAYERSKIP_PORT"]),
        ({}, {"DTYPE": "fp8"}, "", ["dtype", "'fp8'", "'bfloat16'"]),
        ({}, {}, "max_num_seqs: 0", ["max-num-seqs", "0", "greater"]),
        ({"device": "gpu"}, {}, "", ["device", "'gpu'"]),
        ({"allowed_exit_layers": "2,x"}, {}, "", ["allowed-exit-layers", "'x'"]),
        ({"allowed_exit_layers": "0"}, {}, "", ["allowed-exit-layers", "greater"]),
        (
            {"gpu_memory_utilization": "0.5"},
            {"MEMORY_FRACTION": "0.6"},
            "",
            ["0.5", "memory_fraction", "one of"],
        ),
        ({"gpu_memory_utilization": "1.5"}, {}, "", ["memory-fraction", "1.5", "less than or equal to 1"]),
        ({"config": "/no/such/file"}, {}, "", ["/no/such/file", "cannot be read"]),
    ],
)
def test_mistakes_are_one_line_naming_key_value_and_remedy(
    environment, tmp_path, flags, variables, yaml, words
):
    environment(**variables)
    if yaml:
        (tmp_path / "settings.yaml").write_text(yaml)
        flags = {"config": str(tmp_path / "settings.yaml")} | flags
    with pytest.raises(SettingsError) as caught:
        Settings.load(flags)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_comma_list_and_yaml_list_give_the_same_exit_layers(tmp_path):
    (tmp_path / "settings.yaml").write_text("allowed_exit_layers: [2, 4]")
    assert Settings.load({"allowed_exit_layers": "2, 4"}).allowed_exit_layers == (2, 4)
    assert Settings.load({"config": str(tmp_path / "settings.yaml")}).allowed_exit_layers == (2, 4)


def test_engine_settings_survive_the_way_to_the_worker():
    engine = Settings.load({"allowed_exit_layers": "2,4", "dtype": "float64", "num_blocks": "9"}).engine
    assert EngineSettings.model_validate_json(engine.model_dump_json()) == engine
    assert engine.num_blocks == 9


def test_every_setting_has_a_flag_and_a_variable_in_help():
    shown = run_to_end(*REAL, "--help").stdout
    for name in Settings.model_fields:
        assert re.search(rf"^\s+{flag_name(name)} VALUE\s", shown, re.MULTILINE), name
        assert variable_name(name) in shown


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name != "config"])
def test_every_setting_is_read_from_its_flag_and_from_its_variable(environment, name):
    samples = {"host": "localhost", "model": "a/b", "revision": "r", "dtype": "float64", "device": "cuda:1"}
    samples |= {
        "loader": "accelerate",
        "load_format": "dummy",
        "attention": "gather",
        "mixed_exit_layers": "promote",
        "log_level": "error",
        "log_format": "json",
        "cors_origins": "https://page.example",
        "served_model_name": "s",
        "max_body_bytes": "2048",
        "memory_fraction": "0.5",
        "scheduling_policy": "priority",
        "gpu_memory_utilization": "0.5",
        "compile_layers": "true",
        "drafter": "lookup",
        "enforce_eager": "true",
    }
    value = samples.get(name, "7")
    by_flag = chosen_settings([], {name: value})
    environment(**{name.upper(): value})
    by_variable = Settings.load({})
    name = {"gpu_memory_utilization": "memory_fraction"}.get(name, name)
    assert getattr(by_flag, name) == getattr(by_variable, name)
    assert getattr(by_flag, name) != Settings.model_fields[name].default


def test_table_lists_every_setting_without_a_path_of_this_machine():
    table = settings_table()
    assert table.count("\n") == len(Settings.model_fields) + 1
    assert str(BUNDLED_CHECKPOINT.parent) not in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot", "1"], "unknown flag --prot: did you mean --port?"),
        (["--prot=1"], "unknown flag --prot: did you mean --port?"),
        (
            ["a", "a"],
            "models: 2 checkpoints would answer to a: give each a served_model_name in the YAML file's `models`",
        ),
        (["a", "--model", "b"], "model a: --model says b; give one of them"),
        (["--host", "no.such.host.invalid"], "host no.such.host.invalid: no such address; pass --host"),
    ],
)
def test_command_line_mistakes_are_one_line(arguments, message):
    done = run_to_end(*REAL, *arguments)
    assert done.returncode == 1
    assert done.stderr == f"layerskip: {message}\n"
