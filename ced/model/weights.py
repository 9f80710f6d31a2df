"""Weights: the arrays of a network with its configuration and classes, read from any checkpoint. Needs no torch.

Kinds of checkpoints: this package's `.safetensors` (its header has configuration, classes and a digest), experiment
folders, Hugging Face folders, and the published `.pt` files, which torch's restricted reader opens. Reading a file
never executes code from it.
"""

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save as to_bytes

from ced.errors import CheckpointError, ConfigError, TableError, optional_packages
from ced.files import written_aside
from ced.model import zoo
from ced.model.config import ModelConfig, Pooling, checked_config, read_config, shapes
from ced.sound.features import PATCH
from ced.sound.labels import ClassTable, default_classes, named_by_config

FORMAT_VERSION = 1
HEADER = "ced"  # a single entry of safetensors' metadata, as the order of several is not fixed
HEAD_KEYS = "outputlayer."
CLASS_TOKEN = ("cls_token", "token_pos_embed")
PRETRAINING = ("decoder", "mask_token")  # prefixes of keys that only masked pre-training has

# Prefixes of keys that a checkpoint may have in addition to those of the network, each with the reason.
TOLERATED = {
    "front_end.": "window and mel filters: derived from constants",
    "decoder": "the decoder of masked pre-training, which a tagger does not use",
    "mask_token": "the token that masked pre-training puts in place of hidden patches",
    "cls_token": "a class token, which only pooling 'token' reads",
    "token_pos_embed": "the class token's position",
}

logger = logging.getLogger(__name__)

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Weights:
    """The arrays of a network under their published names, with its configuration and classes."""

    arrays: Mapping[str, Array]
    config: ModelConfig
    labels: ClassTable | None  # None: the file does not name its classes
    source: str  # the file, for messages

    @property
    def has_head(self) -> bool:
        """Whether there is a trained output layer; masked pre-training leaves none."""
        return _has_head(self.arrays)

    @property
    def classes(self) -> ClassTable:
        """The classes of the file; if it has none, AudioSet's for 527 outputs, otherwise numbered ones."""
        return self.labels or default_classes(self.config.outputdim)


def save(path: Path, weights: Weights) -> None:
    """Write weights, configuration, classes and a digest to one safetensors file, atomically."""
    arrays = {key: np.asarray(value, order="C") for key, value in weights.arrays.items()}
    header = {
        "format": FORMAT_VERSION,
        "config": asdict(weights.config),
        "classes": asdict(weights.classes),
        "sha256": fingerprint(arrays),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        # Not save_file, whose files only their owner may read.
        aside.write_bytes(to_bytes(arrays, metadata={HEADER: json.dumps(header)}))


def read(path: Path) -> Weights:
    """Read a checkpoint of any known kind; see the top of this module.

    Settings that the file does not have are derived from the shapes of its arrays.

    Raises:
        CheckpointError: it does not exist, is of no known kind or damaged, or would execute code.
        MissingPackageError: a `.pt` file where torch is not installed.
    """
    path = zoo.checkpoint_file(Path(path))
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path} is a graph; weights are needed here: give the checkpoint that it was made from")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)


def configured(
    weights: Weights, *, pooling: Pooling | None = None, target_length: int | None = None
) -> tuple[ModelConfig, dict[str, Array]]:
    """Return the configuration with some settings replaced (None keeps the checkpoint's), and the arrays for it.

    Raises:
        CheckpointError: the arrays do not fit the configuration, or the pooling needs others.
        ConfigError: the settings contradict each other.
    """
    changes = {"pooling": pooling, "target_length": target_length}
    given = {name: value for name, value in changes.items() if value is not None}
    config = checked_config({**asdict(weights.config), **given})
    return config, fitted(weights, config, head=weights.has_head)


