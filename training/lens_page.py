"""Inspections as one HTML page that needs nothing from elsewhere and runs nothing that a token says.

Knows markup and escaping; computes nothing and judges nothing. Style, script and frame are in lens_page.html.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template

from training.lens import Inspection, Reading
from training.observations import FEW, HARDLY_ANY, NEARLY_EVERY, Observation
from training.token_text import printable


def page(
    prompt: str, inspections: Sequence[Inspection], observations: Sequence[Observation], *, num_last: int
) -> str:
    """The whole page: the last positions of every inspection, how early tokens settle, what was observed."""
    frame = files("training").joinpath("lens_page.html").read_text(encoding="utf-8")
    is_raw = inspections[0].reading.is_raw
    return Template(frame).substitute(
        script_hash=_hash(frame.partition("<script>")[2].partition("</script>")[0]),
        prompt=escape("".join(letter if letter in "\n\t" else printable(letter) for letter in prompt)),
        norm="; the rows before it without the final norm" if is_raw else "",
        checkpoints="\n".join(_checkpoint(inspection, num_last) for inspection in inspections),
        shares=_shares(inspections),
        observations=_claims(inspections, observations),
        nearly_every=f"{NEARLY_EVERY:.0%} of positions",
        few=f"{FEW:.0%}",
        hardly_any=f"{HARDLY_ANY:.0%}",
    )


def _hash(script: str) -> str:
    """What the page's policy calls its one script; anything else that looks like one does not run."""
    return "sha256-" + b64encode(sha256(script.encode()).digest()).decode()


def _checkpoint(inspection: Inspection, num_last: int) -> str:
    reading = inspection.reading
    first = max(0, reading.num_positions - num_last)
    head = "tied head" if inspection.is_head_tied else "untied head"
    shown = f", the last {reading.num_positions - first} shown" if first else ""
    caption = f"{reading.num_layers} layers, {head}, {reading.num_positions} positions{shown}"
    columns = range(first, reading.num_positions)
    header = "".join(_column_head(inspection, position) for position in columns)
    rows = "\n".join(_row(inspection, row, columns) for row in range(reading.num_layers + 1))
    return (
        f'<section><h2>{escape(inspection.name)}</h2><p class="muted">{caption}</p>\n'
        f'<div class="scroll"><table class="lens"><thead><tr><th scope="col">after</th>{header}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _column_head(inspection: Inspection, position: int) -> str:
    is_new = position >= inspection.num_prompt_tokens
    text = escape(inspection.texts(int(inspection.reading.ids_N[position])))
    kind = ' class="new"' if is_new else ""
    return f'<th scope="col"{kind} title="{text}"><small>{position}</small><bdi>{text}</bdi></th>'


def _row(inspection: Inspection, row: int, columns: range) -> str:
    cells = "".join(
        _cell(inspection, row, position, row == 0 and position == columns[0]) for position in columns
    )
    return f'<tr><th scope="row">{_row_label(inspection.reading, row)}</th>{cells}</tr>'


def _row_label(reading: Reading, row: int) -> str:
    if row == 0:
        return "embed 0"
    return f"out {row}" if row == reading.num_layers else str(row)


def _cell(inspection: Inspection, row: int, position: int, is_entry: bool) -> str:
    """`is_entry`: the cell that the tab key reaches; from it, arrow keys lead to the others."""
    reading = inspection.reading
    texts = [inspection.texts(int(token)) for token in reading.guesses_RNK[row, position]]
    probabilities = [float(p) for p in reading.probabilities_RNK[row, position]]
    settled = int(reading.settled_N[position])
    kind = "settled same" if row == settled else "same" if row > settled else ""
    best = [[text, f"{p:.1%}"] for text, p in zip(texts, probabilities, strict=True)]
    return (
        f'<td class="{kind}" tabindex="{0 if is_entry else -1}" style="--p:{probabilities[0]:.3f}" '
        f'data-top="{escape(json.dumps(best, ensure_ascii=False))}">'
        f"<bdi>{escape(texts[0])}</bdi><small>{100 * probabilities[0]:.0f}</small></td>"
    )


def _shares(inspections: Sequence[Inspection]) -> str:
    names = "".join(f'<th scope="col">{escape(inspection.name)}</th>' for inspection in inspections)
    num_rows = max(inspection.reading.num_layers for inspection in inspections) + 1
    rows = "\n".join(
        f'<tr><th scope="row">{row}</th>{"".join(_share(i.reading, row) for i in inspections)}</tr>'
        for row in range(num_rows)
    )
    return (
        f'<table class="plain shares"><thead><tr><th scope="col">after</th>{names}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _share(reading: Reading, row: int) -> str:
    if row > reading.num_layers:
        return "<td></td>"
    share = float(reading.settled_share_R[row])
    return f'<td><span class="bar" style="--p:{share:.3f}"><i></i></span>{share:.0%}</td>'


def _claims(inspections: Sequence[Inspection], observations: Sequence[Observation]) -> str:
    names = "".join(f'<th scope="col">{escape(inspection.name)}</th>' for inspection in inspections)
    rows = "\n".join(_claim(observation) for observation in observations)
    return (
        f'<table class="plain claims"><thead><tr><th scope="col">observation</th>{names}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _claim(observation: Observation) -> str:
    cells = "".join(
        f'<td><b class="{finding.verdict}">{finding.verdict}</b><br>{escape(finding.evidence)}</td>'
        for finding in observation.findings
    )
    return f'<tr><th scope="row">{escape(observation.claim)}</th>{cells}</tr>'
