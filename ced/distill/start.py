"""The network that a training run starts from."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ced.config import LoopConfig
from ced.errors import ConfigError
from ced.model.loading import create
from ced.model.vit import CED
from ced.progress import Progress
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
    with seeded(config.seed):
        return create(
            config.model,
            model_args={**config.model_args, **needs},
            pretrained=config.pretrained,
            labels=labels,
            progress=progress,
        )


def warn_of_cuts(network: CED, samples: int) -> None:
    """Warn when each item of a training is cut: of a little more than a piece, half of the work is on padding."""
    frames, piece = frames_of(samples, network.config.hop_size), network.config.target_length
    if frames > piece:
        logger.warning(
            "items of %d frames are cut into pieces of %d, which the network hears one by one; with "
            "model_args.target_length %d it hears them whole",
            *(frames, piece, frames),
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let fresh weights come from a seed; torch's global generator, which draws them, is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
