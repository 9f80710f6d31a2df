"""The folder of one training run: what was asked, what was measured, the best networks, and how to go on after a kill.

    config.yaml            the whole configuration
    train.log              what was said
    metrics.jsonl          a line an epoch
    events.out.tfevents.*  the same for TensorBoard
    curves.png             loss, learning rate and mAP
    best_ep012_mAP_0.4312.safetensors   the best networks
    last.safetensors       the newest network
    averaged.safetensors   the result: the mean of the best; without validation the result is last.safetensors
    resume.pt              everything needed to go on from the end of the last whole epoch

resume.pt decides: what else an interrupted epoch left behind is brought back to what it says.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from ced.config import LoopConfig, dump, load
from ced.errors import ConfigError, TrainingError
from ced.files import written_aside
from ced.model import loading, weights
from ced.model.vit import CED

CONFIG_NAME = "config.yaml"
STATE_NAME = "resume.pt"
LAST_NAME = "last.safetensors"
RESULT_NAME = "averaged.safetensors"
_FREE_KEYS = {"num_workers"}  # may differ on resuming, as they do not change the result

C = TypeVar("C", bound=LoopConfig)


@dataclass
class State:
    """Where a run stands at the end of an epoch, in tensors and plain values only."""

    epoch: int = 0  # epochs done
    history: list[dict[str, float]] = field(default_factory=list)  # the lines of metrics.jsonl
    kept: list[tuple[float, int, str]] = field(default_factory=list)  # (mAP, epoch, file) of the best, best first
    stale: int = 0  # validations since the last gain
    world_size: int = 1  # processes that began it
    finished: bool = False  # nothing is left to do, the result and all records are written
    stepper: dict[str, Any] = field(default_factory=dict)  # weights, and what their next step depends on

    def rank(self, map: float, epoch: int, n_saved: int) -> str | None:
        """Take up the mAP of an epoch; return the file for its network if it is among the best `n_saved`."""
        self.stale = self.stale + 1 if self.kept and map <= self.kept[0][0] else 0
        entry = (map, epoch, f"best_ep{epoch:03d}_mAP_{map:.4f}.safetensors")
        self.kept = sorted([*self.kept, entry], key=lambda one: (-one[0], one[1]))[:n_saved]
        return entry[2] if entry in self.kept else None


def create(config: LoopConfig, name: str) -> Path:
    """Make the folder of a new run, `<outputpath>/<name>/<time stamp>`, with its configuration in it."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parent = config.outputpath / name
    parent.mkdir(parents=True, exist_ok=True)
    folder, again = parent / stamp, 1
    while True:
        try:
            folder.mkdir()
            break
        except FileExistsError:
            again += 1
            folder = parent / f"{stamp}_{again}"
    with written_aside(folder / CONFIG_NAME) as path:
        path.write_text(dump(config), encoding="utf-8")
    return folder


def check_resumable(config: C, folder: Path) -> None:
    """Make sure that a run was started with this configuration.

    Raises:
        TrainingError: the folder is no experiment.
        ConfigError: a key that changes the run has another value than in the experiment's config.yaml.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise TrainingError(f"{folder} is not an experiment: it has no {CONFIG_NAME}")
    before = load(type(config), folder / CONFIG_NAME)
    for key in type(config).model_fields:
        was, now = getattr(before, key), getattr(config, key)
        if was != now and key not in _FREE_KEYS:
            raise ConfigError(f"{key} is {now}, but {folder} was begun with {was}; a run is resumed as it was begun")


def load_state(folder: Path) -> State | None:
    """Read where a run stands; None when it has not finished an epoch.

    Raises:
        TrainingError: the file is damaged.
    """
    path = folder / STATE_NAME
    if not path.exists():
        return None
    try:
        return State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise TrainingError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error


def save_state(folder: Path, state: State) -> None:
    """Write where a run stands; a kill leaves the former state or this one."""
    values = {one.name: getattr(state, one.name) for one in dataclasses.fields(State)}
    with written_aside(folder / STATE_NAME) as path:
        torch.save(values, path)


def remove_unkept(folder: Path, state: State) -> None:
    """Remove the networks that are no longer among the best, and what an interrupted epoch left."""
    names = {name for _, _, name in state.kept}
    for path in [*folder.glob("best_ep*_mAP_*"), *folder.glob("*.partial")]:
        if path.name not in names:
            path.unlink(missing_ok=True)


def save_network(path: Path, network: CED) -> None:
    """Save a network as a tagger: one that answers with probabilities, whatever it was trained with."""
    loading.save(path, as_tagger(network))


def as_tagger(network: CED) -> CED:
    """Return a network of the same weights whose answers are probabilities."""
    tagger = copy.copy(network)
    tagger.config = dataclasses.replace(network.config, pooling="mean")
    return tagger


def make_result(folder: Path, state: State, average: bool) -> None:
    """Write the result of a validated run: the mean of its best networks, or the very best."""
    paths = [folder / name for _, _, name in state.kept]
    result = weights.average(paths if average else paths[:1])
    loading.save(folder / RESULT_NAME, loading.build(result))


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append what the package logs to a file, from INFO on, for as long as the context lasts."""
    logger = logging.getLogger("ced")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
