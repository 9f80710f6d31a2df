"""Checkpoints: our own format, and the published ones read as they are. Reading a file never executes code from it.

Our own is one safetensors file; its header carries a format number, the configuration and the class table.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ced.errors import CheckpointError, ConfigError, TableError
from ced.files import written_aside
from ced.model import published
from ced.model.published import CLASS_TOKEN, HEAD
from ced.model.vit import CED, ModelConfig, Pooling
from ced.model.zoo import checkpoint_file
from ced.sound.labels import ClassTable

FORMAT_VERSION = 1
HEADER = "ced"  # one entry of safetensors' metadata, as several would be written in any order

# Beginnings of keys a checkpoint may hold beyond those of the network, each with the reason that it may.
TOLERATED = {
    "front_end.": "window and mel filters: LogMel derives its own from constants",
    "decoder": "the decoder of masked pre-training, which a tagger has no use for",
    "mask_token": "what masked pre-training puts in place of hidden patches",
    "cls_token": "a class token, which only pooling 'token' reads",
    "token_pos_embed": "the class token's position",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one network under their published key names, and what is known of them."""

    state: dict[str, Tensor]
    config: ModelConfig
    labels: ClassTable | None  # None: the file does not name its classes
    source: str  # where it was read, for messages

    @property
    def has_head(self) -> bool:
        """Whether a trained output layer is in it; masked pre-training leaves none."""
        return published.has_head(self.state)


