"""Server processes and engines that tests share, each started when first asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mixes import Lab, make_lab
from tests.server_process import REAL, SCRIPTED, Server, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real server with the bundled checkpoint on one thread; leave it idle and alive."""
    # A small cache: the default one takes a second to fill with zeros.
    with running(
        REAL, tmp_path_factory.mktemp("server"), "--num-threads", "1", "--num-blocks", "1024"
    ) as real:
        real.wait_ready()
        yield real


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose engine is scripted; leave it idle and alive."""
    with running(SCRIPTED, tmp_path_factory.mktemp("scripted"), "--max-n", "3") as fake:
        fake.wait_ready()
        yield fake


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A tiny model in float64 and its oracle; every test takes a fresh engine from it."""
    return make_lab(tmp_path_factory.mktemp("lab"))
