"""The real command line and server with the scripted engine in the worker."""

from __future__ import annotations

import sys

from config.errors import StartupError
from tests.scripted_engine import load


def main() -> int:
    # Here, because the worker's process imports this module too.
    from config.settings import Settings
    from server.cli import run

    words = sys.argv[1:]
    flags = {
        flag.removeprefix("--").replace("-", "_"): value
        for flag, value in zip(*[iter(words)] * 2, strict=True)
    }
    try:
        return run(Settings.load(flags), load=load)
    except StartupError as error:
        print(f"layerskip: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
