"""One step of training: waves in, better weights out. Its learning rate and its optimiser."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ced.config import LoopConfig
from ced.distill.dataset import Batch
from ced.distill.distributed import World
from ced.distill.precision import autocast, half_type
from ced.distill.targets import mixup
from ced.distill.views import ViewRecipe, mask
from ced.errors import TrainingError
from ced.model.vit import CED

Loss = Callable[[Tensor, Tensor], Tensor]  # what the learner answers, targets -> scalar


def learning_rate(step: int, *, peak: float, warmup: int, total: int, decay_frac: float, cosine: bool) -> float:
    """Return the learning rate of a step (0, 1, ..., total - 1).

    It rises in a line from 0 to `peak` in `warmup` steps, then falls as half a cosine, to `decay_frac` * `peak` at the
    end of the last step; without `cosine` it stays. So the warm-up is a part of the `total` steps, not one before them.
    """
    if step < warmup:
        return peak * step / warmup
    if not cosine:
        return peak
    part = (step - warmup) / (total - warmup)
    return peak * (decay_frac + (1 - decay_frac) * (1 + math.cos(math.pi * part)) / 2)


def make_optimizer(config: LoopConfig, parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """Make the optimiser that a configuration asks for; 8-bit Adam needs CUDA and bitsandbytes, else it is Adam."""
    args = config.optimizer_args
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW if config.optimizer == "AdamW" else torch.optim.Adam
    if config.optimizer == "Adam8bit" and device.type == "cuda" and find_spec("bitsandbytes"):
        from bitsandbytes.optim import Adam8bit

        kind = Adam8bit
    options: dict[str, Any] = {"lr": args.lr, "betas": args.betas, "eps": args.eps, "weight_decay": args.weight_decay}
    if device.type == "cpu":
        options["fused"] = True  # one pass over the weights instead of a dozen
    return kind(parameters, **options)


def calibrate(network: CED, mel: Tensor) -> None:
    """Give a BatchNorm without statistics those of its first batch, mel (b, f, n), of all processes together.

    Its momentum is low: starting from mean 0 and variance 1 it would take hundreds of steps to be near those of any
    sound, and until then validation would see another network than training.
    """
    for layer in network.init_bn:
        if isinstance(layer, nn.BatchNorm1d) and layer.num_batches_tracked == 0:
            if isinstance(layer, SharedBatchNorm):
                mean, variance, count = shared_statistics(mel)
                variance = variance * (count / (count - 1))
            else:
                mean, variance = mel.mean((0, 2)), mel.var((0, 2))
            layer.get_buffer("running_mean").copy_(mean)
            layer.get_buffer("running_var").copy_(variance)


def shared_statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return mean and variance (without Bessel's correction) of each channel over all processes, and their count.

    Args:
        x: (b, f, n), this process's share; it needs no gradient.

    Returns:
        (f,), (f,), and the number of values that each is about.
    """
    sums = torch.cat([x.sum((0, 2)), x.new_tensor([x.shape[0] * x.shape[2]])])
    dist.all_reduce(sums)
    mean, count = sums[:-1] / sums[-1], sums[-1]
    squares = (x - mean[:, None]).square().sum((0, 2))
    dist.all_reduce(squares)
    return mean, squares / count, float(count)


class SharedBatchNorm(nn.BatchNorm1d):
    """A BatchNorm that takes the statistics of a batch over all processes; torch's own is for GPUs alone.

    It is a network's first layer, so its input needs no gradient, and neither do the statistics.
    """

    @classmethod
    def of(cls, layer: nn.BatchNorm1d) -> "SharedBatchNorm":
        """Return one with the parameters and statistics of another, which it shares."""
        made = cls(layer.num_features, layer.eps, layer.momentum)
        made.weight, made.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            made.register_buffer(name, buffer)
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b, f, n)."""
        if not self.training:
            return super().forward(x)
        mean, variance = self._update(x)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, training=False, eps=self.eps)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the statistics of a batch, and move the running ones towards them."""
        with torch.no_grad():
            mean, variance, count = shared_statistics(x)
            momentum = self.momentum or 0.0
            self.get_buffer("running_mean").lerp_(mean, momentum)
            self.get_buffer("running_var").lerp_(variance * (count / (count - 1)), momentum)
            self.get_buffer("num_batches_tracked").add_(1)
        return mean, variance


