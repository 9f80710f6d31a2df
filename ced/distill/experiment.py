"""The folder of one training run: its configuration, measurements and best networks, and the state to resume from.

    config.yaml            the whole configuration, and the command that it is for
    train.log              the log
    metrics.jsonl          one line for each epoch
    events.out.tfevents.*  the same for TensorBoard
    curves.png             loss, learning rate and mAP
    best_ep012_mAP_0.4312.safetensors   the best networks
    last.safetensors       the newest network
    averaged.safetensors   the result: the mean of the best; without validation the result is last.safetensors
    resume.pt              the state at the end of the last complete epoch, from which a run resumes
    job.txt                under torchrun: the names of the job, by which the run is found when torchrun restarts it

On resuming, the other files are brought back to the state in resume.pt.
"""

import copy
import dataclasses
import hashlib
import json
import logging
import re
import secrets
import shlex
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch

from ced.config import TrainerConfig, command_of, dump, load_config
from ced.errors import ConfigError, TrainingError
from ced.files import errors_held, writing, written_aside
from ced.model import loading, weights
from ced.model.vit import CED
from ced.text import quoted

CONFIG_NAME = "config.yaml"
STATE_NAME = "resume.pt"
METRICS_NAME = "metrics.jsonl"
LAST_NAME = "last.safetensors"
RESULT_NAME = "averaged.safetensors"
JOB_NAME = "job.txt"
_FREE_KEYS = {"num_workers"}  # may differ on resuming: they do not affect the result
_STAMP = re.compile(r"\d{4}(-\d\d){2}_\d\d(-\d\d){2}(_\d+)?")  # the name of an experiment's folder, see `create_folder`

C = TypeVar("C", bound=TrainerConfig)


@dataclass
class State:
    """The state of a run at the end of an epoch, in tensors and plain values only."""

    epoch: int = 0  # epochs trained
    history: list[dict[str, float]] = field(default_factory=list)  # the lines of metrics.jsonl
    kept: list[tuple[float, int, str]] = field(default_factory=list)  # (mAP, epoch, file), best first
    stale: int = 0  # validations since the last gain
    world_size: int = 1  # processes that began it
    finished: bool = False  # the result and all records are written
    stepper: dict[str, Any] = field(default_factory=dict)  # weights, and all that the next step depends on
    config: str = ""  # SHA-256 of config.yaml; "" if an earlier release began the run

    def add_validation(self, map: float, epoch: int, n_saved: int) -> str | None:
        """Record the mAP of an epoch; return a file name for its network if it is among the best `n_saved`."""
        self.stale = self.stale + 1 if self.kept and map <= self.kept[0][0] else 0
        entry = (map, epoch, f"best_ep{epoch:03d}_mAP_{map:.4f}.safetensors")
        self.kept = sorted([*self.kept, entry], key=lambda one: (-one[0], one[1]))[:n_saved]
        return entry[2] if entry in self.kept else None


def create_folder(config: TrainerConfig, name: str, job: Sequence[str] = ()) -> Path:
    """Make the folder of a new run, `<outputpath>/<name>/<time stamp>`, with its configuration and names of its job.

    The folder is renamed to that once they are written, so that every experiment has them.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parent = config.outputpath / name
    parent.mkdir(parents=True, exist_ok=True)
    unnamed = parent / f".{stamp}.{secrets.token_hex(4)}.partial"
    try:
        unnamed.mkdir()
        with written_aside(unnamed / CONFIG_NAME) as path:
            path.write_text(dump(config), encoding="utf-8")
        if job:
            (unnamed / JOB_NAME).write_text("".join(f"{each}\n" for each in job), encoding="utf-8")
        folder, again = parent / stamp, 1
        while True:
            try:
                return unnamed.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
            again += 1
            folder = parent / f"{stamp}_{again}"
    finally:
        shutil.rmtree(unnamed, ignore_errors=True)


def find_folder(config: C, name: str, job: Sequence[str]) -> Path | None:
    """Return the newest experiment of a name that a job began with a configuration; None if there is none.

    Raises:
        ConfigError: the configuration of an experiment of the job is damaged.
    """
    for path in sorted((config.outputpath / name).glob(f"[!.]*/{JOB_NAME}"), reverse=True):  # not of unfinished folders
        begun_by = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if not set(begun_by) & set(job):
            continue
        before = config_path(path.parent)
        if command_of(before) == config.command and _changed_key(config, load_config(type(config), before)) is None:
            return path.parent
    return None


def run_name(path: Path) -> str | None:
    """Return the name of a run, given its experiment or a file in it; None for any other path."""
    path = path.absolute()
    for place in (path, path.parent):
        if _STAMP.fullmatch(place.name):
            return place.parent.name
    return None


def config_path(folder: Path) -> Path:
    """Return the path of an experiment's configuration.

    Raises:
        TrainingError: the folder is not an experiment.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise TrainingError(f"{quoted(str(folder))} is not an experiment: it has no {CONFIG_NAME}")
    return path


