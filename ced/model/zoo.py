"""The published models as a table, and the files of a name or path. Needs no torch.

Each name has pinned sources: a revision of a Hugging Face repository with the sha256 of its weights, a file of a Zenodo
record, or both.
"""

import difflib
import hashlib
import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ced.errors import CheckpointError, ChecksumError, DownloadError, MissingPackageError
from ced.progress import Progress, silent

if TYPE_CHECKING:
    from ced.model.config import ModelConfig
    from ced.model.weights import Weights

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
ZENODO = "https://zenodo.org"
# The files that make a folder a checkpoint, the first present one is read: of experiments, then of Hugging Face.
EXPERIMENT_FILES = ("averaged.safetensors", "last.safetensors", "averaged.pt")
CHECKPOINT_FILES = (*EXPERIMENT_FILES, "model.safetensors")


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub at one revision, licensed Apache-2.0."""

    repo: str
    revision: str
    sha256: str  # of WEIGHTS_FILE

    licence: ClassVar[str] = "Apache-2.0"

    @property
    def place(self) -> str:
        """Its name in messages and lists."""
        return self.repo


@dataclass(frozen=True)
class Zenodo:
    """A file of a Zenodo record, licensed CC BY 4.0."""

    record: int
    file: str

    licence: ClassVar[str] = "CC BY 4.0"

    @property
    def place(self) -> str:
        """Its name in messages and lists."""
        return f"Zenodo {self.record}"

    @property
    def url(self) -> str:
        """Its address."""
        return f"{ZENODO}/records/{self.record}/files/{self.file}?download=1"


@dataclass(frozen=True)
class Entry:
    """One published model."""

    name: str
    width: int
    heads: int
    params: float  # millions
    map: float | None  # published mAP on AudioSet's evaluation set, percent; None: not a tagger
    note: str
    hub: Hub | None  # preferred to Zenodo
    zenodo: Zenodo | None  # needs torch; a model has one of the two sources at least

    @property
    def config(self) -> "ModelConfig":
        """The configuration of the network."""
        from ced.model.config import ModelConfig

        return ModelConfig(embed_dim=self.width, num_heads=self.heads)

    @property
    def sources(self) -> tuple[Hub | Zenodo, ...]:
        """Where its weights are published, the preferred source first."""
        return tuple(source for source in (self.hub, self.zenodo) if source is not None)

    @property
    def megabytes(self) -> float:
        """The approximate size of its weights: four bytes per parameter."""
        return 4 * self.params


DEFAULT_MODEL = "ced_mini"

_TINY, _MINI, _SMALL, _BASE = (192, 3, 5.5), (256, 4, 9.6), (384, 6, 22.0), (768, 12, 86.0)  # width, heads, params
_DISTILLED = "distilled from an ensemble of five teachers"
_MASKED = "masked pre-training, the start of students: its output layer is untrained"
_MAIN_RECORD = 8275347


def _distilled(name: str, size: tuple[int, int, float], score: float, hub: Hub, zenodo: Zenodo) -> Entry:
    return Entry(name, *size, map=score, note=_DISTILLED, hub=hub, zenodo=zenodo)


def _masked(name: str, size: tuple[int, int, float]) -> Entry:
    return Entry(name, *size, None, _MASKED, None, Zenodo(_MAIN_RECORD, f"{name}_mae_as_10s.pt"))


MODELS: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        _distilled(
            "ced_tiny",
            _TINY,
            48.1,
            Hub(
                "mispeech/ced-tiny",
                "ace276d29dd0bb3f3517b0fa8cf300738c409019",
                "0e086f0cd62814c6def89001f3f25193f75955696f6975ef6800af31d00d6dd7",
            ),
            Zenodo(_MAIN_RECORD, "audiotransformer_tiny_mAP_4814.pt"),
        ),
        _distilled(
            "ced_mini",
            _MINI,
            49.0,
            Hub(
                "mispeech/ced-mini",
                "26c3ebcae85d4330f4fc26763f029539a3afcda0",
                "e4070d02ca53ec7a1df83bbf779a0e70bc2bbc0a9bacde6330e1dc37c990b215",
            ),
            Zenodo(_MAIN_RECORD, "audiotransformer_mini_mAP_4896.pt"),
        ),
        _distilled(
            "ced_small",
            _SMALL,
            49.6,
            Hub(
                "mispeech/ced-small",
                "06bb40c5ec089e96867ebc5246be02441f4a71e4",
                "a495e319a620dec4c8b7ca7bb927667ed68169a9efc1a943ccbf5d5c6f9c0c71",
            ),
            Zenodo(8275319, "audiotransformer_small_mAP_4958.pt"),
        ),
        _distilled(
            "ced_base",
            _BASE,
            50.0,
            Hub(
                "mispeech/ced-base",
                "db3e14a8db4c21b56b165261c39649741a900e7f",
                "314935693ed1dcef07576ca0c41277c51c642f3847bc5eb03918c5277eb79af9",
            ),
            Zenodo(_MAIN_RECORD, "audiotransformer_base_mAP_4999.pt"),
        ),
        _masked("audiotransformer_tiny", _TINY),
        _masked("audiotransformer_mini", _MINI),
        _masked("audiotransformer_small", _SMALL),
        _masked("audiotransformer_base", _BASE),
        Entry(
            "audiotransformer_base_4740",
            *_BASE,
            47.4,
            "the one released teacher",
            None,
            Zenodo(7964975, "audiotransformer_base_mAP_47_40.pt"),
        ),
    )
}

BOXED: Mapping[str, Path] = {  # graphs in the package, for tagging, each with its model card
    "esc10": Path(__file__).parent / "boxed" / "esc10.onnx",
}


def list_models() -> list[str]:
    """Return the names of the models: the published ones, and those in the package."""
    return [*MODELS, *BOXED]


def cache_dir() -> Path:
    """Return the folder for Zenodo's files and for graphs: $CED_CACHE, else $XDG_CACHE_HOME/ced, else ~/.cache/ced."""
    if given := os.environ.get("CED_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ced"


def read_weights(name_or_path: str | os.PathLike[str], progress: Progress = silent) -> "Weights":
    """Return the weights of a published name, downloaded on first use, or of a checkpoint.

    Raises:
        CheckpointError: neither a name nor a checkpoint.
        DownloadError: a file is not cached and could not be downloaded.
        MissingPackageError: a `.pt` file where torch is not installed.
    """
    from ced.model import weights

    if isinstance(name_or_path, str) and name_or_path in MODELS:
        return weights.read(fetch(name_or_path, progress))
    return weights.read(local_path(name_or_path))


def fetch(name: str, progress: Progress = silent) -> Path:
    """Return the file of a published model's weights, downloaded on first use.

    It is a safetensors file of the hub, whose sha256 is checked on every use. Where the hub cannot be reached and torch
    is installed, a `.pt` file of the same model is taken from the cache or from Zenodo, with a warning, as Zenodo
    publishes no checksum.

    Raises:
        CheckpointError: the name is unknown.
        ChecksumError: the content is not the published one; it is removed.
        DownloadError: the file is not cached and could not be downloaded.
        MissingPackageError: the model is published only as a `.pt` file, and torch is not installed.
    """
    entry = entry_of(name)
    has_torch = find_spec("torch") is not None
    if entry.hub is None:
        if not has_torch:
            raise MissingPackageError("torch", f"reading the weights of {name}")
        assert entry.zenodo is not None
        return _from_zenodo(name, entry.zenodo, progress)
    try:
        return _from_hub(entry.hub, progress)
    except ChecksumError:
        raise
    except DownloadError as error:
        reason = str(error)
        if has_torch and entry.zenodo is not None:
            try:
                path = _from_zenodo(name, entry.zenodo, progress)
            except DownloadError as second:
                reason = f"{reason}; {second}"
            else:
                logger.warning("%s; using %s, for which no checksum is published", reason, path)
                return path
        raise DownloadError(
            f"{name} is not cached: {reason}; pass the path of a local file instead of the name, or use a model in the"
            f" package: -m {', '.join(BOXED)}"
        ) from error


def cached(entry: Entry) -> dict[Hub | Zenodo, Path]:
    """Return the cached files of a model, by source."""
    from ced.model.download import cached_hub_file

    found: dict[Hub | Zenodo, Path] = {}
    if (
        entry.hub is not None
        and (path := cached_hub_file(entry.hub.repo, WEIGHTS_FILE, entry.hub.revision)) is not None
    ):
        found[entry.hub] = path
    if entry.zenodo is not None and (file := cache_dir() / entry.zenodo.file).is_file():
        found[entry.zenodo] = file
    return found


def damage(source: Hub | Zenodo, path: Path) -> str | None:
    """Check the content of a source's file; return the problem, or None.

    A file of the hub must have its pinned sha256. Zenodo publishes no checksum, so the format is checked.
    """
    if isinstance(source, Zenodo):
        return None if is_torch_file(path) else "it is not a complete file of torch.save"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == source.sha256 else f"its sha256 is {found}, not the published {source.sha256}"


def checkpoint_file(path: Path) -> Path:
    """Return the file of a checkpoint, given as the file or as its folder.

    For a folder of experiments, it is that of the newest experiment with a checkpoint; their names are time stamps.

    Raises:
        CheckpointError: the path does not exist, the file is empty, or the folder has no checkpoint.
    """
    if path.is_dir():
        if (found := _first_of(CHECKPOINT_FILES, path)) is not None:
            return checkpoint_file(found)
        for folder in sorted((one for one in path.iterdir() if one.is_dir()), reverse=True):
            if (found := _first_of(EXPERIMENT_FILES, folder)) is not None:
                logger.info("the newest checkpoint of %s is %s", path, found)
                return checkpoint_file(found)
        raise CheckpointError(f"folder {path} holds no checkpoint; it needs one of {', '.join(CHECKPOINT_FILES)}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    if not path.stat().st_size:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes)")
    return path


def _first_of(names: Iterable[str], folder: Path) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def local_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the path of a model that is not a published name.

    Raises:
        CheckpointError: it does not exist and looks like a misspelt name; the message lists the names.
    """
    try:
        path = Path(name_or_path).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, or the home folder of an unknown user
        raise CheckpointError(f"the model {name_or_path!r} is neither a name nor a path: {error}") from error
    if not os.fspath(name_or_path):
        raise CheckpointError(f"the model is an empty name; known: {', '.join(list_models())}")
    if not exists and isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix:
        entry_of(path.name)
    return path


def entry_of(name: str) -> Entry:
    """Return the row of a published model.

    Raises:
        CheckpointError: the name is unknown; the message lists the names.
    """
    if name in BOXED:
        raise CheckpointError(
            f"{name} is a graph in the package, without the weights that are needed here; it can tag and embed"
        )
    if name not in MODELS:
        known = list_models()
        raise CheckpointError(
            f"no model and no file is named {name!r}{nearest(name, known)}; known: {', '.join(known)}"
        )
    return MODELS[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that suggests the most similar known names; an empty text if there are none."""
    found = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _from_hub(source: Hub, progress: Progress) -> Path:
    from ced.model.download import cached_hub_file, hub_file, offline, remove_hub_file

    was_cached = cached_hub_file(source.repo, WEIGHTS_FILE, source.revision) is not None
    if not was_cached and not offline():
        logger.info("downloading %s from the Hugging Face hub, once", source.repo)
    path = hub_file(source.repo, WEIGHTS_FILE, source.revision, progress)
    if (wrong := damage(source, path)) is None:
        return path
    remove_hub_file(path)
    if was_cached and not offline():
        logger.warning("%s in the cache is damaged; downloading it again", source.repo)
        return _from_hub(source, progress)
    raise ChecksumError(f"{source.repo}/{WEIGHTS_FILE} is not the published file: {wrong}; removed")


def _from_zenodo(name: str, first: Zenodo, progress: Progress) -> Path:
    """Download a file from its record or, if that lacks the file, from the other record of these models."""
    from ced.model.download import NotFoundError, download

    path = cache_dir() / first.file
    if path.is_file():
        return path
    others = [Zenodo(record, first.file) for record in (_MAIN_RECORD, 8275319) if record != first.record]
    for source in (first, *others):
        try:
            download(source.url, path, verify=lambda part: damage(first, part), progress=progress)
        except NotFoundError:
            continue
        return path
    raise DownloadError(f"no Zenodo record of {name} has {first.file}")


def is_torch_file(path: Path) -> bool:
    """Return whether a file is complete as torch.save writes it: a zip file, which ends with its index, or a pickle."""
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return file.read(2) == pickle.PROTO + b"\x02"  # files before torch 1.6 start with a pickled number