def save(path: Path, model: CED) -> None:
    """Write a network, its configuration and its class table to one safetensors file; a crash leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT_VERSION, "config": asdict(model.config), "classes": asdict(model.labels)}
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with written_aside(path) as aside:
        # Not save_file, whose files only their owner may read.
        aside.write_bytes(to_bytes(state, metadata={HEADER: json.dumps(header)}))


def read(path: Path) -> Checkpoint:
    """Read a checkpoint of any known kind.

    Our own `.safetensors`; an experiment folder; a Hugging Face folder (`config.json`, `model.safetensors`); a
    published `.pt`, which is a state dict or {"model": state dict, "config": ...}. What a `.pt` does not say of its
    configuration follows from the shapes of its weights.

    Raises:
        CheckpointError: nothing is there, it is none of these, or it would need code to be executed.
    """
    path = checkpoint_file(Path(path))
    return _read_safetensors(path) if path.suffix == ".safetensors" else Checkpoint(*published.read_pt(path), str(path))


def load_state(model: CED, checkpoint: Checkpoint, *, head: bool = True) -> None:
    """Put the weights of a checkpoint into a network; position embeddings are resized to the network's.

    Keys must match one to one, but for the `TOLERATED` ones. With `head` off the network keeps its own output layer,
    and its own class token where the checkpoint has none.

    Raises:
        CheckpointError: a key is unknown, missing or of another shape; the network is left as it was.
    """
    wanted: dict[str, Tensor] = dict(model.state_dict())
    given = dict(checkpoint.state)
    if not head:
        wanted = {
            key: value
            for key, value in wanted.items()
            if not key.startswith(HEAD) and (key not in CLASS_TOKEN or key in given)
        }
        given = {key: value for key, value in given.items() if not key.startswith(HEAD)}
    for key, axis in (("time_pos_embed", 3), ("freq_pos_embed", 2)):
        if key in given:
            given[key] = _resize(given[key], axis, wanted[key].shape[axis])
    problems = [
        _listed("lacks", (key for key in wanted if key not in given)),
        _listed("has unknown", (key for key in given if key not in wanted and not key.startswith(tuple(TOLERATED)))),
        _listed(
            "is of another size:",
            (
                f"{key} {tuple(given[key].shape)}, not {tuple(value.shape)}"
                for key, value in wanted.items()
                if key in given and given[key].shape != value.shape
            ),
        ),
    ]
    if any(problems):
        message = "; ".join(filter(None, problems))
        raise CheckpointError(f"checkpoint {checkpoint.source} does not fit the network: it {message}")
    model.load_state_dict({key: given[key] for key in wanted}, strict=False)  # checked above, with more to say


def build(
    checkpoint: Checkpoint,
    *,
    pooling: Pooling | None = None,
    target_length: int | None = None,
) -> CED:
    """Make the network of a checkpoint, in eval mode; None keeps the checkpoint's own setting.

    Weights of masked pre-training have no head: the network then has a fresh one, and a warning is logged.

    Raises:
        CheckpointError: the weights do not fit their configuration, or lack what the pooling needs.
        ConfigError: the settings contradict each other.
    """
    changes = {"pooling": pooling, "target_length": target_length}
    asked = {name: value for name, value in changes.items() if value is not None}
    config = published.checked_config({**asdict(checkpoint.config), **asked})
    model = CED(config, checkpoint.labels)
    if not checkpoint.has_head:
        logger.warning("%s has no output layer (masked pre-training): that of the network is random", checkpoint.source)
    load_state(model, checkpoint, head=checkpoint.has_head)
    return model.eval()


def average(paths: Sequence[Path]) -> Checkpoint:
    """Return the mean of the weights of several checkpoints of one network; counters are the first one's.

    Raises:
        CheckpointError: none is given, or they differ in configuration, classes, keys or shapes.
    """
    if not paths:
        raise CheckpointError("no checkpoints to average")
    first = read(paths[0])
    sums = {key: value.double() for key, value in first.state.items() if value.is_floating_point()}
    for path in paths[1:]:
        other = read(path)
        shapes = [{key: value.shape for key, value in each.state.items()} for each in (first, other)]
        if (other.config, other.labels, shapes[1]) != (first.config, first.labels, shapes[0]):
            raise CheckpointError(f"checkpoints {first.source} and {other.source} are not of one network")
        for key, total in sums.items():
            total += other.state[key]
    means = {key: (total / len(paths)).to(first.state[key].dtype) for key, total in sums.items()}
    return replace(first, state=first.state | means, source=f"the mean of {len(paths)} checkpoints")


def _resize(embedding: Tensor, axis: int, size: int) -> Tensor:
    """Cut a position embedding (1, d, rows, columns) along an axis to its first places, or stretch it bilinearly."""
    if embedding.dim() != 4 or embedding.shape[axis] == size:
        return embedding  # another number of axes is reported as another shape
    if embedding.shape[axis] > size:
        return embedding.narrow(axis, 0, size)
    rows, columns = (size, embedding.shape[3]) if axis == 2 else (embedding.shape[2], size)
    return F.interpolate(embedding.float(), (rows, columns), mode="bilinear", align_corners=False)


def _listed(what: str, keys: Iterable[str]) -> str:
    """Name the first three of the keys and count the others; nothing for none."""
    keys = list(keys)
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{what} {', '.join(keys[:3])}{more}" if keys else ""


def _read_safetensors(path: Path) -> Checkpoint:
    """Read our own file, or a Hugging Face one, which has no header of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged or no safetensors file ({error})") from error
    if header is None:
        return Checkpoint(*published.read_hugging_face(state, path), str(path))
    try:
        written = json.loads(header)
        if written["format"] != FORMAT_VERSION:
            raise CheckpointError(f"checkpoint {path} has format {written['format']}; known is {FORMAT_VERSION}")
        settings, names, mids = written["config"], written["classes"]["names"], written["classes"]["mids"]
        if unknown := settings.keys() - {field.name for field in fields(ModelConfig)}:
            raise CheckpointError(f"checkpoint {path} has unknown settings: {', '.join(sorted(unknown))}")
        labels = ClassTable(tuple(names), None if mids is None else tuple(mids))
        return Checkpoint(state, published.checked_config(settings), labels, str(path))
    except (ValueError, KeyError, TypeError, AttributeError, TableError, ConfigError) as error:
        raise CheckpointError(f"checkpoint {path} has a damaged header ({error!r})") from error
