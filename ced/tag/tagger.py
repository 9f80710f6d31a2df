"""Tagging: a sound becomes a timeline of its most probable classes, window by window."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ced.errors import CheckpointError, ConfigError
from ced.progress import Progress, silent
from ced.sound import audio
from ced.sound.labels import ClassTable

if TYPE_CHECKING:
    from ced.model.vit import CED

DEFAULT_MODEL = "ced_mini"


class Scorer(Protocol):
    """Anything that scores waves: a network behind an adapter, another runtime, a function with a class table."""

    @property
    def labels(self) -> ClassTable:
        """The classes, in the order of the scores."""

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Return the probability of each class, (b, t) 16 kHz in [-1, 1] -> (b, c)."""


@dataclass(frozen=True)
class Tag:
    """A class that a window was tagged with."""

    label: str
    index: int  # in the model's class table
    prob: float


@dataclass(frozen=True)
class Tags:
    """The most probable classes of one window, best first."""

    start: float  # seconds
    end: float
    tags: tuple[Tag, ...]


class TorchScorer:
    """The torch network as a `Scorer`: numpy in, numpy out, on the device where its weights lie."""

    def __init__(self, network: CED) -> None:
        self.network = network.eval()

    @property
    def labels(self) -> ClassTable:
        """The classes, in the order of the scores."""
        return self.network.labels

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Return the probability of each class, (b, t) -> (b, c)."""
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(waves).to(self.network.freq_pos_embed.device)
            probs: NDArray[np.float32] = self.network.probs(batch).cpu().numpy()
        return probs


class Tagger:
    """Tags sounds with a model.

    Args:
        model: a model name, a checkpoint (file or experiment folder), a torch network, or any `Scorer`.
        progress: told of a download, if the named model needs one.

    Raises:
        CheckpointError, DownloadError: the model is not known, not readable, or not here and not to be fetched.
    """

    def __init__(
        self, model: str | os.PathLike[str] | CED | Scorer = DEFAULT_MODEL, progress: Progress = silent
    ) -> None:
        if isinstance(model, str | os.PathLike):
            from ced.model.zoo import load_model

            model = load_model(os.fspath(model), progress=progress)
        # A torch network is known by its method `probs`: torch itself need not be there to ask.
        self.scorer: Scorer = TorchScorer(cast("CED", model)) if hasattr(model, "probs") else model

    @property
    def labels(self) -> ClassTable:
        """The classes that the model knows."""
        return self.scorer.labels

    def tag(
        self, source: audio.Source, *, top_k: int = 3, window: float = 10.0, hop: float | None = None
    ) -> Iterator[Tags]:
        """Tag a sound window by window; a long file never lies in memory as a whole.

        The last window, and a sound shorter than one, is scored at its own length.

        Args:
            source: path, bytes, binary file, or (array, rate).
            top_k: classes a window.
            window: seconds.
            hop: seconds from one window's start to the next; None: windows lie end to end.

        Raises:
            AudioError: the sound cannot be read; raised when the iteration comes to the place.
            ConfigError: `top_k`, `window` or `hop` is not positive.
        """
        for name, value in (("top_k", top_k), ("window", window), ("hop", hop)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        return self._timeline(source, top_k, window, hop)

    def _timeline(self, source: audio.Source, top_k: int, window: float, hop: float | None) -> Iterator[Tags]:
        for piece in audio.windows(source, window, hop):
            yield Tags(piece.start, piece.end, self._best(self._score(piece.wave), top_k))

    def _score(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """Score one wave, (t,) -> (c,)."""
        scores = self.scorer(wave[None])
        if scores.shape != (1, len(self.labels)):
            raise CheckpointError(
                f"the model answers one wave with scores of shape {scores.shape}; its class table asks for"
                f" (1, {len(self.labels)})"
            )
        row: NDArray[np.float32] = scores[0]
        return row

    def _best(self, probs: NDArray[np.float32], top_k: int) -> tuple[Tag, ...]:
        order = np.argsort(-probs, kind="stable")[:top_k]
        return tuple(Tag(self.labels.names[index], int(index), float(probs[index])) for index in order)
