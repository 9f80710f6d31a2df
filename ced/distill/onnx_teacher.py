"""Teachers that are ONNX graphs of other projects: a YAML file beside the graph describes its input and output."""

import glob
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from ced.config import Section, check, dump, read_file
from ced.distill.spectrogram import FeatureSettings, Spectrogram, resample
from ced.distill.views import SoundView, mask_waves
from ced.errors import ConfigError
from ced.model import ort
from ced.sound.labels import AUDIOSET, ClassTable, class_table

_YAML = (".yaml", ".yml")

Axis = Literal["batch", "mel", "time", 1]


class GraphSettings(Section):
    """The YAML file of a graph."""

    graph: str | None = Field(
        None, description="of a teacher given as its YAML file: the graph, relative to it; null: the same with .onnx"
    )
    rate: int = Field(ge=1_000, le=384_000, description="Hz, sampling rate that the input is computed from")
    features: FeatureSettings | None = Field(
        None, description="how the spectrogram is computed; null: the graph takes waves in [-1, 1]"
    )
    masks: Literal["features", "waves"] | None = Field(
        None, description="where views are masked; null: in the input of the graph"
    )
    shape: list[Axis] = Field(description="axes of the input; without batch, the graph gets one clip at a time")
    output: str | None = Field(None, description="name of the output with the scores; null: the first")
    activation: Literal["sigmoid", "softmax", "none"] = Field(
        description="what turns the output into probabilities; none: it has them"
    )
    classes: str | None = Field(None, description="class table, relative to the YAML file, or audioset; null: unknown")

    @model_validator(mode="after")
    def _axes(self) -> Self:
        counts = Counter(self.shape)
        mel = 0 if self.features is None else 1
        if counts["time"] != 1 or counts["mel"] != mel or "batch" in self.shape[1:]:
            takes = "time and mel" if mel else "time, and not mel (without features, the graph takes waves),"
            raise ValueError(
                f"shape {self.shape} is not an input; it must have {takes} once, and batch first or not at all"
            )
        if self.masks == "features" and not mel:
            raise ValueError("masks is features, but the graph takes waves")
        if self.features is not None and self.features.mel.high > self.rate / 2:
            raise ValueError(f"mel.high {self.features.mel.high:g} Hz is above half of rate {self.rate}")
        return self


