"""The torch network as a scorer of NumPy waves, with the outputs of its exported graph. Needs torch."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ced.errors import CheckpointError, ConfigError
from ced.model.vit import CED
from ced.sound.features import PATCH, column_starts
from ced.sound.labels import ClassTable

Waves = NDArray[np.float32]


class TorchScorer:
    """Scores waves with a torch network.

    Args:
        network: set to eval mode.
        device: where it is moved to, as "cuda"; "auto": an accelerator if torch has one here, else the CPU; None: it
            stays where it is.

    Raises:
        ConfigError: torch has no such device here.
    """

    def __init__(self, network: CED, device: str | None = None) -> None:
        self.network = network.eval()
        if device is not None:
            try:
                self.network.to(_accelerator() if device == "auto" else device)
            except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
                reason = str(error).partition("\n")[0]
                raise ConfigError(f"device is {device!r}; torch cannot use it here: {reason}") from error

    @property
    def accelerated(self) -> bool:
        """Whether the network runs on another device than the CPU."""
        return self.network.freq_pos_embed.device.type != "cpu"

    @property
    def labels(self) -> ClassTable:
        """The classes, in the order of the scores."""
        return self.network.labels

    def __call__(self, waves: Waves, /) -> Waves:
        """Return the probability of each class, (b, t) 16 kHz in [-1, 1] -> (b, c)."""
        return self._run(self.network.probs, waves)

    def embed(self, waves: Waves, /) -> Waves:
        """Return the mean over tokens after the last LayerNorm (the class token, if there is one), (b, t) -> (b, d)."""
        return self._run(partial(_embedding, self.network), waves)

    def columns(self, waves: Waves, /) -> Waves:
        """Return the probability of each class in each column of patches (0.16 s), (b, t) -> (b, columns, c).

        Raises:
            CheckpointError: the waves are longer than `target_length`, and the network does not pad the last piece.
        """
        return self._run(partial(_columns, self.network), waves)

    def column_starts(self, count: int) -> NDArray[np.float64]:
        """Return the start of each of the `count` columns of a wave, (count,) seconds."""
        return column_starts(count, self.network.config.target_length, self.network.config.hop_size)

    def _run(self, function: Callable[[Tensor], Tensor], waves: Waves) -> Waves:
        with torch.inference_mode():
            batch = torch.from_numpy(waves).to(self.network.freq_pos_embed.device)
            result: Waves = function(batch).float().cpu().numpy()
        return result


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _embedding(network: CED, waves: Tensor) -> Tensor:
    def pooled(tokens: Tensor) -> Tensor:
        return tokens[:, 0] if network.config.pooling == "token" else tokens.mean(1)

    return network.in_pieces(network.mel(waves), pooled).mean(1)


def _columns(network: CED, waves: Tensor) -> Tensor:
    mel, config = network.mel(waves), network.config
    frames = mel.shape[-1]
    if frames > config.target_length and not config.pad_last:
        raise CheckpointError(
            f"the network takes {config.target_length} frames at once and does not pad the last piece of longer sounds;"
            f" it cannot score the columns of {frames} frames"
        )

    def scores(tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:] if config.pooling == "token" else tokens
        by_column = patches.unflatten(1, (config.rows, -1)).mean(1)  # frequency is slowest
        return network.activate(network.outputlayer(by_column))

    by_piece = network.in_pieces(mel, scores)  # (b, pieces, columns, c)
    whole, rest = divmod(frames, min(frames, config.target_length))
    inside = whole * by_piece.shape[2] + rest // PATCH  # the others are of the padding
    return by_piece.flatten(1, 2)[:, :inside]
