from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ced.model.runtime import OnnxModel
from ced.serve.app import Application
from ced.serve.body import Limits
from tests.serve.served import running


@pytest.fixture(scope="session")
def address(graph: Path) -> Iterator[str]:
    """A server of the small graph that accepts a megabyte and a minute."""
    with running(Application(OnnxModel(graph), "small", limits=Limits(megabytes=1, seconds=60))) as url:
        yield url


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
