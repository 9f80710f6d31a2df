"""Three small teachers, convolutional and recurrent networks, as modules of a user.

`python -m benchmarks.esc10.teachers NAME CONFIG` trains one on labels and writes models/NAME.safetensors in the
working directory; from then on `benchmarks.esc10.teachers:NAME` is a teacher for `ced store`, run in that directory.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ced.config import FinetuneConfig, load_config
from ced.distill.dataset import shuffled
from ced.distill.finetune import LabelledClips
from ced.distill.step import learning_rate
from ced.distill.targets import mixup, mixup_weights
from ced.distill.trainer import MIXUP, ORDER
from ced.distill.views import mask
from ced.errors import CedError
from ced.files import written_aside
from ced.model.frontend import LogMel
from ced.sound.features import FrontEnd
from ced.sound.labels import ClassTable, read_classes

CLASSES = Path("classes.tsv")
DROPOUT = 0.2
CPU = torch.device("cpu")


class Network(nn.Module):
    """A network of a body, with its input in dB scaled to about -2 ... 2, and pooling over time."""

    def __init__(self, labels: ClassTable, body: nn.Module, width: int) -> None:
        super().__init__()
        self.labels, self.body = labels, body
        self.head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(2 * width, len(labels)))

    def logits(self, mel: Tensor) -> Tensor:
        """Score log-mel features, (b, f, n) -> (b, c)."""
        frames = self.body((mel + 30) / 30)  # (b, width, n')
        scores: Tensor = self.head(torch.cat([frames.mean(2), frames.amax(2)], dim=1))
        return scores

    def forward(self, mel: Tensor) -> Tensor:
        """Return probabilities, as a teacher does, (b, f, n) -> (b, c)."""
        return self.logits(mel).softmax(1)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution over time and frequency with batch normalisation and ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def conv_time(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Return a convolution over time with batch normalisation and ReLU."""
    padding = dilation * (kernel // 2)
    layer = nn.Conv1d(inputs, outputs, kernel, stride, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.BatchNorm1d(outputs), nn.ReLU())


class Pictures(nn.Module):
    """A plain convolutional network over the mel as a picture, frequencies averaged at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.layers = nn.Sequential(
            *(conv(1, w, kernel=7, stride=4), conv(w, w), nn.AvgPool2d(2)),
            *(conv(w, 2 * w), conv(2 * w, 2 * w), nn.AvgPool2d(2)),
            conv(2 * w, 4 * w),
        )
        for parameter in self.parameters():
            if parameter.ndim == 4:  # a third faster on a CPU
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, 4 w, n')."""
        out: Tensor = self.layers(x.unsqueeze(1)).mean(2)
        return out


class Series(nn.Module):
    """Convolutions over time, with more dilation in each block; each mel bin is a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_time(FrontEnd.n_mels, width, kernel=5, stride=2), conv_time(width, width, stride=2)
        )
        self.blocks = nn.ModuleList(conv_time(width, width, dilation=dilation) for dilation in (1, 2, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, w, n')."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Recurrent(nn.Module):
    """A few convolutions, then a recurrent network in both directions of time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.layers = nn.Sequential(
            *(conv(1, w, kernel=7, stride=4), conv(w, 2 * w), nn.AvgPool2d(2)),
            *(conv(2 * w, 2 * w), nn.AvgPool2d((2, 1))),
        )
        self.memory = nn.GRU(2 * w * FrontEnd.n_mels // 16, 2 * w, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, 4 w, n')."""
        steps = self.layers(x.unsqueeze(1)).flatten(1, 2).transpose(1, 2)
        out: Tensor = self.memory(steps)[0].transpose(1, 2)
        return out


BODIES = {"pictures": (Pictures, 32, 128), "series": (Series, 128, 128), "recurrent": (Recurrent, 24, 96)}


def make(name: str, folder: Path = Path()) -> Network:
    """Return a network with random weights, for the classes of `folder`."""
    kind, width, outputs = BODIES[name]
    return Network(read_classes(folder / CLASSES), kind(width), outputs)


def trained(name: str, folder: Path = Path()) -> Network:
    """Return the network that was trained in `folder`."""
    network = make(name, folder)
    network.load_state_dict(load_file(folder / _weights(name)))
    return network.eval()


def __getattr__(name: str) -> Network:
    """Return a trained network: attributes of this module are the teachers of the working directory."""
    if name not in BODIES or not _weights(name).is_file():
        raise AttributeError(f"no {_weights(name)} here; teachers that can be trained: {', '.join(BODIES)}")
    return trained(name)


def _weights(name: str) -> Path:
    return Path("models") / f"{name}.safetensors"


def train(name: str, config: FinetuneConfig) -> Network:
    """Train a network on the labels of `config.train_data` under views and mixup, with cross-entropy and AdamW."""
    torch.manual_seed(config.seed)
    network, clips, front_end = make(name), LabelledClips(config, read_classes(CLASSES)), LogMel()
    args = config.optimizer_args
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    steps = len(clips.pack) // config.batch_size
    total = steps * config.epochs
    batches = shuffled(len(clips.pack), config.batch_size, [config.seed, ORDER])
    rng = np.random.default_rng([config.seed, MIXUP])
    step = 0
    for epoch in range(1, config.epochs + 1):
        data, losses = clips.epoch(epoch), []
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, peak=args.lr, warmup=total // 10, total=total, decay_frac=config.decay_frac, cosine=True
                )
            items = next(batches)
            waves, uniforms = data.dataset.__getitems__(items).to_device(CPU)
            mel = mask(front_end(waves), uniforms, data.dataset.recipe)
            targets = clips.targets(items, torch.Generator())
            if config.mixup is not None:
                weights = mixup_weights(len(targets), config.mixup, rng)
                mel, targets = mixup(mel, weights), mixup(targets, weights)
            loss = F.cross_entropy(network.logits(mel), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        print(f"{name}: epoch {epoch} of {config.epochs}: loss {np.mean(losses):.4f}", flush=True)
    return network.eval()


def main() -> None:
    """Train one network as the command line says."""
    parser = argparse.ArgumentParser(description="train a teacher on the labels of the pack in this folder")
    parser.add_argument("name", choices=BODIES)
    parser.add_argument("config", type=Path, help="a configuration of `ced finetune`; its key model is not used")
    args = parser.parse_args()
    try:
        network = train(args.name, load_config(FinetuneConfig, args.config))
    except CedError as error:
        sys.exit(f"error: {error}")
    _weights(args.name).parent.mkdir(exist_ok=True)
    with written_aside(_weights(args.name)) as aside:
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, aside)


if __name__ == "__main__":
    torch.set_num_threads(1)  # for networks of this size, a second thread is slower
    main()
