"""Inspections as tables for a terminal: rows are layers, columns positions, side by side where the width allows.

Knows widths and marks; computes nothing and judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from training.lens import Inspection, Reading
from training.observations import Observation, Verdict

_CLIP: Final = 10
"""Widest token text in a cell; longer ones end in an ellipsis."""

_NARROWEST: Final = 44
"""With less width than this for each checkpoint, they are printed one below the other."""

_ROW_LABEL_WIDTH: Final = 8
_GAP: Final = 2
_SETTLED: Final = "◆"
_BAR_WIDTH: Final = 20
_SHARE_WIDTH: Final = len("100% ")
_VERDICT_STYLES: Final = {Verdict.TRUE: "green", Verdict.FALSE: "red", Verdict.NOT_APPLICABLE: "dim"}
_LEGEND: Final = (
    "Rows are layers: 0 the embedding, the last the output. Cells: top token, its probability in %. "
    f"{_SETTLED} the row from which on the top token stays. · is a space, ↵ a line end."
)


def print_inspections(
    console: Console,
    inspections: Sequence[Inspection],
    observations: Sequence[Observation],
    *,
    num_last: int,
) -> None:
    """Print the last positions of every inspection, how early tokens settle, and what was observed."""
    console.print(Text(_LEGEND, style="dim"))
    width = (console.width - _GAP * (len(inspections) - 1)) // len(inspections)
    if width < _NARROWEST:
        for inspection in inspections:
            _print_beside(console, [_blocks(inspection, console.width, num_last)])
    else:
        _print_beside(console, [_blocks(inspection, width, num_last) for inspection in inspections])
    console.print(_shares(inspections, console.width))
    for observation in observations:
        console.print(_observation(observation, [inspection.name for inspection in inspections]))


def _print_beside(console: Console, columns: Sequence[Iterator[RenderableType]]) -> None:
    for blocks in zip_longest(*columns, fillvalue=""):
        if len(blocks) == 1:
            console.print(blocks[0])
            continue
        grid = Table.grid(expand=True, padding=(0, _GAP, 0, 0))
        for _ in blocks:
            grid.add_column(ratio=1)
        grid.add_row(*blocks)
        console.print(grid)


def _blocks(inspection: Inspection, width: int, num_last: int) -> Iterator[RenderableType]:
    """A title, then tables of as many positions as fit `width`."""
    reading = inspection.reading
    first = max(0, reading.num_positions - num_last)
    yield Text.assemble("\n", (inspection.name, "bold"), (_caption(inspection, first), "dim"))
    room = width - _ROW_LABEL_WIDTH
    pending: list[int] = []
    for position in range(first, reading.num_positions):
        pending.append(position)
        if _needed(inspection, pending) > room and len(pending) > 1:
            yield _table(inspection, pending[:-1])
            pending = [position]
    yield _table(inspection, pending)


def _caption(inspection: Inspection, first: int) -> str:
    reading = inspection.reading
    shown = f", the last {reading.num_positions - first} shown" if first else ""
    head = "tied head" if inspection.is_head_tied else "untied head"
    norm = ", no final norm" if reading.is_raw else ""
    return f"  {reading.num_layers} layers, {head}{norm}, {reading.num_positions} positions{shown}"


def _needed(inspection: Inspection, positions: Sequence[int]) -> int:
    return sum(_text_width(inspection, position) + 4 + _GAP + 1 for position in positions)


def _text_width(inspection: Inspection, position: int) -> int:
    reading = inspection.reading
    ids = {int(token) for token in reading.top_RN[:, position]} | {int(reading.ids_N[position])}
    return max(cell_len(_clip(inspection.texts(token))) for token in ids)


def _table(inspection: Inspection, positions: Sequence[int]) -> Table:
    reading = inspection.reading
    table = Table(box=None, padding=(0, _GAP, 0, 0), collapse_padding=True, pad_edge=False)
    table.add_column("after", style="dim", justify="right", no_wrap=True)
    for position in positions:
        is_new = position >= inspection.num_prompt_tokens
        header = Text(f" {position}\n ", style="dim")
        text = _clip(inspection.texts(int(reading.ids_N[position])))
        header.append(text, style="bold cyan" if is_new else "bold")
        table.add_column(header, no_wrap=True)
    for row in range(reading.num_layers + 1):
        cells = [
            _cell(reading, row, position, inspection, _text_width(inspection, position))
            for position in positions
        ]
        table.add_row(_row_label(reading, row), *cells)
    return table


def _row_label(reading: Reading, row: int) -> str:
    if row == 0:
        return "embed 0"
    return f"out {row}" if row == reading.num_layers else str(row)


def _cell(reading: Reading, row: int, position: int, inspection: Inspection, width: int) -> Text:
    settled = int(reading.settled_N[position])
    probability = float(reading.probabilities_RNK[row, position, 0])
    text = set_cell_size(_clip(inspection.texts(int(reading.top_RN[row, position]))), width)
    style = "dim" if row < settled else "bold green" if row == settled else ""
    mark = _SETTLED if row == settled else " "
    return Text(f"{mark}{text} {100 * probability:3.0f}", style=style)


def _clip(text: str) -> str:
    if cell_len(text) <= _CLIP:
        return text
    return set_cell_size(text, _CLIP - 1).rstrip() + "…"


def _shares(inspections: Sequence[Inspection], width: int) -> Table:
    """Share of positions settled by each layer, checkpoints beside one another."""
    table = Table(
        title="\nPositions settled by each layer", title_justify="left", box=None, padding=(0, _GAP, 0, 0)
    )
    room = max(_SHARE_WIDTH, (width - _ROW_LABEL_WIDTH) // len(inspections) - _GAP)
    table.add_column("after", style="dim", justify="right", min_width=len("after"))
    for inspection in inspections:
        table.add_column(inspection.name, no_wrap=True, max_width=room)
    bar_width = min(_BAR_WIDTH, room - _SHARE_WIDTH)
    for row in range(max(inspection.reading.num_layers for inspection in inspections) + 1):
        table.add_row(str(row), *(_share(inspection.reading, row, bar_width) for inspection in inspections))
    return table


def _share(reading: Reading, row: int, bar_width: int) -> str:
    if row > reading.num_layers:
        return ""
    share = float(reading.settled_share_R[row])
    return f"{share:4.0%} " + "█" * round(bar_width * share)


def _observation(observation: Observation, names: Sequence[str]) -> Text:
    lines = Text(f"\n{observation.claim}", style="bold")
    for name, finding in zip(names, observation.findings, strict=True):
        lines.append(f"\n  {finding.verdict:<5} ", style=_VERDICT_STYLES[finding.verdict])
        lines.append(f"{name}: {finding.evidence}", style="not bold")
    return lines