def fitted(weights: Weights, config: ModelConfig, *, head: bool = True) -> dict[str, Array]:
    """Return the arrays for a network of `config`; position embeddings are resized.

    Keys must match exactly, except the `TOLERATED` ones. With `head` off, the output layer is left out, and so is the
    class token where the checkpoint has none.

    Raises:
        CheckpointError: a key is unknown, missing or of another shape.
    """
    wanted, given = shapes(config), dict(weights.arrays)
    if not head:
        wanted = {
            key: shape
            for key, shape in wanted.items()
            if not key.startswith(HEAD_KEYS) and (key not in CLASS_TOKEN or key in given)
        }
        given = {key: value for key, value in given.items() if not key.startswith(HEAD_KEYS)}
    for key, axis in (("time_pos_embed", 3), ("freq_pos_embed", 2)):
        if key in given:
            given[key] = resized(given[key], axis, wanted[key][axis])
    problems = [
        _listed("lacks", (key for key in wanted if key not in given)),
        _listed("has unknown", (key for key in given if key not in wanted and not key.startswith(tuple(TOLERATED)))),
        _listed(
            "is of another size:",
            (
                f"{key} {given[key].shape}, not {shape}"
                for key, shape in wanted.items()
                if key in given and given[key].shape != shape
            ),
        ),
    ]
    if any(problems):
        message = "; ".join(filter(None, problems))
        raise CheckpointError(f"checkpoint {weights.source} does not fit the network: it {message}")
    return {key: given[key] for key in wanted}


def resized(embedding: Array, axis: int, size: int) -> Array:
    """Resize a position embedding (1, d, rows, columns) along an axis: cut it to its first places, or interpolate.

    Interpolation is linear, as in torch's bilinear `interpolate` with align_corners off.
    """
    if embedding.ndim != 4 or embedding.shape[axis] == size:
        return embedding  # a wrong number of axes is reported later as a wrong shape
    places = embedding.shape[axis]
    if places > size:
        return embedding.take(range(size), axis)
    at = np.maximum((np.arange(size) + 0.5) * (places / size) - 0.5, 0.0)
    left = at.astype(np.int64)
    right = np.minimum(left + 1, places - 1)
    share = (at - left).astype(np.float32).reshape([-1 if other == axis else 1 for other in range(4)])
    embedding = embedding.astype(np.float32)
    stretched: Array = embedding.take(left, axis) * (1 - share) + embedding.take(right, axis) * share
    return stretched


def average(paths: Sequence[Path]) -> Weights:
    """Return the mean of the weights of several checkpoints of one network; counters are the first one's.

    Raises:
        CheckpointError: none is given, or they differ in configuration, classes, keys or shapes.
    """
    if not paths:
        raise CheckpointError("no checkpoints to average")
    first = read(paths[0])
    sums = {key: value.astype(np.float64) for key, value in first.arrays.items() if value.dtype.kind == "f"}
    for path in paths[1:]:
        other = read(path)
        sizes = [{key: value.shape for key, value in each.arrays.items()} for each in (first, other)]
        if (other.config, other.labels, sizes[1]) != (first.config, first.labels, sizes[0]):
            raise CheckpointError(f"checkpoints {first.source} and {other.source} are of different networks")
        for key, total in sums.items():
            total += other.arrays[key]
    means = {key: (total / len(paths)).astype(first.arrays[key].dtype) for key, total in sums.items()}
    return replace(first, arrays={**first.arrays, **means}, source=f"the mean of {len(paths)} checkpoints")


