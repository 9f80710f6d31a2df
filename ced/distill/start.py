"""The network that a training run starts from, and checks of whether it suits the length of the clips."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from ced.config import LoopConfig
from ced.distill.pack_reader import AudioPack
from ced.errors import CheckpointError, ConfigError, DownloadError
from ced.model.loading import create
from ced.model.vit import CED
from ced.progress import Progress
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import frames_of
from ced.sound.labels import ClassTable

logger = logging.getLogger(__name__)


def start_network(config: LoopConfig, labels: ClassTable, needs: Mapping[str, str], progress: Progress) -> CED:
    """Make the network that a configuration asks for; its fresh weights come from the configuration's seed.

    Args:
        config: names the network and its first weights.
        labels: the classes to be learned.
        needs: fields of `ModelConfig` that the training requires.
        progress: told of a download.

    Raises:
        ConfigError: `model_args` contradicts `needs` or itself.
        CheckpointError: no such model, or weights that do not fit.
        DownloadError: a file that is not in the cache and cannot be fetched.
    """
    for key, needed in needs.items():
        if (given := config.model_args.get(key, needed)) != needed:
            raise ConfigError(f"model_args.{key} is {given!r}; this training needs {needed!r}")
    try:
        with seeded(config.seed):
            return create(
                config.model,
                model_args={**config.model_args, **needs},
                pretrained=config.pretrained,
                labels=labels,
                progress=progress,
            )
    except (CheckpointError, DownloadError) as error:
        if config.pretrained is not False:
            error.hint = error.hint or "--pretrained false starts from fresh weights"
        raise


def warn_of_cuts(network: CED, samples: int) -> None:
    """Warn when each item of a training is cut: of a little more than a piece, half of the work is on padding."""
    frames, piece = frames_of(samples, network.config.hop_size), network.config.target_length
    if frames > piece:
        logger.warning(
            "items of %d frames are cut into pieces of %d, which the network scores one by one; with "
            "model_args.target_length %d it scores them whole",
            *(frames, piece, frames),
        )


def warn_of_padding(pack: AudioPack, samples: int) -> None:
    """Warn when most of what is learned from, in items of `samples` samples, would be the padding of short clips."""
    lengths = np.array([pack.samples(clip) for clip in range(len(pack))])
    padding = 1 - np.minimum(lengths, samples).mean() / samples
    if padding > 0.5:
        logger.warning(
            "%.0f %% of what is learned from would be padding: chunk_length is %g s, half of the clips have at most "
            "%.2f s; set chunk_length to about the length of the clips",
            *(100 * padding, samples / SAMPLE_RATE, float(np.median(lengths)) / SAMPLE_RATE),
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let fresh weights come from a seed; torch's global generator, which draws them, is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
