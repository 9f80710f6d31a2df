"""Short trainings of small networks on the sounds of conftest."""

import json
import socket
from pathlib import Path
from typing import Any

SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 2, "target_length": 112}
MASKS = {"TimeMasking": {"time_mask_param": 20}, "FrequencyMasking": {"freq_mask_param": 8}}


def settings(sounds: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Return the keys that short trainings share."""
    common = {
        "train_data": sounds / "train.tsv",
        "outputpath": out,
        "model": "ced_tiny",
        "model_args": SMALL,
        "pretrained": False,
        "batch_size": 16,
        "epochs": 2,
        "optimizer": "Adam",
        "optimizer_args": {"lr": 0.005},
        "mode": "off",
        "num_workers": 1,
    }
    return common | changes


def measurements(folder: Path) -> list[dict[str, float]]:
    """Return what an experiment measured in each epoch."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def free_ports(count: int) -> list[str]:
    """Return ports of this machine at which processes can join."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
