"""The runtime: a tagger as one ONNX graph from waveform to probabilities, run by ONNX Runtime without torch.

Our own graphs say in their metadata what they are. Graphs of others (the published ones take a waveform, those made
for sherpa-onnx take features) are asked once, when they are opened.
"""

import csv
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import ced
from ced.errors import CheckpointError, DownloadError, TableError, optional_packages
from ced.model import zoo
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.grid import HOP_SECONDS, MIN_SAMPLES, PATCH
from ced.sound.labels import ClassTable, default_classes, named_by_config, read_classes

if TYPE_CHECKING:
    from ced.model.ort import InferenceSession, SessionOptions

GRAPH_VERSION = 2  # raised when exported graphs change: those in the cache are then made anew
LABELS_FILE = "class_labels_indices.csv"
CLASSES = "classes"  # metadata of our graphs: the class table as JSON
OUTPUT = "output"  # metadata of our graphs: what `prob` holds
PROBABILITIES = "probabilities"
PRECISION = "precision"  # metadata of our graphs
PIECE = "piece"  # metadata of our graphs: frames that are heard at once; longer waves are cut
FLOAT = "float32"
AT_ONCE = 10 * SAMPLE_RATE  # samples: shorter waves are scored together up to this, longer ones gain nothing by it
PROB, EMBEDDING, COLUMNS = "prob", "embedding", "columns"  # outputs of our graphs
FRONT_END = Path(__file__).with_name("frontend.onnx")  # waves (b, t) -> log-mel features (b, f, n)

logger = logging.getLogger(__name__)

Waves = NDArray[np.float32]