class Stepper:
    """A network with what it takes to train it, in one process of a run.

    What learns is a module of mel (b, f, n) and targets (b, ...) whose outputs the loss compares with the targets: the
    network itself, or a larger one around it, whose targets may say what to leave out.
    Parameters that do not require gradients stay as they are; if there are any, so do the statistics of the BatchNorm.
    Several processes take these statistics together, so that they train as one process would.
    """

    def __init__(
        self, config: LoopConfig, network: CED, loss: Loss, world: World, learner: nn.Module | None = None
    ) -> None:
        """Set up training.

        Args:
            config: optimiser, precision, and whether to compile.
            network: makes the mel; as its own learner it is of pooling "logit". It is moved to the device.
            loss: linear in its targets, if they are mixed.
            world: processes that average their gradients.
            learner: the module around the network that learns; None: the network.
        """
        self.network, self.loss, self.mode, self.device = network, loss, config.mode, world.device
        self._whole = (learner or network).to(world.device)  # all that is saved to go on from
        learning = [parameter for parameter in self._whole.parameters() if parameter.requires_grad]
        self._whole.train(len(learning) == len(list(self._whole.parameters())))
        self._learner: nn.Module = learner or _Scores(network)
        if world.size > 1:
            for name, layer in network.init_bn.named_children():
                if isinstance(layer, nn.BatchNorm1d):
                    setattr(network.init_bn, name, SharedBatchNorm.of(layer))
            devices = [self.device] if self.device.type == "cuda" else None
            self._learner = DistributedDataParallel(self._learner, device_ids=devices)
        if config.compile:
            self._learner.compile()
        self.optimizer = make_optimizer(config, learning, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half_type(self.mode, self.device) is torch.float16)
        self._fresh = self.network.training  # its BatchNorm may not have any statistics yet

    def step(self, batch: Batch, recipe: ViewRecipe, targets: Tensor, weights: Tensor | None, rate: float) -> Tensor:
        """Take one step.

        Args:
            batch: chunks, shifted already.
            recipe: how wide their masks may be.
            targets: (b, c), or whatever the learner takes.
            weights: (b,) for mixup; None: none.
            rate: the learning rate.

        Returns:
            The loss before the step, a scalar on the device. With fp16 a step of gradients that are not finite changes
            nothing.

        Raises:
            TrainingError: the GPU's memory is too small.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with _memory_for(len(targets)):
            mel, targets = self._inputs(batch, recipe, targets.to(self.device), weights)
            with autocast(self.mode, self.device):
                answers = self._learner(mel, targets)
            loss = self.loss(answers.float(), targets)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _inputs(
        self, batch: Batch, recipe: ViewRecipe, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the masked and mixed mel (b, f, n), and the targets, mixed as well."""
        waves, uniforms = batch.to_device(self.device)
        with torch.no_grad():
            mel = mask(self.network.front_end(waves), uniforms, recipe)
            if self._fresh:
                calibrate(self.network, mel)
                self._fresh = False
            if weights is not None:
                weights = weights.to(self.device)
                mel, targets = mixup(mel, weights), mixup(targets, weights)
        return mel, targets

    @property
    def _kind(self) -> dict[str, str]:
        """What the hardware and the installed packages have a say in, and a saved state depends on."""
        half = half_type(self.mode, self.device)
        return {"optimizer": type(self.optimizer).__name__, "precision": str(half or torch.float32)[len("torch.") :]}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return all that the next step depends on; the next step changes it in place."""
        return {
            "kind": self._kind,
            "network": self._whole.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from a former `state_dict`.

        Raises:
            TrainingError: it is of another optimiser or precision, as when the hardware is another.
        """
        if (before := state["kind"]) != self._kind:
            was, now = (f"{kind['optimizer']} in {kind['precision']}" for kind in (before, self._kind))
            raise TrainingError(f"begun with {was}, but here it would be {now}; resume on hardware like the first")
        self._whole.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@contextmanager
def _memory_for(items: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU's memory is too small for the {items} items of a step; a smaller batch_size needs less"
        ) from error


class _Scores(nn.Module):
    """A tagger as a learner, whose forward is what is distributed and compiled: it answers mel without its targets."""

    def __init__(self, network: CED) -> None:
        super().__init__()
        self.network = network

    def forward(self, mel: Tensor, targets: Tensor) -> Tensor:
        """Score (b, f, n) -> (b, c)."""
        return self.network.forward_mel(mel)
