"""Everything that only a GPU can tell, in one command: no network, no files, random weights of published sizes.

`python -m benchmarks.gpu` measures, part by part: the memory's bandwidth, the attention kernels' error and speed,
plain decoding against the least that the memory allows, what layers and heads take by number of tokens, drafts
against the ceiling that segment times set, what the host costs, and transformers on the same weights. Every figure
is written to one JSON file as it is measured; a part that is there is not measured again unless told so. Each part
has a process of its own, so that one that fails leaves the others. Drawings lie beside the file, and the last line
of standard output is its content.

Acceptance is set by quieting the later layers of the random weights, which changes no cost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu_device import Device, Row
from benchmarks.gpu_parts import FULL, NEED_CUDA, PARTS, TINY, Bench
from benchmarks.gpu_shapes import SHAPES, Shape
from decoding.devices import pick_device

_FILE: Final = "gpu.json"
_REAL: Final = ("1B", "7B", "8B")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, draw, and end with one line of JSON; 1 if a part failed."""
    options = _parser().parse_args(arguments)
    device = Device(pick_device(options.device))
    path = options.out / _FILE
    options.out.mkdir(parents=True, exist_ok=True)
    document = _opened(path, device)
    failed = []
    for name in options.part or PARTS:
        if name in NEED_CUDA and not device.is_cuda:
            refusal = f"gpu: {name} needs a CUDA device, and this is {device.torch}"
            if options.part:
                sys.exit(refusal)
            print(refusal, file=sys.stderr)
        elif document["parts"].get(name, {}).get("is_complete") and not options.again:
            print(f"{name}: already measured; --again measures anew", file=sys.stderr)
        elif options.part:
            _run(name, device, document, options)
        elif _run_apart(name, options):
            failed.append(name)
        document = _opened(path, device)
    _draw(document, options.out)
    if failed:
        print(f"gpu: failed: {', '.join(failed)}; figures until then are kept", file=sys.stderr)
    print(json.dumps(document, ensure_ascii=False))
    return 1 if failed else 0


def _draw(document: Mapping[str, Any], folder: Path) -> None:
    """Drawings beside the file, where there is something to draw with: the image of the server has nothing."""
    if find_spec("matplotlib") is None:
        print("gpu: no drawings, for matplotlib is not installed", file=sys.stderr)
        return
    from benchmarks.gpu_plots import draw

    draw(document, folder)


def _run(name: str, device: Device, document: dict[str, Any], options: argparse.Namespace) -> None:
    """One part in this process; the file is written after every figure."""
    started = time.perf_counter()
    path = options.out / _FILE
    rows: list[Row] = []
    part = {"settings": _shown(options), "is_complete": False, "is_cut_short": False, "rows": rows}
    document["parts"][name] = part
    with tempfile.TemporaryDirectory(prefix="layerskip-gpu-") as folder:
        for row in PARTS[name](_bench(device, document, Path(folder), options)):
            rows.append(row)
            took_s = time.perf_counter() - started
            part["seconds"] = round(took_s, 1)
            _write(path, document)
            print(f"{name} {took_s:6.1f} s  {_line(row)}", file=sys.stderr, flush=True)
            if took_s > 60 * options.minutes:
                part["is_cut_short"] = True
                print(f"{name}: cut short after {options.minutes:g} minutes", file=sys.stderr)
                break
    part["is_complete"] = True
    _write(path, document)


def _run_apart(name: str, options: argparse.Namespace) -> int:
    """One part in a process of its own; its exit code."""
    given = [f"--{key}={value}" for key, value in _shown(options).items() if value and key != "shapes"]
    shapes = ["--shapes", *options.shapes]
    again = ["--again"] if options.again else []
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, f"--out={options.out}"]
    return subprocess.run(
        [*command, *given, *again, *shapes], stdout=subprocess.DEVNULL, check=False
    ).returncode


def _shown(options: argparse.Namespace) -> dict[str, object]:
    """What decides what is measured."""
    return {key: getattr(options, key) for key in ("device", "dtype", "shapes", "minutes")}


def _bench(device: Device, document: dict[str, Any], folder: Path, options: argparse.Namespace) -> Bench:
    is_tiny = set(options.shapes) == {"tiny"}
    name = options.dtype or ("bfloat16" if device.is_cuda else "float32")
    return Bench(
        device=device,
        dtype=getattr(torch, name),
        shapes=tuple(Shape.named(each, folder) for each in options.shapes),
        sizes=TINY if is_tiny else FULL,
        document=document,
    )


def _opened(path: Path, device: Device) -> dict[str, Any]:
    """The file as it is, or an empty one. Exits where it holds another device's figures."""
    hardware = device.describe()
    if not path.is_file():
        return {"benchmark": "gpu", "hardware": hardware, "parts": {}}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found = document["hardware"]["device"]
    if found != hardware["device"]:
        sys.exit(f"gpu: {path} has figures of {found}, and this is {hardware['device']}; pass another --out")
    return document


def _write(path: Path, document: Mapping[str, object]) -> None:
    """At once, so that a run that is killed leaves a whole file."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def _line(row: Row) -> str:
    return " ".join(f"{key}={value}" for key, value in row.items() if value is not None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="All that only a GPU can tell, on random weights of published sizes; meant for half an hour.",
    )
    add = parser.add_argument
    add(
        "--part",
        action="append",
        choices=list(PARTS),
        help="only this part, in this process; repeat for more",
    )
    add("--again", action="store_true", help="measure parts anew that the file has")
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(_REAL), help="default: 1B 7B 8B")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="", help="default: bfloat16 on CUDA")
    add("--minutes", type=float, default=8.0, help="a part that takes longer is cut short (default 8)")
    add("--out", type=Path, default=Path("gpu"), metavar="DIR", help="folder of JSON and drawings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
