"""A tagger as one ONNX graph from waves to probabilities, run by ONNX Runtime, without torch.

The graph of a name or checkpoint is made once, into the cache. Graphs of this package describe themselves in their
metadata. Foreign graphs, given as files, are probed once, when they are opened: some take waves, some features.
"""

import csv
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ced.errors import CheckpointError, ConfigError, TableError
from ced.files import written_aside
from ced.model import graph, ort, zoo
from ced.model.config import read_config
from ced.model.graph import (
    CLASSES,
    COLUMNS,
    EMBEDDING,
    FRAME_HOP,
    HEAD,
    LABELS_FILE,
    LONGEST,
    OUTPUT,
    PIECE,
    PRECISION,
    PRECISIONS,
    PROB,
    PROBABILITIES,
    RATE,
    Precision,
)
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import HOP, MIN_SAMPLES, PATCH, PUBLISHED, column_starts
from ced.sound.labels import ClassTable, default_classes, named_by_config, read_classes

AT_ONCE = 10 * SAMPLE_RATE  # samples in one call: short waves are scored together; for longer ones that is not faster
ANY_NUMBER = 1 << 62  # in place of `AT_ONCE` on an accelerator, where the caller limits the memory of a call
LONGEST_WINDOW = 3_600 * SAMPLE_RATE  # samples: the longest window that a foreign graph is tested with
UNUSED_SECONDS = 30 * 24 * 3_600.0  # age at which graphs made by other code are removed from the cache

logger = logging.getLogger(__name__)

Waves = NDArray[np.float32]