def fingerprint(arrays: Mapping[str, Array]) -> str:
    """Return the sha256 of names, types, shapes and values, in hex."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        value = np.asarray(arrays[key], order="C")
        digest.update(f"{key} {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.data if value.ndim else value.tobytes())
    return digest.hexdigest()


def _read_safetensors(path: Path) -> Weights:
    """Read a file of this package, or one of Hugging Face, which has no header of ours."""
    try:
        with safe_open(path, framework="np") as file:
            header = (file.metadata() or {}).get(HEADER)
            names = list(file.keys())
            halves = any(file.get_slice(key).get_dtype() == "BF16" for key in names)
            arrays = _with_bfloat16(path) if halves else {key: file.get_tensor(key) for key in names}
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:  # types that NumPy lacks
        raise CheckpointError(f"checkpoint {path} is damaged or not a safetensors file ({error})") from error
    if header is None:
        return _assembled(arrays, *_beside(path), path)
    try:
        written = json.loads(header)
        if written["format"] != FORMAT_VERSION:
            raise CheckpointError(f"checkpoint {path} has format {written['format']}; known is {FORMAT_VERSION}")
        settings, names, mids = written["config"], written["classes"]["names"], written["classes"]["mids"]
        if unknown := settings.keys() - {field.name for field in fields(ModelConfig)}:
            raise CheckpointError(f"checkpoint {path} has unknown settings: {', '.join(sorted(unknown))}")
        labels = ClassTable(tuple(names), None if mids is None else tuple(mids))
        digest = written.get("sha256")  # older files have none
    except (ValueError, KeyError, TypeError, AttributeError, TableError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} has a damaged header ({error!r})") from error
    if digest is not None and digest != fingerprint(arrays):
        raise CheckpointError(f"checkpoint {path} is damaged: its values do not match its digest")
    weights = _assembled(arrays, settings, labels, path)
    if weights.labels is None:
        raise CheckpointError(
            f"checkpoint {path} has a damaged header: {len(labels)} classes, but outputdim {weights.config.outputdim}"
        )
    return weights


def _with_bfloat16(path: Path) -> dict[str, Array]:
    """Read a safetensors file with bfloat16 arrays, which become float32, as NumPy has no bfloat16."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BF16": "<u2"}
    arrays: dict[str, Array] = {}
    for key, entry in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
        kind, shape = entry["dtype"], entry["shape"]
        if kind not in kinds:
            raise CheckpointError(f"checkpoint {path}: {key} is of type {kind}; known: {', '.join(kinds)}")
        values = np.frombuffer(entry["data"], kinds[kind]).reshape(shape)
        arrays[key] = (values.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else values
    return arrays


def _beside(path: Path) -> tuple[dict[str, Any], ClassTable | None]:
    """Return the settings and classes of the `config.json` beside a Hugging Face file, if there is one."""
    settings = read_config(path.with_name("config.json"))
    if settings is None:
        return {}, None
    if settings.get("problem_type") == "single_label_classification":
        settings = {"activation": "softmax"} | settings
    return settings, named_by_config(settings)


def _assembled(
    arrays: Mapping[str, Array], settings: Mapping[str, Any], labels: ClassTable | None, path: Path
) -> Weights:
    """Make weights from the arrays and settings of a file, under the published key names.

    Settings that contradict the shapes of the arrays are an error, so that a header cannot request a larger network
    than the file holds.
    """
    arrays = {published_name(key): value for key, value in arrays.items()}
    for key, value in arrays.items():
        if value.dtype.kind != "f" and not key.endswith("num_batches_tracked"):
            raise CheckpointError(f"checkpoint {path}: {key} is of type {value.dtype}; weights are floating point")
    settings = {name: value for name, value in settings.items() if value is not None}
    shaped = _config_of_shapes(arrays, path)
    ratio = settings.get("mlp_ratio")
    if isinstance(ratio, int | float) and int(shaped["embed_dim"] * ratio) == _hidden(arrays, path):
        shaped["mlp_ratio"] = ratio  # the hidden width is rounded down, so several ratios fit
    for name, value in shaped.items():
        if settings.get(name, value) != value:
            raise CheckpointError(
                f"checkpoint {path} contradicts its configuration: {name} is {value}, not {settings[name]}"
            )
    guesses = {
        "num_heads": _heads(shaped["embed_dim"]),
        "target_length": _target_length(arrays["time_pos_embed"].shape[3]),
        # A tagger with a class token pools it; masked pre-training leaves one in the file that is not used.
        "pooling": "token" if _has_head(arrays) and all(key in arrays for key in CLASS_TOKEN) else "mean",
    }
    try:
        config = checked_config(guesses | settings | shaped)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    if labels is not None and len(labels) != config.outputdim:
        labels = None  # Transformers' default of two classes, not those of the network
    return Weights(arrays, config, labels, str(path))


def published_name(key: str) -> str:
    """Return the published name of a Hugging Face key; published names are kept."""
    return re.sub(r"^init_bn\.(?!1\.)", "init_bn.1.", key.removeprefix("encoder."))


def _has_head(arrays: Mapping[str, Array]) -> bool:
    return any(key.startswith(HEAD_KEYS) for key in arrays) and not any(key.startswith(PRETRAINING) for key in arrays)


def _size(arrays: Mapping[str, Array], key: str, axis: int, path: Path) -> int:
    if key not in arrays or arrays[key].ndim <= axis:
        raise CheckpointError(f"{path} is not a CED checkpoint: {key} is missing or has fewer than {axis + 1} axes")
    size: int = arrays[key].shape[axis]
    return size


def _hidden(arrays: Mapping[str, Array], path: Path) -> int:
    return _size(arrays, "blocks.0.mlp.fc1.weight", 0, path)


def _config_of_shapes(arrays: Mapping[str, Array], path: Path) -> dict[str, Any]:
    """Return the settings that follow from the shapes of the arrays."""
    width = _size(arrays, "patch_embed.proj.weight", 0, path)
    _size(arrays, "time_pos_embed", 3, path)
    shaped: dict[str, Any] = {
        "embed_dim": width,
        "depth": len({found[1] for key in arrays if (found := re.match(r"blocks\.(\d+)\.", key))}),
        "mlp_ratio": _hidden(arrays, path) / width if width else 0.0,
        "n_mels": _size(arrays, "freq_pos_embed", 2, path) * PATCH,
        "init_bn": "init_bn.1.weight" in arrays,
    }
    if _has_head(arrays):
        shaped["outputdim"] = _size(arrays, f"{HEAD_KEYS}1.weight", 0, path)
    if "front_end.0.spectrogram.window" in arrays:
        shaped["win_size"] = _size(arrays, "front_end.0.spectrogram.window", 0, path)
    if "front_end.0.mel_scale.fb" in arrays:
        shaped["n_fft"] = 2 * (_size(arrays, "front_end.0.mel_scale.fb", 0, path) - 1)
    return shaped


def _heads(width: int) -> int:
    """Guess the number of heads, which shapes do not determine: heads of published networks are 64 wide."""
    heads, rest = divmod(width, 64)
    return 1 if rest else heads


def _target_length(columns: int) -> int:
    """Return the frames of a time embedding; the published 63 columns are for 1012 frames."""
    return 1012 if columns == 1012 // PATCH else columns * PATCH


def _listed(what: str, keys: Iterable[str]) -> str:
    """List the first three keys and count the others; an empty text for none."""
    keys = list(keys)
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{what} {', '.join(keys[:3])}{more}" if keys else ""


def _path_as_text(*parts: str) -> str:
    return "/".join(parts)


# Published configurations have pickled paths, which are read as strings, whatever system wrote them.
_INERT = [
    (_path_as_text, f"{module}.{kind}Path")
    for module in ("pathlib", "pathlib._local")
    for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")
]


def _read_pt(path: Path) -> Weights:
    """Read a file of torch.save: a state dict, or {"model": state dict, "config": ...}.

    torch's restricted reader builds only tensors and plain values, and refuses anything else.
    """
    if not zoo.is_torch_file(path):
        raise CheckpointError(f"checkpoint {path} is damaged, or not written by torch.save")
    with optional_packages(f"reading {path} (safetensors of the same model need no torch: {_same_model(path)})"):
        import torch
        from torch.serialization import safe_globals
    _refuse_compressed(path)
    try:
        with safe_globals(list(_INERT)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may make the reader fail in any way
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            refusal = f"it would execute {found[1]}; only weights and plain values are read"
            raise CheckpointError(f"checkpoint {path} is refused: {refusal}") from error
        raise CheckpointError(f"checkpoint {path} is damaged, or not written by torch.save") from error
    settings: dict[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        config = content.get("config")
        settings = config if isinstance(config, dict) else {}
        if isinstance(settings.get("model_args"), dict):  # a training configuration
            settings = settings["model_args"]
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, not weights")
    arrays = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"checkpoint {path} holds a {type(value).__name__} under {key!r}, not a tensor")
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"checkpoint {path} holds a tensor of an unknown layout under {key!r}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # repeated by strides of 0
            raise CheckpointError(f"checkpoint {path} is refused: {key} claims {value.numel()} values and stores fewer")
        arrays[key] = (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
    return _assembled(arrays, settings, None, path)


def _refuse_compressed(path: Path) -> None:
    """Refuse a zip file with entries larger than the file: torch.save never compresses."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged, or not written by torch.save") from error
    if total > path.stat().st_size:
        raise CheckpointError(f"checkpoint {path} is refused: it unpacks to {total} bytes, more than its own size")


def _same_model(path: Path) -> str:
    """Return how to get the model of a published `.pt` file as safetensors."""
    for entry in zoo.MODELS.values():
        if entry.zenodo is not None and entry.zenodo.file == path.name and entry.hub is not None:
            return f"-m {entry.name}"
    return "save it as safetensors where torch is installed"
