"""Masked pre-training: a network learns from any recordings, without labels, to fill in hidden patches.

In each step: random crops of clips -> front end -> three quarters of the patches hidden -> network -> decoder -> error
of the hidden patches; optimiser. The network is kept, as first weights of students and teachers; the decoder is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ced.config import DecoderArgs, Mode, PretrainConfig
from ced.distill.dataset import ViewDataset, chunk_samples, crop
from ced.distill.distributed import autocast
from ced.distill.pack_reader import AudioPack
from ced.distill.recorder import draw_pictures
from ced.distill.step import ReconstructionLoss
from ced.distill.trainer import (
    DECODER,
    VIEWS,
    EpochData,
    Trainer,
    begin_run,
    initial_network,
    seeded,
    warn_of_padding,
)
from ced.model.mae import MaskedAutoencoder, patches, picture
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.features import PATCH
from ced.sound.labels import ClassTable

PICTURE_NAME = "reconstruction.png"
PICTURED = 4  # clips in it
NO_CLASSES = ClassTable(("untrained",))  # a network needs at least one


def pretrain(config: PretrainConfig, *, name: str, resume: Path | None = None, progress: Progress = silent) -> Path:
    """Pre-train a network on a pack of any clips, alone or as one of torchrun's processes.

    Args:
        config: what to train, on what, and how.
        name: of the experiment, the folder above the one named by the time.
        resume: folder of an experiment to resume; None: that of this job of torchrun, or a new one.
        progress: called after each step, in the first process.

    Returns:
        The experiment's folder; a finished experiment is not changed.

    Raises:
        ConfigError: the crops are longer than the network's longest input, or too short to hide a part of them; or the
            configuration contradicts itself or the experiment to resume.
        PackError: the pack lacks a clip.
        TrainingError: the loss is not finite, or `resume` cannot be resumed.
        BusyError: another process is training in this experiment.
    """
    run = begin_run(config, name=name, resume=resume, progress=progress)
    if run.folder and run.state.finished:
        return run.folder
    samples, pack = chunk_samples(config.chunk_length), AudioPack(config.train_data)
    warn_of_padding(pack, samples)
    network = initial_network(config, NO_CLASSES, {"pooling": "token"}, run.progress)
    autoencoder = make_autoencoder(network, samples, config.mask_ratio, config.decoder_args, config.seed)
    data = Crops(pack, samples, config.seed, autoencoder.hide)
    pictures = Pictures(autoencoder, data, config.picture_every, config.epochs, config.mode)
    objective = ReconstructionLoss(autoencoder)
    return Trainer(config, run, network, objective, data, after_epoch=pictures.after_epoch).fit()


def make_autoencoder(
    network: CED, samples: int, mask_ratio: float, decoder: DecoderArgs, seed: int
) -> MaskedAutoencoder:
    """Put a new decoder behind a network, for crops of `samples` samples; the network loses its output layer."""
    network.outputlayer = nn.Sequential()  # it is not trained; without one, the file cannot be taken for a tagger
    columns = network.front_end(torch.zeros(1, samples)).shape[-1] // PATCH
    with seeded(int(np.random.default_rng([seed, DECODER]).integers(2**63))):
        return MaskedAutoencoder(
            network,
            columns,
            ratio=mask_ratio,
            width=decoder.embed_dim,
            heads=decoder.num_heads,
            depth=decoder.depth,
        )


@dataclass(frozen=True, eq=False)
class Crops:
    """Random crops of the clips of a pack, one of each clip an epoch, without shifts or masks in time and frequency."""

    pack: AudioPack
    samples: int  # of a crop; shorter clips are padded
    seed: int
    hide: Callable[[int, torch.Generator], Tensor] | None = None  # draws the patches to hide, as `EpochData.hidden`

    def __len__(self) -> int:
        return len(self.pack)

    def epoch(self, epoch: int) -> EpochData:
        """Return the crops of an epoch (1, 2, ...)."""
        rng = np.random.default_rng([self.seed, VIEWS, epoch])
        dataset = ViewDataset(self.pack, crop(self.pack, self.samples, rng), samples=self.samples)
        return EpochData(dataset, hidden=self.hide)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Draws how well the hidden patches of a few clips are filled in.

    Crops and masks are the same each time, so that pictures can be compared.
    """

    autoencoder: MaskedAutoencoder
    crops: Crops
    every: int  # epochs between two pictures
    epochs: int  # of the run; the last one is drawn as well
    mode: Mode

    def after_epoch(self, epoch: int, folder: Path) -> None:
        """Write the picture of an epoch into a folder, if it is one to draw."""
        if epoch % self.every == 0 or epoch == self.epochs:
            self.draw(folder / PICTURE_NAME)

    def draw(self, path: Path) -> None:
        """Draw a few clips: their mel, what the network sees of it, and the hidden patches filled in."""
        items = np.unique(np.linspace(0, len(self.crops) - 1, PICTURED).astype(np.int64))
        device = self.autoencoder.mask_token.device
        waves, _ = self.crops.epoch(0).dataset.__getitems__(items).to_device(device)  # training starts at epoch 1
        generator = torch.Generator().manual_seed(self.crops.seed)
        hidden = self.autoencoder.hide(len(items), generator).to(device)
        self.autoencoder.eval()
        with torch.inference_mode():
            mel = self.autoencoder.encoder.front_end(waves)
            with autocast(self.mode, device):
                filled = self.autoencoder.fill(mel, hidden)
            seen = picture(patches(mel).masked_fill(hidden.unsqueeze(-1), torch.nan), self.autoencoder.rows)
        self.autoencoder.train()
        ratio = 1 - self.autoencoder.visible / self.autoencoder.tokens
        columns = {"input": mel, f"{ratio:.0%} hidden": seen, "filled in, level and contrast given": filled}
        draw_pictures({title: column.cpu().numpy() for title, column in columns.items()}, path)