class OnnxModel:
    """A tagger in ONNX Runtime: waves in, probabilities out. Several threads may call it at once.

    The scores of a wave never depend on others in the batch: only this package's float graphs score several short waves
    in one call. int8 graphs quantise a batch by its largest value, and foreign graphs may do anything.

    Attributes:
        labels: the classes, in the order of the scores.
        at_once: samples that are scored in one call; 0: one wave per call.
        accelerated: whether the graph runs on another device than the CPU.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1, device: str | None = None) -> None:
        """Open a graph with one input: waves (batch, time) or log-mel features (batch, 64, time).

        Args:
            path: the .onnx file.
            threads: threads of one call.
            device: where it runs, as `ort.find_device` reads it: "cpu", "cuda", "auto" and others; None: the CPU.

        Raises:
            CheckpointError: the file is missing, damaged, not an ONNX graph, or has other inputs or outputs.
            ConfigError: the device cannot be used here.
        """
        self.path = Path(path)
        self._session = ort.open_session(self.path, threads, ort.find_device(device))
        self.accelerated: bool = self._session.get_providers()[0] != ort.PROVIDERS["cpu"]
        self._input, self._front_end = self._find_input(threads)
        self._outputs = {output.name: output for output in self._session.get_outputs()}
        self._scores = self._find_scores()
        meta = self._session.get_modelmeta().custom_metadata_map
        self._ours = meta.get(OUTPUT) == PROBABILITIES
        for key, only in ((OUTPUT, PROBABILITIES), (RATE, str(SAMPLE_RATE))):
            if meta.get(key, only) != only:
                raise CheckpointError(f"graph {self.path}: its metadata has {key} {meta[key][:40]!r}; known is {only}")
        self._has_head = HEAD not in meta
        self._piece = _whole_number(self.path, meta, PIECE, PATCH)  # foreign graphs have no columns
        self._hop = _whole_number(self.path, meta, FRAME_HOP, HOP)
        # The longest wave known to be accepted and the shortest known to be refused, in samples.
        self._good, self._bad = (1 << 62) - 1 if self._ours else MIN_SAMPLES, 1 << 62
        if LONGEST in meta:
            self._good = _whole_number(self.path, meta, LONGEST, 0)
            self._bad = self._good + 1
        self.at_once = 0
        if meta.get(PRECISION) == "float32":
            self.at_once = ANY_NUMBER if self.accelerated else AT_ONCE
        classes, self._logits = self._outputs[self._scores].shape[-1], False
        if not self._ours:
            probe = self._run(self._scores, _noise(SAMPLE_RATE))
            classes, self._logits = probe.shape[-1], bool(probe.min() < 0 or probe.max() > 1)
        self.labels = _labels(self.path, meta, classes)

    @property
    def precision(self) -> str | None:
        """The precision of a graph of this package; None for foreign graphs."""
        return self._session.get_modelmeta().custom_metadata_map.get(PRECISION) if self._ours else None

    @property
    def digest(self) -> str:
        """SHA-256 of the graph, which distinguishes it from earlier graphs at the same path."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __call__(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return the probability of each class, (b, t) 16 kHz in [-1, 1] -> (b, c).

        Waves shorter than one patch (2,400 samples) are padded with zeros.

        Raises:
            CheckpointError: the network has no output layer (masked pre-training), or the graph fails on this length.
        """
        self._check_head()
        scores = self._run(self._scores, waves)
        return _sigmoid(scores) if self._logits else scores

    def embed(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return the embedding of waves, (b, t) -> (b, d): the mean over tokens after the last LayerNorm.

        Raises:
            CheckpointError: the graph has no such output.
        """
        return self._run(self._extra(EMBEDDING), waves)

    def columns(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return the probabilities of each patch column (0.16 s), (b, t) -> (b, columns, c).

        Raises:
            CheckpointError: the graph has no such output.
        """
        self._check_head()
        return self._run(self._extra(COLUMNS), waves)

    def column_starts(self, count: int) -> NDArray[np.float64]:
        """Return when each of the `count` columns of a wave begins, (count,) seconds."""
        return column_starts(count, self._piece, self._hop)

    def check_window(self, seconds: float) -> None:
        """Check that the graph accepts windows of this length; a foreign graph is tested with noise.

        Raises:
            ConfigError: it does not; the message states the longest window that it accepts.
        """
        samples = round(seconds * SAMPLE_RATE)
        while self._good < min(samples, LONGEST_WINDOW) and self._bad - self._good > SAMPLE_RATE // 100:
            # Double until it is too long, then bisect: the limit is found once, to a hundredth of a second.
            longer = min(2 * self._good, samples, LONGEST_WINDOW)
            middle = longer if longer < self._bad else (self._good + self._bad) // 2
            if self._accepts(middle):
                self._good = middle
            else:
                self._bad = middle
        if samples > self._good:
            longest = math.floor(100 * self._good / SAMPLE_RATE) / 100
            raise ConfigError(f"the window is {seconds:g} s; graph {self.path} takes at most {longest:.2f} s")

    def _accepts(self, samples: int) -> bool:
        try:
            self._run(self._scores, _noise(samples))
        except CheckpointError:
            return False
        return True

    def _find_input(self, threads: int) -> tuple[Any, ort.InferenceSession | None]:
        """Return the input and, if it takes features, the session that computes them."""
        inputs = self._session.get_inputs()
        shapes = ", ".join(f"{each.name} {each.shape}" for each in inputs)
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) not in (2, 3):
            raise CheckpointError(
                f"graph {self.path} takes {shapes or 'nothing'}; a tagger takes one float32 input, waves (batch, time) "
                "or features (batch, mels, time)"
            )
        batch = inputs[0].shape[0]
        if isinstance(batch, int) and batch != 1:
            raise CheckpointError(f"graph {self.path} takes batches of {batch} only; a tagger takes 1, or any number")
        if len(inputs[0].shape) == 2:
            return inputs[0], None
        return inputs[0], ort.open_session(front_end_file(), threads)

    def _find_scores(self) -> str:
        if PROB in self._outputs:
            return PROB
        for name, output in self._outputs.items():
            if len(output.shape) == 2 and output.type == "tensor(float)":
                return str(name)
        shapes = ", ".join(f"{name} {output.shape}" for name, output in self._outputs.items())
        raise CheckpointError(f"graph {self.path} gives {shapes}; a tagger gives scores (batch, classes)")

    def _extra(self, output: str) -> str:
        if output not in self._outputs:
            raise CheckpointError(
                f"graph {self.path} has no output {output!r}, only {', '.join(self._outputs)}; the graphs of model"
                " names, checkpoints and `ced export` have it"
            )
        return output

    def _check_head(self) -> None:
        if not self._has_head:
            raise CheckpointError(
                f"{self.path} has no output layer (masked pre-training leaves none), so it embeds but cannot tag;"
                " distil or fine-tune it first"
            )

    def _run(self, output: str, waves: Waves) -> NDArray[np.float32]:
        """Return one output for waves, (b, t) -> (b, ...)."""
        missing = 0 if self._ours else MIN_SAMPLES - waves.shape[1]  # this package's graphs pad waves themselves
        if missing > 0:
            waves = np.pad(waves, ((0, 0), (0, missing)))
        step = max(1, self.at_once // waves.shape[1])
        found = [self._run_some(output, waves[row : row + step]) for row in range(0, len(waves), step)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _run_some(self, output: str, waves: Waves) -> NDArray[np.float32]:
        waves = np.ascontiguousarray(waves, np.float32)
        if self._front_end is not None:
            (waves,) = self._front_end.run(None, {"waves": waves})
        try:
            (result,) = self._session.run([output], {self._input.name: waves})
        except Exception as error:  # ONNX Runtime's errors have no common class
            reason = " ".join(str(error).split())
            raise CheckpointError(f"graph {self.path} fails on an input of shape {waves.shape}: {reason}") from error
        return np.asarray(result)


def open_model(
    name_or_path: str | os.PathLike[str],
    *,
    precision: Precision = "float32",
    threads: int = 1,
    device: str | None = None,
    progress: Progress = silent,
) -> OnnxModel:
    """Open a tagger by name, from a checkpoint (file or folder), or from an ONNX file.

    The graph of a name or checkpoint is made once, into the cache, from the float32 weights. The graphs of `zoo.BOXED`
    are part of the package and need no download.

    Args:
        name_or_path: one of `zoo.list_models()`, or a path.
        precision: "int8" makes an int8 graph of the same weights; an .onnx file must be a graph of this package for
            that. A graph that is int8 already is used as it is.
        threads: threads of one call.
        device: as for `OnnxModel`.
        progress: called during a download, with bytes.

    Raises:
        CheckpointError: neither a name nor a model, a damaged model, or the cache cannot be written.
        ConfigError: an unknown precision, or a device that cannot be used here.
        DownloadError: a file that is not cached and could not be downloaded.
        ExportError: the front end cannot be written as a graph.
        MissingPackageError: a `.pt` checkpoint where torch is not installed.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; allowed: {', '.join(PRECISIONS)}")
    ort.find_device(device)  # before anything is downloaded for it
    path = _graph_of(name_or_path, precision, progress)
    try:
        return OnnxModel(path, threads=threads, device=device)
    except CheckpointError:
        if path.parent != _graphs() or path == Path(name_or_path):
            raise
        path.unlink(missing_ok=True)  # a damaged file of the cache is made again
        return OnnxModel(_graph_of(name_or_path, precision, progress), threads=threads, device=device)


def _graphs() -> Path:
    return zoo.cache_dir() / "graphs"


def _graph_of(name_or_path: str | os.PathLike[str], precision: Precision, progress: Progress) -> Path:
    """Return the graph of a name or path; make it on first use."""
    if isinstance(name_or_path, str) and name_or_path in zoo.BOXED:
        return zoo.BOXED[name_or_path]
    if isinstance(name_or_path, str) and name_or_path in zoo.MODELS:
        entry = zoo.MODELS[name_or_path]
        if entry.hub is not None and (path := _cached(entry.hub.sha256, precision)).is_file():
            return path
        checkpoint = zoo.fetch(name_or_path, progress)
        pinned = entry.hub is not None and checkpoint.suffix == ".safetensors"
        digest = entry.hub.sha256 if pinned and entry.hub is not None else _digest(checkpoint)
        return _make_graph(checkpoint, _cached(digest, precision), precision, str(name_or_path))
    path = zoo.local_path(name_or_path)
    if path.suffix == ".onnx":
        return path if precision == "float32" else _quantized(path)
    checkpoint = zoo.checkpoint_file(path)
    return _make_graph(checkpoint, _cached(_digest(checkpoint), precision), precision, str(path))


def _cached(weights_digest: str, precision: str) -> Path:
    """Return the cache file of a graph, named by its weights, the code that makes graphs, and precision."""
    return _graphs() / f"{weights_digest[:32]}-{graph.code_digest()}-{precision}.onnx"


def _digest(checkpoint: Path) -> str:
    digest = hashlib.sha256()
    for part in (checkpoint, checkpoint.with_name("config.json")):
        if part.is_file():
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _make_graph(checkpoint: Path, path: Path, precision: Precision, name: str) -> Path:
    def write(out: Path) -> None:
        from ced.model import weights
        from ced.model.graph.export import write_graph

        given = weights.read(checkpoint)
        logger.info("making the %s graph of %s, once: %s", precision, name, path)
        if precision == "float32":
            write_graph(given, out)
            return
        from ced.model.graph.export import quantize

        with TemporaryDirectory(dir=out.parent) as folder:
            write_graph(given, Path(folder) / "float32.onnx")
            quantize(Path(folder) / "float32.onnx", out)

    return _write_if_missing(path, write)


def _quantized(path: Path) -> Path:
    """Return the int8 graph of a graph of this package."""
    found = OnnxModel(path).precision
    if found == "int8":
        return path
    if found is None:
        raise CheckpointError(
            f"graph {path} is not one of ced that takes waves, so it cannot be converted to int8; pass its checkpoint"
        )

    def write(out: Path) -> None:
        from ced.model.graph.export import quantize

        quantize(path, out)

    return _write_if_missing(_cached(_digest(path), "int8"), write)


def front_end_file() -> Path:
    """Return the graph from waves (b, t) to features (b, f, n), which runs before graphs that take features."""

    def write(out: Path) -> None:
        import onnx

        from ced.model.graph.network import front_end_graph

        onnx.save(front_end_graph(PUBLISHED), out)

    return _write_if_missing(_cached("front-end", "float32"), write)


def _write_if_missing(path: Path, write: Callable[[Path], None]) -> Path:
    """Return a file of the cache; the first process that needs it writes it, others wait."""
    if path.is_file():
        return path
    from filelock import FileLock  # slower to import than a second of sound is to tag

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                with written_aside(path) as aside:
                    write(aside)
                _remove_unused(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {error.filename or path}: {error.strerror or error}; CED_CACHE names another folder"
        ) from error
    return path


def _remove_unused(path: Path) -> None:
    """Remove old graphs of the same weights made by other code; newer ones may belong to another installation."""
    weights_digest, _, precision = path.name.rsplit("-", 2)
    for other in path.parent.glob(f"{weights_digest}-*-{precision}*"):
        if not other.name.startswith(path.name) and time.time() - other.stat().st_mtime > UNUSED_SECONDS:
            other.unlink(missing_ok=True)


def _whole_number(path: Path, meta: dict[str, str], key: str, default: int) -> int:
    """Return a positive integer from the metadata of a graph."""
    text = meta.get(key, str(default))
    if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) < 1 << 40):
        raise CheckpointError(f"graph {path}: its metadata has {key} {text[:40]!r}; it must be a positive number")
    return int(text)


