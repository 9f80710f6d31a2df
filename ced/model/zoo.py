"""The published models as a table, and how a name or a path becomes a file. It needs no torch."""

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ced.errors import CheckpointError, DownloadError
from ced.progress import Progress, silent

# Of a folder, the first one present is read: experiments, then Hugging Face folders.
CHECKPOINT_FILES = ("averaged.safetensors", "last.safetensors", "averaged.pt", "model.safetensors")
HUB = "https://huggingface.co"  # $HF_ENDPOINT stands for it


@dataclass(frozen=True)
class Entry:
    """One published model."""

    name: str
    width: int
    heads: int
    params: float  # millions
    url: str
    file: str  # its name in the cache
    map: float | None  # mAP on AudioSet's evaluation set as published, percent; None: not a tagger yet
    note: str
    hub: str | None  # the repository of its ONNX graph, if one is published
    licence: str = "CC BY 4.0"
    sha256: str | None = None

    @property
    def onnx_file(self) -> str:
        """The name of its ONNX graph in the cache."""
        return f"{self.name}.onnx"

    @property
    def onnx_url(self) -> str | None:
        """The address of its ONNX graph; None: no one is published."""
        endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        return None if self.hub is None else f"{endpoint}/{self.hub}/resolve/main/model.onnx"


DEFAULT_MODEL = "ced_mini"

_TINY, _MINI, _SMALL, _BASE = (192, 3, 5.5), (256, 4, 9.6), (384, 6, 22.0), (768, 12, 86.0)  # width, heads, params

_DISTILLED = "distilled from an ensemble of five teachers"
_MASKED = "masked pre-training, where students start: its output layer is untrained"
_TEACHER = "the one released teacher"


def _entry(
    name: str, size: tuple[int, int, float], score: float | None, record: int, file: str, note: str, hub: str | None
) -> Entry:
    url = f"https://zenodo.org/records/{record}/files/{file}?download=1"
    return Entry(name, *size, url=url, file=file, map=score, note=note, hub=hub)


MODELS: Mapping[str, Entry] = {
    row[0]: _entry(*row)
    for row in (
        ("ced_tiny", _TINY, 48.1, 8275347, "audiotransformer_tiny_mAP_4814.pt", _DISTILLED, "mispeech/ced-tiny"),
        ("ced_mini", _MINI, 49.0, 8275347, "audiotransformer_mini_mAP_4896.pt", _DISTILLED, "mispeech/ced-mini"),
        ("ced_small", _SMALL, 49.6, 8275347, "audiotransformer_small_mAP_4958.pt", _DISTILLED, "mispeech/ced-small"),
        ("ced_base", _BASE, 50.0, 8275347, "audiotransformer_base_mAP_4999.pt", _DISTILLED, "mispeech/ced-base"),
        ("audiotransformer_tiny", _TINY, None, 8275347, "audiotransformer_tiny_mae_as_10s.pt", _MASKED, None),
        ("audiotransformer_mini", _MINI, None, 8275347, "audiotransformer_mini_mae_as_10s.pt", _MASKED, None),
        ("audiotransformer_small", _SMALL, None, 8275347, "audiotransformer_small_mae_as_10s.pt", _MASKED, None),
        ("audiotransformer_base", _BASE, None, 8275347, "audiotransformer_base_mae_as_10s.pt", _MASKED, None),
        ("audiotransformer_base_4740", _BASE, 47.4, 7964975, "audiotransformer_base_mAP_47_40.pt", _TEACHER, None),
    )
}


BOXED: Mapping[str, Path] = {  # graphs that come with the package, for tagging; a card lies beside each
    "esc10": Path(__file__).parent / "boxed" / "esc10.onnx",
}


def list_models() -> list[str]:
    """Return the names of the models: the published ones, and those that come with the package."""
    return [*MODELS, *BOXED]


def cache_dir() -> Path:
    """Return the folder of downloaded files: $CED_CACHE, else $XDG_CACHE_HOME/ced, else ~/.cache/ced."""
    if given := os.environ.get("CED_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ced"


def fetch(name: str, progress: Progress = silent) -> Path:
    """Return the weights of a published model, downloaded on first use.

    Raises:
        CheckpointError: no such name.
        DownloadError: the file is not in the cache and cannot be fetched.
    """
    entry = entry_of(name)
    return _in_cache(name, entry.url, cache_dir() / entry.file, entry.sha256, progress)


def fetch_onnx(name: str, progress: Progress = silent) -> Path:
    """Return the ONNX graph of a published model, downloaded on first use.

    Raises:
        CheckpointError: no such name, or no graph is published of it.
        DownloadError: the file is not in the cache and cannot be fetched.
    """
    entry = entry_of(name)
    if entry.onnx_url is None:
        raise CheckpointError(f"no ONNX graph of {name} is published")
    boxed = f"; without network there is what comes with the package: -m {', '.join(BOXED)}"
    return _in_cache(name, entry.onnx_url, cache_dir() / entry.onnx_file, None, progress, instead=boxed)


def checkpoint_file(path: Path) -> Path:
    """Return the file of a checkpoint, which may be given as the folder that it is in.

    Raises:
        CheckpointError: nothing is there, or an empty file, or the folder holds none.
    """
    if path.is_dir():
        for name in CHECKPOINT_FILES:
            if (path / name).is_file():
                return checkpoint_file(path / name)
        raise CheckpointError(f"folder {path} holds no checkpoint; it needs one of {', '.join(CHECKPOINT_FILES)}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    if not path.stat().st_size:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes)")
    return path


def local_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Return what is no name as a path.

    Raises:
        CheckpointError: nothing is there, and it looks more like a misspelt name; the message says which there are.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists() and isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix:
        entry_of(path.name)
    return path


def entry_of(name: str) -> Entry:
    """Return the row of a published model.

    Raises:
        CheckpointError: no such name; the message says which there are.
    """
    if name in BOXED:
        raise CheckpointError(f"{name} comes as a graph, without the weights that this needs; it can tag and embed")
    if name not in MODELS:
        known = list_models()
        raise CheckpointError(
            f"no model and no file is called {name!r}{nearest(name, known)}; known: {', '.join(known)}"
        )
    return MODELS[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that asks for the known names like `name`; nothing if there are none."""
    found = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _in_cache(name: str, url: str, path: Path, sha256: str | None, progress: Progress, *, instead: str = "") -> Path:
    if path.is_file():
        return path
    from ced.model.download import download  # brings an HTTP client

    try:
        download(url, path, sha256=sha256, progress=progress)
    except DownloadError as error:
        raise DownloadError(
            f"{name} is not in the cache ({path}) and not to be had: {error}; put the file there by hand, or pass the "
            f"path of a local file instead of the name{instead}"
        ) from error
    return path
