import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ced.model.vit import CED


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for the tests alone: nothing of the user is read or written."""
    before = os.environ.get("CED_CACHE")
    os.environ["CED_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["CED_CACHE"]
    else:
        os.environ["CED_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let commands that tests start be interrupted, even if a script started this run in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not Path("/proc/mounts").exists() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def small_network() -> "CED":
    """A small network with three classes and random weights."""
    import torch  # slow to import, and most tests do without it

    from ced.model.config import ModelConfig
    from ced.model.vit import CED
    from ced.sound.labels import ClassTable

    torch.manual_seed(0)
    config = ModelConfig(embed_dim=32, num_heads=2, depth=1, outputdim=3, target_length=112)
    return CED(config, ClassTable(("bark", "bell", "rain"))).eval()


@pytest.fixture(scope="session")
def small_checkpoint(small_network: "CED", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network as a checkpoint."""
    from ced.model import loading

    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    loading.save(path, small_network)
    return path


@pytest.fixture(scope="session")
def graph(small_network: "CED", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network as a graph."""
    from ced.model.graph.export import export
    from ced.model.loading import weights_of

    path = tmp_path_factory.mktemp("graph") / "small.onnx"
    export(weights_of(small_network), path)
    return path
