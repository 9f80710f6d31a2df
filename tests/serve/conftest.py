from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from ced.model.config import ModelConfig
from ced.model.graph.export import export
from ced.model.loading import weights_of
from ced.model.runtime import OnnxModel
from ced.model.vit import CED
from ced.serve.app import Application
from ced.serve.body import Limits
from ced.sound.labels import ClassTable
from tests.serve.served import running


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of three classes, as a graph."""
    torch.manual_seed(0)
    network = CED(
        ModelConfig(embed_dim=32, num_heads=2, depth=1, outputdim=3, target_length=112),
        ClassTable(("bark", "bell", "rain")),
    ).eval()
    path = tmp_path_factory.mktemp("graph") / "small.onnx"
    export(weights_of(network), path)
    return path


@pytest.fixture(scope="session")
def address(graph: Path) -> Iterator[str]:
    """A server of the small graph that accepts a megabyte and a minute."""
    with running(Application(OnnxModel(graph), "small", limits=Limits(megabytes=1, seconds=60))) as url:
        yield url


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
