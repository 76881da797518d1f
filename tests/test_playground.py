"""The playground runs nothing but its own script, and asks for nothing that the server lacks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.server_process import Server

DRAFTS_SCRIPT = Path(__file__).parents[1] / "server" / "page" / "drafts.js"
# What would make markup, or code, of what a model said; and what would outlive the tab.
FORBIDDEN = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|Function\(|localStorage|cookie"
)


class Page(HTMLParser):
    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def having(self, attribute: str) -> list[str | None]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


@pytest.fixture(scope="module")
def markup(scripted: Server) -> str:
    return scripted.get("/").body.decode()


@pytest.fixture(scope="module")
def page(markup: str) -> Page:
    return Page(markup)


def inside(markup: str, tag: str) -> str:
    assert markup.count(f"<{tag}>") == markup.count(f"</{tag}>") == 1
    return markup.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]


def test_policy_allows_the_one_style_and_the_one_script_of_the_page_and_its_own_server(scripted: Server):
    answer = scripted.get("/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    for directive, tag in (("style-src", "style"), ("script-src", "script")):
        digest = sha256(inside(answer.body.decode(), tag).encode()).digest()
        assert policy[directive] == f"'sha256-{b64encode(digest).decode()}'"
    nothing = dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'")
    assert policy.items() >= (nothing | {"connect-src": "'self'"}).items()
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_page_names_no_other_host_and_fetches_no_file(markup: str, page: Page):
    assert not re.search(r"https?:|[\"'(]//|@import|url\(|import\(", markup)
    assert page.having("src") == []
    assert page.having("href") == ["data:,"]


def test_page_has_nothing_that_its_policy_would_block(page: Page):
    attributes = {name for _, found in page.elements for name in found}
    assert "style" not in attributes
    assert not [name for name in attributes if name.startswith("on")]


def test_script_makes_no_markup_of_text_and_keeps_the_key_for_the_session_only(markup: str):
    script = inside(markup, "script")
    assert re.findall(FORBIDDEN, script) == []
    assert "sessionStorage" in script


def test_every_element_the_script_asks_for_is_there_once(markup: str, page: Page):
    ids = page.having("id")
    assert len(ids) == len(set(ids))
    asked = set(re.findall(r'byId\("([\w-]+)"\)', inside(markup, "script")))
    assert len(asked) > 10
    assert asked <= set(ids)


def test_every_control_has_a_label(markup: str, page: Page):
    labelled = set(page.having("for")) | set(re.findall(r'<label class="check"><input id="([\w-]+)"', markup))
    controls = {found["id"] for tag, found in page.elements if tag in {"input", "textarea"}}
    assert len(controls) > 5
    assert controls <= labelled


def test_server_info_has_what_the_script_reads_of_it(scripted: Server, markup: str):
    wanted = set(re.findall(r"\binfo\.([a-z_]+(?:\.[a-z_]+)*)", inside(markup, "script")))
    assert len(wanted) > 5
    served = scripted.get("/server_info").json
    for path in wanted:
        value = served
        for name in path.split("."):
            assert name in value, path
            value = value[name]


def test_stream_tells_what_the_page_shows_of_it(server: Server):
    events = server.stream(
        prompt="class Stack:\n    def push(self, item):\n",
        max_tokens=24,
        temperature=0,
        seed=1,
        exit_layer=2,
        draft_length=5,
        return_draft_trace=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    assert events[-1] == "[DONE]"
    *chunks, last = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == 24
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    counts = last["metrics"]["speculative_decoding"]
    cycles = [cycle for chunk in chunks for cycle in chunk["choices"][0]["draft_trace"]]
    num_drafted = sum(len(cycle["drafted_ids"]) for cycle in cycles)
    assert num_drafted == counts["num_draft_tokens"] > counts["num_accepted_draft_tokens"] > 0
    assert sum(cycle["kept"] for cycle in cycles) == counts["num_accepted_draft_tokens"]
    assert sum(len(cycle["drafted_ids"]) > 0 for cycle in cycles) == counts["num_spec_steps"]
    assert all(len(cycle["drafted_tokens"]) == len(cycle["drafted_ids"]) for cycle in cycles)


def split(*runs: tuple[str, list[dict[str, object]]]) -> list[list[tuple[str, str]]]:
    """What the page's script makes of runs of text and the cycles that came with them."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node to run the page's script")
    script = DRAFTS_SCRIPT.read_text(encoding="utf-8")
    pieces = (
        "runs.map(([text, cycles]) => trace.split(text, cycles).map((piece) => [piece.kind, piece.text]))"
    )
    program = f"{script}\nconst runs = {json.dumps(runs)}, trace = new DraftTrace();\n"
    program += f"console.log(JSON.stringify({pieces}));"
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, check=True, timeout=60)
    return [[(kind, text) for kind, text in run] for run in json.loads(done.stdout)]


def cycle(*drafts: str, kept: int) -> dict[str, object]:
    return {"drafted_tokens": drafts, "kept": kept}


def test_kept_drafts_are_told_from_refused_ones_and_from_the_full_models_token():
    assert split((" a", [cycle(kept=0)]), (" b c d", [cycle(" b", " c", " x", " y", kept=2)])) == [
        [("next", " a")],
        [("kept", " b"), ("kept", " c"), ("refused", " x"), ("refused", " y"), ("next", " d")],
    ]


def test_drafts_whose_text_comes_later_are_found_in_it():
    late = split(("a", [cycle("ab", "é", kept=2)]), ("b", []), ("é!c", [cycle("c", kept=1)]), ("d", []))
    assert late == [
        [("kept", "a")],
        [("kept", "b")],
        [("kept", "é"), ("next", "!"), ("kept", "c")],
        [("next", "d")],
    ]


@pytest.mark.parametrize(
    ("text", "cycles"),
    [
        ("b", [cycle("a", kept=1)]),
        (" word and", [cycle("word", kept=1)]),
        ("aaa", [cycle("a", kept=0), cycle("a", kept=1), cycle("", "\ufffd", kept=2)]),
        ("", [cycle("a", "b", kept=0)]),
        ("x", [cycle("a", kept=0), cycle("b", kept=0), cycle(kept=0)]),
    ],
)
def test_no_text_is_lost_or_added_whatever_the_drafts_say(text: str, cycles: list[dict[str, object]]):
    (pieces,) = split((text, cycles))
    assert "".join(piece for kind, piece in pieces if kind != "refused") == text
