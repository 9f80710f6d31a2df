"""Embeddings for two benchmarks of audio representations: HEAR and X-ARES.

This module implements the common API of HEAR: `hear-validator ced.integrations.hear --model ced_tiny`, where the model
is a published name, a checkpoint or an experiment. The encoder for X-ARES is the class `CedEncoder`.
"""

import os

import torch
from torch import Tensor, nn

from ced.errors import AudioError
from ced.model import loading, zoo
from ced.model.vit import CED
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import PATCH

BATCH_SIZE = 16  # clips


class CedEncoder(nn.Module):
    """A network without its output layer: an embedding for each column of patches (0.16 s).

    It has the attributes that HEAR (`sample_rate`, `scene_embedding_size`, `timestamp_embedding_size`) and X-ARES
    (`sampling_rate`, `output_dim`, `hop_size_in_ms`) require.
    """

    sample_rate = sampling_rate = SAMPLE_RATE

    def __init__(self, model: str | os.PathLike[str] | CED = zoo.DEFAULT_MODEL) -> None:
        """Wrap a network, given as a published name, a checkpoint, an experiment, or a network.

        Raises:
            CheckpointError: the name is unknown, or the file is missing or unreadable.
            DownloadError: the model is not cached and could not be downloaded.
        """
        super().__init__()
        network = model if isinstance(model, CED) else loading.load_model(os.fspath(model))
        self.network = network
        self.output_dim = self.scene_embedding_size = self.timestamp_embedding_size = network.config.embed_dim
        self.hop_size_in_ms = 1000 * network.config.hop_size * PATCH / SAMPLE_RATE

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """Embed waves, (b, t) or (t,) 16 kHz in [-1, 1] -> (b, columns, d); shorter than 2,400 samples are padded.

        Raises:
            AudioError: the waves are empty, not floats, or have more than two dimensions.
        """
        self.network.eval()  # frozen, even if the benchmark sets training mode
        if not torch.is_floating_point(audio) or audio.ndim not in (1, 2) or not audio.numel():
            raise AudioError(
                f"audio is {audio.dtype} {tuple(audio.shape)}; it must be floats in [-1, 1], (clips, samples)"
            )
        return torch.cat([self._columns(some) for some in torch.atleast_2d(audio).split(BATCH_SIZE)])

    def _columns(self, waves: Tensor) -> Tensor:
        return self.network.patch_tokens(self.network.front_end(waves)).mean(1)


def load_model(model_file_path: str = "") -> CedEncoder:
    """Return the encoder of a model; without a name or path, of the default model of `ced tag`."""
    return CedEncoder(model_file_path or zoo.DEFAULT_MODEL)


def get_timestamp_embeddings(audio: Tensor, model: CedEncoder) -> tuple[Tensor, Tensor]:
    """Return embeddings over time with their time stamps.

    Args:
        audio: (b, t) 16 kHz in [-1, 1], on the device of the model.
        model: from `load_model`.

    Returns:
        (b, columns, d), and (b, columns) milliseconds: the centre of the frames of a column.
    """
    embeddings = model(audio)
    # Frames are centred on their samples, so the centre of 16 of them is 7.5 hops after the first.
    middle = (PATCH - 1) / 2 / PATCH
    times = (torch.arange(embeddings.shape[1], device=embeddings.device) + middle) * model.hop_size_in_ms
    return embeddings, times.expand(embeddings.shape[0], -1)


def get_scene_embeddings(audio: Tensor, model: CedEncoder) -> Tensor:
    """Return one embedding per clip, the mean over its patches, (b, t) -> (b, d).

    Up to 10 s this is the vector of `ced embed`, which takes the mean over windows for longer clips.
    """
    embeddings: Tensor = model(audio).mean(1)
    return embeddings
