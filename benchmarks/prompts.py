"""The Python beginnings that decoding is timed on: four as short as a person types, four as long as a function.

Knows text only; tokenizers belong to the checkpoints.
"""

from __future__ import annotations

from typing import Final

PROMPTS: Final[tuple[str, ...]] = (
    "def fibonacci(n):\n",
    "class Point:\n    def __init__(self, x, y):\n",
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "with open(path) as file:\n    for line in file:\n",
    '''import os
import sys


def list_files(directory):
    """Return the names of all regular files below a directory, sorted."""
    names = []
    for entry in os.listdir(directory):
''',
    """class Stack:
    def __init__(self):
        self._items = []

    def push(self, item):
        self._items.append(item)

    def pop(self):
""",
    """import unittest


class QueueTest(unittest.TestCase):
    def setUp(self):
        self.queue = Queue(maxsize=3)

    def test_empty(self):
        self.assertTrue(self.queue.empty())

    def test_put(self):
        self.queue.put(1)
""",
    '''def parse_header(line):
    """Split a header line into its name and its value.

    Raise ValueError if there is no colon in the line.
    """
    if not isinstance(line, str):
        raise TypeError("expected str, got %r" % type(line))
    name, separator, value = line.partition(":")
    if not separator:
''',
)
