"""How completions are judged."""

import pytest

from benchmarks.completions import distinct_share, parses_to_last_statement


@pytest.mark.parametrize(
    "text",
    [
        "def f(n):\n    return n\n",
        "def f(n):\n    if n:\n        x = (n,\n",
        'def f(n):\n    """Unfinished',
        "x = 1\ny = ((",
        "class A:\n    def f(self):\n        return 1\n\n    def g(sel",
    ],
)
def test_an_unfinished_end_is_no_error(text):
    assert parses_to_last_statement(text)


@pytest.mark.parametrize(
    "text", ["def f(n:\n    return\n", "x = )\n", "def f():\n  x\n y\n", "x = 1 2\ny", "x\0\n"]
)
def test_what_is_no_python_is_told(text):
    assert not parses_to_last_statement(text)


def test_a_loop_is_not_distinct():
    assert distinct_share([list(range(20))]) == 1.0
    assert distinct_share([[1, 2] * 10]) == pytest.approx(2 / 17)
