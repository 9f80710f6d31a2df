"""Comparisons: a float graph with the torch network, an int8 graph with the float one on labelled clips."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError, ExportError, optional_packages
from ced.files import written_aside
from ced.model.config import ModelConfig
from ced.model.graph import PROB
from ced.model.graph.export import int8_path, quantize
from ced.model.metrics import Figures, figures
from ced.model.ort import open_session
from ced.model.runtime import OnnxModel
from ced.model.weights import Weights
from ced.progress import Progress, silent
from ced.sound import audio
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import PATCH
from ced.sound.tables import LabelledClip, multi_hot, read_labelled

BOUND = 0.3  # points of mAP


def largest_difference(weights: Weights, path: Path) -> float:
    """Return the largest difference in probability between a graph and the torch network of the same weights.

    Both score noise and tones, in several batch sizes and lengths, from less than one patch to more than one piece.

    Raises:
        MissingPackageError: torch is not installed.
    """
    with optional_packages("comparing a graph with the network"):
        import torch

        from ced.model.loading import build
    network = build(weights)
    session = open_session(path, threads=1)
    name = session.get_inputs()[0].name
    differences = []
    for batch in _example_waves(weights.config) if name == "waves" else _example_feats(weights.config):
        with torch.inference_mode():
            given = torch.from_numpy(batch)
            expected = network.probs(given) if name == "waves" else network.as_probs(network.forward_mel(given))
        found: NDArray[np.float32] = session.run([PROB], {name: batch})[0]
        differences.append(float(np.abs(found - expected.numpy()).max()))
    return max(differences)


def change_on_noise(exact: Path, int8: Path, config: ModelConfig) -> float:
    """Return the largest change in probability from a float graph to its int8 one on noise and tones."""
    sessions = [open_session(path, threads=1) for path in (exact, int8)]
    name = sessions[0].get_inputs()[0].name
    changes = []
    for batch in _example_waves(config) if name == "waves" else _example_feats(config):
        one, other = (session.run([PROB], {name: batch})[0] for session in sessions)
        changes.append(float(np.abs(one - other).max()))
    return max(changes)


def _lengths(config: ModelConfig) -> list[tuple[int, int]]:
    """Return batch sizes and frames: one patch, short, the longest piece, and longer where that is allowed."""
    longest = config.target_length
    longer = [(1, longest + 1), (2, 2 * longest)] if config.pad_last else []
    return [(1, PATCH), (3, longest // 4 + PATCH), (2, longest), *longer]


def _example_feats(config: ModelConfig) -> Iterator[NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    for clips, frames in _lengths(config):
        yield generator.normal(-30.0, 15.0, (clips, config.n_mels, frames)).astype(np.float32)


def _example_waves(config: ModelConfig) -> Iterator[NDArray[np.float32]]:
    """Yield noise of different levels with a tone; the first wave is shorter than one patch."""
    generator, hop = np.random.default_rng(0), config.hop_size
    lengths = [(clips, (frames - 1) * hop + hop // 2) for clips, frames in _lengths(config)]
    for clips, samples in [(1, config.front_end.min_samples // 2), *lengths]:
        noise = generator.normal(0.0, 1.0, (clips, samples)) * 10.0 ** -np.arange(1.0, clips + 1.0)[:, None]
        tone = 0.1 * np.sin(2 * np.pi * 440.0 / SAMPLE_RATE * np.arange(samples))
        yield (noise + tone).astype(np.float32)


@dataclass(frozen=True)
class Comparison:
    """An int8 graph compared with its float graph."""

    clips: int
    exact: Figures
    int8: Figures
    mean_change: float  # in probability
    largest_change: float

    @property
    def loss(self) -> float:
        """The loss of int8 in points of mAP; negative: a gain."""
        return 100.0 * (self.exact.map - self.int8.map)

    @property
    def summary(self) -> str:
        """The figures in one line."""
        accuracy = ""
        if self.exact.accuracy is not None and self.int8.accuracy is not None:
            accuracy = f", accuracy {self.exact.accuracy:.4f} -> {self.int8.accuracy:.4f}"
        gain = round(-self.loss, 2) + 0.0  # not -0.0
        return (
            f"mAP {self.exact.map:.4f} -> {self.int8.map:.4f} ({gain:+.2f} points){accuracy}; probabilities change by "
            f"{self.mean_change:.2g} in the mean, {self.largest_change:.2g} at most ({self.clips} clips)"
        )


def export_int8(
    path: Path, *, check: Path | None = None, bound: float = BOUND, progress: Progress = silent
) -> Comparison | None:
    """Write the int8 graph of an exported float graph beside it, at `int8_path(path)`.

    Args:
        path: a graph written by `export`.
        check: a table of labelled clips (see `read_labelled`) on which to compare the two.
        bound: points of mAP that int8 may lose there.
        progress: called for each clip compared.

    Returns:
        The comparison, with `check`.

    Raises:
        ConfigError: the bound is negative.
        ExportError: int8 loses more than the bound; no int8 graph is written.
        TableError, AudioError: the clips cannot be read.
    """
    if not bound >= 0:
        raise ConfigError(f"bound is {bound}; it must be 0 or more")
    clips = None if check is None else read_labelled(check, OnnxModel(path).labels)
    int8_path(path).unlink(missing_ok=True)  # of an earlier export, which must not remain if this one is refused
    with written_aside(int8_path(path)) as aside:
        quantize(path, aside)
        if clips is None:
            return None
        found = compare(path, aside, clips, progress)
        if found.loss > bound:
            raise ExportError(
                f"int8 loses {found.loss:.2f} points of mAP of {path}; at most {bound:g} are allowed: {found.summary}"
            )
    return found


def compare(exact: Path, int8: Path, clips: list[LabelledClip], progress: Progress = silent) -> Comparison:
    """Score labelled clips with a float graph and with its int8 one."""
    models = OnnxModel(exact), OnnxModel(int8)
    targets = multi_hot([clip.labels for clip in clips], len(models[0].labels))
    probs: list[list[NDArray[np.float32]]] = []
    for done, clip in enumerate(clips, start=1):
        wave = audio.load(clip.path)[None]
        probs.append([model(wave)[0] for model in models])
        progress("compare int8 with float", done, len(clips))
    both = np.array(probs)  # (clips, 2, c)
    change = np.abs(both[:, 0] - both[:, 1])
    return Comparison(
        len(clips),
        figures(targets, both[:, 0]),
        figures(targets, both[:, 1]),
        float(change.mean()),
        float(change.max()),
    )
