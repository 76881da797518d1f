"""The benchmark for GPUs at toy sizes on a CPU: what it writes and refuses, and that acceptance can be set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cycles import Work
from benchmarks.gpu_decoding import Grid, Subject, measure_speculation
from benchmarks.gpu_device import Device
from benchmarks.gpu_parts import NEED_CUDA, PARTS
from benchmarks.gpu_peers import transformers_model
from benchmarks.gpu_segments import Segments, agreement, calibrate, draw_weights
from benchmarks.gpu_shapes import Shape
from config.setting_types import LoadFormat
from config.settings import Dtype, EngineSettings
from decoding.engine import Engine
from decoding.tensor_files import DrawnTensors
from tests.mixes import one_request

CPU = Device(torch.device("cpu"))
ON_CPU_PARTS = [name for name in PARTS if name not in NEED_CUDA]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    return Shape.named("tiny", tmp_path_factory.mktemp("shapes"))


def arguments(out: Path, *parts: str) -> list[str]:
    asked = [word for part in parts for word in ("--part", part)]
    return ["--device", "cpu", "--shapes", "tiny", "--out", str(out), *asked]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every part that a CPU can run was run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("gpu")
    assert gpu.main(arguments(out, *ON_CPU_PARTS)) == 0
    return out


def parts_of(out: Path) -> dict[str, dict[str, object]]:
    return json.loads((out / "gpu.json").read_text())["parts"]


def test_every_part_measures_and_names_the_machine(measured: Path):
    document = json.loads((measured / "gpu.json").read_text())
    assert list(document["parts"]) == ON_CPU_PARTS
    assert all(part["rows"] and part["is_complete"] for part in document["parts"].values())
    assert {"device", "torch", "triton", "cpu"} <= document["hardware"].keys()
    assert (measured / "speculation.png").read_bytes().startswith(b"\x89PNG")
    assert (measured / "layers.png").is_file()


def test_what_is_measured_is_not_measured_again_unless_told(measured: Path, capsys):
    before = parts_of(measured)
    gpu.main(arguments(measured, "bandwidth"))
    assert "already measured" in capsys.readouterr().err
    assert parts_of(measured) == before
    gpu.main([*arguments(measured, "bandwidth"), "--again"])
    shown = capsys.readouterr()
    assert "bandwidth" in shown.err
    assert "already measured" not in shown.err
    assert json.loads(shown.out.splitlines()[-1])["parts"] == parts_of(measured)


def test_a_part_that_was_broken_off_is_measured_anew(measured: Path, tmp_path: Path, capsys):
    document = json.loads((measured / "gpu.json").read_text())
    document["parts"]["bandwidth"] |= {"is_complete": False, "rows": []}
    (tmp_path / "gpu.json").write_text(json.dumps(document))
    gpu.main(arguments(tmp_path, "bandwidth"))
    assert "already measured" not in capsys.readouterr().err
    assert len(parts_of(tmp_path)["bandwidth"]["rows"]) == 3


def test_a_part_that_takes_too_long_is_cut_short_and_kept(tmp_path: Path):
    gpu.main([*arguments(tmp_path, "bandwidth"), "--minutes", "0"])
    part = parts_of(tmp_path)["bandwidth"]
    assert part["is_cut_short"]
    assert len(part["rows"]) == 1


def test_kernels_are_refused_in_one_line_without_cuda(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"^gpu: kernels needs a CUDA device, and this is cpu$"):
        gpu.main(arguments(tmp_path, "kernels"))


def test_figures_of_another_device_are_not_mixed_in(tmp_path: Path):
    (tmp_path / "gpu.json").write_text(json.dumps({"hardware": {"device": "another"}, "parts": {}}))
    with pytest.raises(SystemExit, match="figures of another"):
        gpu.main(arguments(tmp_path, "bandwidth"))


def test_transformers_decodes_the_same_weights_to_the_same_texts(measured: Path, tiny: Shape):
    rows = parts_of(measured)["peers"]["rows"]
    assert {row["contender"].split()[0] for row in rows} == {"ours", "transformers"}
    # In float32 at such sizes no two choices are near one another.
    assert all(row["texts_equal"] == row["texts"] for row in rows)
    model = transformers_model(tiny, CPU, torch.float64, DrawnTensors())
    weights = draw_weights(tiny, CPU, torch.float64, DrawnTensors())
    assert torch.equal(model.model.embed_tokens.weight, weights.embedding_VD)


def test_louder_late_layers_lower_acceptance(tiny: Shape):
    shares = [
        agreement(
            tiny,
            draw_weights(tiny, CPU, torch.float32, DrawnTensors(late_from=1, late_scale=scale)),
            1,
            num_tokens=512,
        )
        for scale in (0.0, 0.1, 0.5, 2.0)
    ]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.2


@pytest.mark.parametrize("asked", [0.6, 0.9])
def test_acceptance_can_be_set(tiny: Shape, asked: float):
    _, found = calibrate(tiny, CPU, torch.float32, acceptance=asked, num_tokens=512)
    assert abs(found - asked) < 0.02
    # 24 rows draft once in each of 20 cycles: a deviation of 0.022 at most, five of them.
    subject = Subject(tiny, CPU, torch.float32, Work(context=12, cycles=20, batches=(24,)))
    rows = list(measure_speculation(subject, Grid((asked,), (1,), 512, 1), asked, {}))
    drafted = [row for row in rows if row["exit_layer"] == tiny.exit_layers[0]]
    assert [abs(row["acceptance"] - asked) < 0.11 for row in drafted] == [True]


def test_quiet_layers_change_what_is_kept_and_nothing_that_is_promised(tiny: Shape):
    texts, kept = {}, {}
    for scale in (0.2, 1.0):
        for length in (0, 3):
            engine = Engine.load(
                EngineSettings(
                    model=str(tiny.folder),
                    load_format=LoadFormat.DUMMY,
                    dummy_scale=scale,
                    dtype=Dtype.FLOAT64,
                    device="cpu",
                    num_threads=1,
                    num_blocks=16,
                    max_model_len=128,
                    exit_layer=1,
                    draft_length=length,
                )
            )
            events = engine.generate([one_request(max_new_tokens=48)])[0]
            texts[scale, length] = [token for event in events for token in event.token_ids]
            kept[scale, length] = sum(event.kept for event in events)
    assert texts[0.2, 3] == texts[0.2, 0]
    assert texts[1.0, 3] == texts[1.0, 0]
    assert texts[0.2, 0] != texts[1.0, 0]
    assert kept[0.2, 3] > kept[1.0, 3]


def test_a_ceiling_counts_every_layer_and_head_once(tiny: Shape):
    """With layers that cost 1 a token and heads that cost 10, whatever the number of tokens."""
    known = {("layer", 2, wide): float(wide) for wide in (1, 4)} | {
        ("head", tokens, 1): 10.0 for tokens in (2, 8)
    }
    segments = Segments(tiny, CPU, draw_weights(tiny, CPU, torch.float32, DrawnTensors()), 8, known)
    assert segments.plain_ms(2) == 8 + 10
    # Four early passes of 2 layers, three heads that draft, 6 layers on 4 tokens, and the head.
    assert segments.cycle_ms(2, 2, 3) == 4 * 2 + 3 * 10 + 6 * 4 + 10


@pytest.mark.parametrize(
    ("name", "billions", "gigabytes_read"), [("1B", 1.236, 2.47), ("7B", 6.738, 13.2), ("8B", 8.030, 15.0)]
)
def test_shapes_are_those_of_the_published_checkpoints(
    tmp_path: Path, name: str, billions: float, gigabytes_read: float
):
    shape = Shape.named(name, tmp_path)
    assert round(shape._costs.num_parameters / 1e9, 3) == billions
    # Every matrix is read for a token, and one row of the embedding.
    assert abs(shape.bytes_per_step(itemsize=2, context=0) / 1e9 - gigabytes_read) < 0.02