class OnnxModel:
    """A tagger in ONNX Runtime: waves in, probabilities out. Several threads may call it at once.

    A clip's scores never depend on its neighbours: only our graphs in float score several short waves together; those
    in int8 quantise a batch by its largest value, and of others nothing is known.

    Attributes:
        labels: the classes, in the order of the scores.
        at_once: samples of several waves that are scored together; 0: each wave by itself.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1) -> None:
        """Open a graph.

        Its one input is a wave (batch, time) or log-mel features (batch, 64, time).

        Args:
            path: the .onnx file.
            threads: how many work on one call.

        Raises:
            CheckpointError: the file is missing, damaged, no ONNX graph, or one with other inputs or outputs.
        """
        self.path = Path(path)
        self._session = open_session(self.path, threads)
        self._input, self._front_end = self._find_input(threads)
        self._outputs = {output.name: output for output in self._session.get_outputs()}
        self._scores = self._find_scores()
        meta = self._session.get_modelmeta().custom_metadata_map
        classes = self._outputs[self._scores].shape[-1]
        self._shortest = MIN_SAMPLES
        self._piece = int(meta.get(PIECE, PATCH))  # of others there are no columns to place
        self.at_once = AT_ONCE if meta.get(PRECISION) == FLOAT else 0
        if meta.get(OUTPUT) == PROBABILITIES:
            self._logits, self._shortest = False, 0  # these do their padding themselves
        else:
            probe = self._run(self._scores, _noise())
            classes, self._logits = probe.shape[-1], bool(probe.min() < 0 or probe.max() > 1)
        self.labels = _labels(self.path, meta, classes)

    def __call__(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return the probability of each class, (b, t) 16 kHz in [-1, 1] -> (b, c).

        Waves shorter than one patch (2,400 samples) are padded with zeros.
        """
        scores = self._run(self._scores, waves)
        return _sigmoid(scores) if self._logits else scores

    def embed(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return what the network makes of waves, (b, t) -> (b, d): the mean over tokens after the last LayerNorm.

        Raises:
            CheckpointError: the graph has no such output.
        """
        return self._run(self._extra(EMBEDDING), waves)

    def columns(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return the probabilities of each patch column (0.16 s), (b, t) -> (b, columns, c).

        Raises:
            CheckpointError: the graph has no such output.
        """
        return self._run(self._extra(COLUMNS), waves)

    def column_starts(self, count: int) -> NDArray[np.float64]:
        """Return when each of the `count` columns of a wave begins, (count,) seconds.

        A piece of a long wave that is no whole number of patches long leaves a few frames to no column.
        """
        pieces, places = np.divmod(np.arange(count, dtype=np.float64), self._piece // PATCH)
        starts: NDArray[np.float64] = (pieces * self._piece + places * PATCH) * HOP_SECONDS
        return starts

    def _find_input(self, threads: int) -> tuple[Any, "InferenceSession | None"]:
        """Return the one input and, if it takes features, the session that makes them."""
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
        return inputs[0], open_session(FRONT_END, threads)

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
                f"graph {self.path} has no output {output!r}, only {', '.join(self._outputs)}; `ced export` writes one"
            )
        return output

    def _run(self, output: str, waves: Waves) -> NDArray[np.float32]:
        """Return one output for waves, (b, t) -> (b, ...)."""
        missing = self._shortest - waves.shape[1]
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
        except Exception as error:  # ONNX Runtime has no common class of its errors
            raise CheckpointError(
                f"graph {self.path} does not take an input of shape {waves.shape}: {_line(error)}"
            ) from error
        return np.asarray(result)


def open_model(name_or_path: str | os.PathLike[str], *, threads: int = 1, progress: Progress = silent) -> OnnxModel:
    """Open a tagger by name, from an ONNX file, or from a checkpoint (file or folder).

    The graph of a published name is downloaded into the cache on first use; those of `zoo.BOXED` are in the package and
    never need a network. Checkpoints, and names that have no published graph,
    are exported into the cache once, which needs torch; the file goes by the content of the checkpoint. Where the hub
    is out of reach, weights that are in the cache are exported likewise.

    Args:
        name_or_path: one of `zoo.list_models()`, or a path.
        threads: how many work on one call.
        progress: told of a download, in bytes.

    Raises:
        CheckpointError: neither a name nor a model, or a checkpoint where torch is not installed.
        DownloadError: a file that is not in the cache and cannot be fetched.
        ExportError: the graph does not answer as its network does.
    """
    return OnnxModel(_graph_file(name_or_path, progress), threads=threads)


def _graph_file(name_or_path: str | os.PathLike[str], progress: Progress) -> Path:
    if isinstance(name_or_path, str) and name_or_path in zoo.BOXED:
        return zoo.BOXED[name_or_path]
    if not isinstance(name_or_path, str) or name_or_path not in zoo.MODELS:
        path = zoo.local_path(name_or_path)
        return path if path.suffix == ".onnx" else _exported(zoo.checkpoint_file(path))
    entry = zoo.MODELS[name_or_path]
    if entry.hub is None:
        return _exported(zoo.fetch(name_or_path, progress))
    try:
        return zoo.fetch_onnx(name_or_path, progress)
    except DownloadError:
        weights = zoo.cache_dir() / entry.file
        if not weights.is_file():
            raise
        return _exported(weights)


def _exported(checkpoint: Path) -> Path:
    """Return the graph of a checkpoint, made by the first who asks for it."""
    # Here, as importing them takes longer than tagging a second of sound, and names do without them.
    import hashlib

    from filelock import FileLock

    digest = hashlib.sha256(f"ced {ced.__version__} {GRAPH_VERSION}".encode())
    for part in (checkpoint, checkpoint.with_name("config.json")):
        if part.is_file():
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    path = zoo.cache_dir() / "exported" / f"{digest.hexdigest()[:32]}.onnx"
    if path.is_file():
        return path
    with optional_packages(f"exporting {checkpoint}"):
        from ced.model.export import export
        from ced.model.loading import load_model
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            logger.info("exporting %s to ONNX, once: %s", checkpoint, path)
            export(load_model(checkpoint), path)
    return path


def session_options(threads: int) -> "SessionOptions":
    """Return how graphs are run: by so many threads, without a word but of errors."""
    from ced.model.ort import SessionOptions

    options = SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options


def open_session(path: Path, threads: int) -> "InferenceSession":
    """Open a graph in ONNX Runtime on the CPU, quietly.

    Raises:
        CheckpointError: the file is missing, damaged or no ONNX graph.
    """
    from ced.model.ort import InferenceSession

    if not path.is_file():
        raise CheckpointError(f"no graph at {path}")
    try:
        return InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # a damaged file may make ONNX Runtime fail in any way
        raise CheckpointError(f"graph {path} is damaged or no ONNX file ({_line(error)})") from error


def _labels(path: Path, meta: dict[str, str], classes: int | str) -> ClassTable:
    """Return the class table of a graph: its metadata, a file beside it, or what so many classes are called."""
    try:
        if CLASSES in meta:
            table = ClassTable(**{name: values and tuple(values) for name, values in json.loads(meta[CLASSES]).items()})
        elif path.with_name(LABELS_FILE).is_file():
            table = read_classes(path.with_name(LABELS_FILE))
        else:
            beside = path.with_name("config.json")
            named = named_by_config(json.loads(beside.read_bytes())) if beside.is_file() else None
            table = named if named is not None and len(named) == classes else default_classes(int(classes))
    except (ValueError, TypeError, AttributeError, TableError, OSError, csv.Error) as error:
        raise CheckpointError(f"graph {path}: its class table cannot be read ({error})") from error
    if len(table) != classes:
        raise CheckpointError(f"graph {path} gives {classes} scores, but its class table has {len(table)} classes")
    return table


def _noise() -> Waves:
    """A second of noise: no tagger is so sure of it that all of its logits lie between 0 and 1."""
    return np.random.default_rng(0).normal(0.0, 0.1, (1, SAMPLE_RATE)).astype(np.float32)


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -80.0, 80.0))), np.float32)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