def _labels(path: Path, meta: dict[str, str], classes: int | str) -> ClassTable:
    """Return the class table of a graph: its metadata, a file beside it, or the default for the number of classes."""
    try:
        if CLASSES in meta:
            table = ClassTable(**{name: values and tuple(values) for name, values in json.loads(meta[CLASSES]).items()})
        elif path.with_name(LABELS_FILE).is_file():
            table = read_classes(path.with_name(LABELS_FILE))
        else:
            table = _read_config_classes(path.with_name("config.json"), classes) or default_classes(int(classes))
    except (ValueError, TypeError, AttributeError, TableError, OSError, csv.Error, RecursionError) as error:
        raise CheckpointError(f"graph {path}: its class table cannot be read ({error})") from error
    if len(table) != classes:
        raise CheckpointError(f"graph {path} gives {classes} scores, but its class table has {len(table)} classes")
    return table


def _read_config_classes(config: Path, classes: int | str) -> ClassTable | None:
    named = named_by_config(read_config(config))
    return named if named is not None and len(named) == classes else None


def _noise(samples: int) -> Waves:
    """Return noise, (1, t) float32, for which logits of a tagger do not all lie between 0 and 1."""
    return np.float32(0.1) * np.random.default_rng(0).standard_normal((1, samples), np.float32)


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -80.0, 80.0))), np.float32)
