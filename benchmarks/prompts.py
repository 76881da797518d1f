"""The Python beginnings that decoding is timed on, of 10 to 120 tokens each.

Knows text only; tokenizers belong to the checkpoints.
"""

from __future__ import annotations

from typing import Final

PROMPTS: Final[tuple[str, ...]] = (
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
    '''def fibonacci(n):
    """Return the first n Fibonacci numbers."""
''',
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
    """for key, value in sorted(self.items()):
    if value is None:
""",
    '''class Reader:
    """Read lines from a file object."""

    def __init__(self, fileobj, encoding="utf-8"):
        self.fileobj = fileobj
        self.encoding = encoding
        self.closed = False

    def readline(self, size=-1):
        if self.closed:
            raise ValueError("I/O operation on closed file")
''',
    """try:
    import threading
except ImportError:
    threading = None

def main(args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--verbose", action="store_true")
""",
)
