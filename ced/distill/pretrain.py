"""Masked pre-training: a network learns what sounds are like by filling in hidden patches of any recordings at all.

The walk is: random crop of each clip -> front end -> three quarters of the patches hidden -> network -> decoder ->
what was hidden; step. The network is kept, as first weights of students and teachers; the decoder is not.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ced.config import PretrainConfig
from ced.distill.dataset import ViewDataset, chunk_samples, crop
from ced.distill.loop import DECODER, VIEWS, EpochData, Task, run
from ced.distill.pack_reader import AudioPack
from ced.distill.precision import autocast
from ced.distill.recorder import draw_pictures
from ced.distill.start import seeded, start_network, warn_of_padding
from ced.model.mae import MaskedAutoencoder, error_of_hidden, patches, picture
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.features import PATCH
from ced.sound.labels import ClassTable

PICTURE_NAME = "reconstruction.png"
SHOWN = 4  # clips in it
NO_CLASSES = ClassTable(("untrained",))  # a network has to have one


def pretrain(config: PretrainConfig, *, name: str, resume: Path | None = None, progress: Progress = silent) -> Path:
    """Pre-train a network on a pack of any clips; see `loop.run` for the arguments, the result and further errors.

    Raises:
        ConfigError: the crops are longer than the network hears at once, or too short to hide a part of them.
    """
    return run(config, lambda: _task(config, progress), name=name, resume=resume, progress=progress)


def _task(config: PretrainConfig, progress: Progress) -> Task:
    clips = Crops(config)
    network = start_network(config, NO_CLASSES, {"pooling": "token"}, progress)
    autoencoder = make_autoencoder(config, network, clips.samples)

    def epoch(number: int) -> EpochData:
        return EpochData(clips.epoch(number), lambda items, generator: autoencoder.hide(len(items), generator))

    def show(number: int, folder: Path) -> None:
        if number % config.picture_every == 0 or number == config.epochs:
            show_reconstruction(config, autoencoder, clips, folder / PICTURE_NAME)

    return Task(network, len(clips.pack), epoch, error_of_hidden, learner=autoencoder, after_epoch=show)


def make_autoencoder(config: PretrainConfig, network: CED, samples: int) -> MaskedAutoencoder:
    """Put a fresh decoder behind a network, for crops of `samples` samples; the network loses its output layer."""
    network.outputlayer = nn.Sequential()  # nothing would train it, and without one no file pretends to have classes
    columns = network.front_end(torch.zeros(1, samples)).shape[-1] // PATCH
    decoder = config.decoder_args
    with seeded(int(np.random.default_rng([config.seed, DECODER]).integers(2**63))):
        return MaskedAutoencoder(
            network,
            columns,
            ratio=config.mask_ratio,
            width=decoder.embed_dim,
            heads=decoder.num_heads,
            depth=decoder.depth,
        )


class Crops:
    """A pack as training data: of each clip one random crop an epoch, as it is."""

    def __init__(self, config: PretrainConfig) -> None:
        self.samples, self.pack, self.seed = (
            chunk_samples(config.chunk_length),
            AudioPack(config.train_data),
            config.seed,
        )
        warn_of_padding(self.pack, self.samples)

    def epoch(self, epoch: int) -> ViewDataset:
        """Return the crops of a training epoch (1, 2, ...)."""
        rng = np.random.default_rng([self.seed, VIEWS, epoch])
        return ViewDataset(self.pack, crop(self.pack, self.samples, rng), samples=self.samples)


def show_reconstruction(config: PretrainConfig, autoencoder: MaskedAutoencoder, clips: Crops, path: Path) -> None:
    """Draw a few clips: as they are, as the network sees them, and with what is hidden filled in.

    The crops and masks are the same each time, so that one picture can be held against the next.
    """
    items = np.unique(np.linspace(0, len(clips.pack) - 1, SHOWN).astype(np.int64))
    device = autoencoder.mask_token.device
    waves, _ = clips.epoch(0).__getitems__(items).to_device(device)  # training counts its epochs from 1
    hidden = autoencoder.hide(len(items), torch.Generator().manual_seed(config.seed)).to(device)
    autoencoder.eval()
    with torch.inference_mode():
        mel = autoencoder.encoder.front_end(waves)
        with autocast(config.mode, device):
            filled = autoencoder.fill(mel, hidden)
        seen = picture(patches(mel).masked_fill(hidden.unsqueeze(-1), torch.nan), autoencoder.rows)
    autoencoder.train()
    hiding = f"{config.mask_ratio:.0%} hidden"
    columns = {"input": mel, hiding: seen, "filled in, level and contrast given": filled}
    draw_pictures({title: column.cpu().numpy() for title, column in columns.items()}, path)