class OnnxTeacher:
    """A graph as a teacher that takes waves.

    Graphs run on the CPU, with as many threads as torch has.

    Raises:
        ConfigError: the settings are missing or wrong, or the graph does not fit them.
        CheckpointError: the graph is missing or damaged.
        TableError: the class table cannot be read.
    """

    takes = "waves"

    def __init__(self, file: Path) -> None:
        """Open a graph.

        Args:
            file: the graph, with its settings in a YAML file of the same name beside it; or that YAML file.
        """
        path = _settings_file(file)
        self.settings = check(GraphSettings, read_file(path), str(path))
        graph = path.parent / (self.settings.graph or f"{path.stem}.onnx") if file == path else file
        self._session = ort.open_session(graph, torch.get_num_threads())
        features = self.settings.features
        self._spectrogram = None if features is None else Spectrogram(features, self.settings.rate)
        node = self._check_input(path)
        self._input: str = node.name
        sizes = dict(zip(self.settings.shape, node.shape, strict=True))
        self._batch = 1 if sizes.get("batch") == 1 else None  # clips that the graph takes at once
        fixed = features is None and isinstance(sizes["time"], int)
        self._samples: int | None = sizes["time"] if fixed else None  # of every wave that the graph takes
        outputs = {node.name: node.shape for node in self._session.get_outputs()}
        self._output = self.settings.output or next(iter(outputs))
        if self._output not in outputs:
            raise ConfigError(f"{path}: the graph has no output {self._output}; it has {', '.join(outputs)}")
        self.labels = _classes(path, self.settings.classes)
        known, given = (outputs[self._output] or [None])[-1], len(self.labels or ())
        if self.labels is not None and isinstance(known, int) and known != given:
            raise ConfigError(f"{path}: classes names {given} classes; output {self._output} has {known}")
        self.fingerprint = _digest(graph, self.settings)

    @property
    def masks(self) -> str:
        """Where the bands of a view are masked."""
        return self.settings.masks or ("waves" if self._spectrogram is None else "features")

    def __call__(self, waves: Tensor, rate: int, views: Sequence[SoundView]) -> Tensor:
        """Return the probability of each class, (b, t) -> (b, c), under views.

        Raises:
            ConfigError: the waves are too short for a frame, or the graph takes none of this length.
        """
        waves = waves.cpu()
        if self.masks == "waves":
            waves, views = mask_waves(waves, views, rate), [SoundView(None, None)] * len(views)
        waves = resample(waves, rate, self.settings.rate)
        samples, inputs = waves.shape[1], waves
        if self._samples is not None and self._samples != samples:
            seconds, taken = samples / self.settings.rate, self._samples / self.settings.rate
            raise ConfigError(
                f"a chunk of {seconds:g} s has {samples} samples at {self.settings.rate} Hz; the graph takes exactly "
                f"{self._samples}: set chunk_length to {taken:g}"
            )
        if self._spectrogram is not None:
            self._spectrogram.check(samples)
            inputs = self._spectrogram.mask(self._spectrogram(waves), views, samples)
        return self._run(self._laid_out(inputs))

    def _laid_out(self, inputs: Tensor) -> NDArray[np.float32]:
        """Return inputs, (b, t) or (b, f, n), with the axes of the graph behind the batch."""
        given = {"time": 1} if self._spectrogram is None else {"mel": 1, "time": 2}
        axes = self.settings.shape[self.settings.shape[0] == "batch" :]
        array: NDArray[np.float32] = inputs.permute(0, *(given[axis] for axis in axes if axis != 1)).numpy()
        return np.expand_dims(array, [place for place, axis in enumerate(axes, start=1) if axis == 1])

    def _run(self, inputs: NDArray[np.float32]) -> Tensor:
        """Return the probabilities for inputs with a batch axis, (b, c)."""
        if self.settings.shape[0] != "batch":
            # (c,), or (n, c) of a graph that cuts its input into n patches
            answers = [self._once(clip) for clip in inputs]
            return torch.stack([answer.reshape(-1, answer.shape[-1]).mean(0) for answer in answers])
        size = self._batch or len(inputs)
        return torch.cat([self._once(inputs[at : at + size]) for at in range(0, len(inputs), size)])

    def _once(self, inputs: NDArray[np.float32]) -> Tensor:
        (answer,) = self._session.run([self._output], {self._input: np.ascontiguousarray(inputs)})
        scores = torch.from_numpy(np.asarray(answer, np.float32))
        if self.settings.activation == "softmax":
            return scores.softmax(-1)
        return scores.sigmoid() if self.settings.activation == "sigmoid" else scores

    def _check_input(self, path: Path) -> Any:
        """Return the graph's only input, with `name` and `shape`, which has to fit the settings."""
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ConfigError(f"{path}: the graph has the inputs {', '.join(i.name for i in inputs)}; it must have one")
        (node,) = inputs
        if node.type != "tensor(float)":
            raise ConfigError(f"{path}: the graph takes {node.type}; it must take tensor(float)")
        if len(node.shape) != len(self.settings.shape):
            raise ConfigError(f"{path}: shape is {self.settings.shape}; input {node.name} of the graph is {node.shape}")
        for axis, size in zip(self.settings.shape, node.shape, strict=True):
            if isinstance(size, int) and (problem := self._misfit(axis, size)):
                raise ConfigError(f"{path}: input {node.name} of the graph is {node.shape}: {problem}")
        return node

    def _misfit(self, axis: Axis, size: int) -> str | None:
        """Return the problem of an axis with a fixed size in the graph, and how to solve it; None if there is none."""
        features = self.settings.features
        if axis == 1:
            return None if size == 1 else f"shape has the axis 1 where the graph has {size}"
        if axis == "batch":
            return None if size == 1 else f"it takes exactly {size} clips at once; it must take 1, or any number"
        if features is None:
            return None  # a fixed number of samples is compared with the waves
        of_mel, of_time = ("features.mel.bands", features.mel.bands), ("features.frames", features.frames)
        key, given = of_mel if axis == "mel" else of_time
        if size == given:
            return None
        return f"axis {axis} has {size}, but {key} is {given or 'not set'}; set {key}: {size}, or correct shape"


def _settings_file(file: Path) -> Path:
    """Return the YAML file of a teacher, which is given as its graph or as this file.

    Raises:
        ConfigError: it is missing.
    """
    allowed = [file] if file.suffix in _YAML else [file.with_suffix(suffix) for suffix in _YAML]
    for path in allowed:
        if path.is_file():
            return path
    raise ConfigError(
        f"there is no {allowed[0]}, which describes the input and output of an ONNX teacher; "
        f"its keys are explained in docs/teachers.md"
    )


def _classes(path: Path, classes: str | None) -> ClassTable | None:
    if classes is None:
        return None
    return class_table(Path(classes) if classes == AUDIOSET else path.parent / classes)


def _digest(graph: Path, settings: GraphSettings) -> str:
    """Return a digest of what decides about the scores: the graph, weights that it keeps beside it, the settings."""
    digest = hashlib.sha256(dump(settings).encode())
    for file in [graph, *sorted(graph.parent.glob(f"{glob.escape(graph.name)}?data"))]:
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest()