def check_resumable(config: C, folder: Path) -> None:
    """Check that the run of an experiment was begun with a configuration.

    Raises:
        TrainingError: the folder is not an experiment.
        ConfigError: a key that affects the result has another value than in the experiment's config.yaml.
    """
    path = config_path(folder)
    before = load_config(type(config), path)
    if key := _changed_key(config, before):
        value = config.model_dump(mode="json")[key]
        text = value if isinstance(value, str) else json.dumps(value)
        words = ["ced", config.command, str(path), "--pretrained", str(folder), f"--{key.replace('_', '-')}", text]
        raise ConfigError(
            f"{key} is {getattr(config, key)}, but {folder} was begun with {getattr(before, key)}; a run is resumed "
            "with the settings that it was begun with. To train its result further, begin a new experiment: "
            f"{shlex.join(words)}"
        )


def settings_of(config: TrainerConfig) -> dict[str, Any]:
    """Return the settings that affect the result of a run, by their keys."""
    return {key: getattr(config, key) for key in type(config).model_fields if key not in _FREE_KEYS}


def _changed_key(config: C, before: C) -> str | None:
    """Return the first setting that affects the result and differs; None if there is none."""
    was, now = settings_of(before), settings_of(config)
    return next((key for key in now if was[key] != now[key]), None)


def load_state(folder: Path) -> State | None:
    """Read the state of a run; None if it has not finished an epoch.

    Raises:
        TrainingError: the file is damaged, or missing although the experiment has results; or config.yaml was changed.
    """
    path = folder / STATE_NAME
    if not path.exists():
        if results := _results(folder):
            raise TrainingError(
                f"{folder} cannot be resumed: it has no {STATE_NAME}, but it has results ({results}); to train "
                f"further, begin a new experiment with --pretrained {shlex.quote(str(folder))}"
            )
        return None
    try:
        _check_archive(path)
        state = State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises errors of many kinds for damaged files
        raise TrainingError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if state.config and state.config != config_digest(folder):
        raise TrainingError(f"{folder / CONFIG_NAME} is not the one that the run was begun with: damaged, or edited")
    return state


def _results(folder: Path) -> str | None:
    """Return the name of a file that proves that an experiment has finished an epoch; None if there is none."""
    metrics = folder / METRICS_NAME
    if metrics.is_file() and metrics.stat().st_size:
        return METRICS_NAME
    return RESULT_NAME if (folder / RESULT_NAME).exists() else None


def _check_archive(path: Path) -> None:
    """Verify the checksum of every entry of a file written by torch.save, which torch.load does not.

    Raises:
        ValueError: an entry is damaged, or its stated size exceeds that of the file.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise ValueError(f"{entry.filename} is compressed, or larger than the file")
        if (name := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {name} is wrong")


def config_digest(folder: Path) -> str:
    """Return the SHA-256 of an experiment's config.yaml."""
    return hashlib.sha256((folder / CONFIG_NAME).read_bytes()).hexdigest()


def save_state(folder: Path, state: State) -> None:
    """Write the state of a run; if the process is killed, either the previous or the new state remains."""
    values = {one.name: getattr(state, one.name) for one in dataclasses.fields(State)}
    with written_aside(folder / STATE_NAME) as path, errors_held(path) as file:
        torch.save(values, cast("IO[bytes]", file))


def remove_unkept(folder: Path, state: State) -> None:
    """Remove networks that are not among the best, and the leftovers of an interrupted epoch."""
    names = {name for _, _, name in state.kept}
    for path in [*folder.glob("best_ep*_mAP_*"), *folder.glob("*.partial")]:
        if path.name not in names:
            path.unlink(missing_ok=True)


def save_network(path: Path, network: CED) -> None:
    """Save a network as a tagger, which returns probabilities."""
    loading.save(path, as_tagger(network))


def as_tagger(network: CED) -> CED:
    """Return a network that shares the weights of another and returns probabilities, whatever that one returns."""
    tagger = copy.copy(network)
    tagger.config = dataclasses.replace(network.config, pooling="mean")
    return tagger


def make_result(folder: Path, state: State, average: bool) -> None:
    """Write the result of a validated run: the mean of its kept networks, or the best of them."""
    paths = [folder / name for _, _, name in state.kept]
    result = weights.average(paths if average else paths[:1])
    loading.save(folder / RESULT_NAME, loading.build(result))


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append the package's log messages of level INFO and above to a file, within the context."""
    logger = logging.getLogger("ced")
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        with suppress(OSError):  # of a full disk, which was reported when the line was written
            handler.close()


class _LogFile(logging.FileHandler):
    """A log file that raises when it cannot be written; `logging` would print a traceback and continue."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        """Raise the current exception, as a `WriteError` if it is one of the operating system."""
        with writing(Path(self.baseFilename)):
            raise
