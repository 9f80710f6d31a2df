"""One optimiser step: waves to masked mel, loss, gradients, new weights; the learning rate and the optimiser."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ced.config import Mode, Optimizer, OptimizerArgs
from ced.distill.dataset import Batch
from ced.distill.distributed import World, autocast, half_type
from ced.distill.targets import mixup
from ced.distill.views import ViewRecipe, mask
from ced.errors import TrainingError
from ced.model.mae import MaskedAutoencoder, error_of_hidden
from ced.model.vit import CED


def learning_rate(step: int, *, peak: float, warmup: int, total: int, decay_frac: float, cosine: bool) -> float:
    """Return the learning rate of a step (0, 1, ..., total - 1).

    It rises linearly from 0 to `peak` in `warmup` steps, then falls as half a cosine, to `decay_frac` * `peak` at the
    end of the last step; without `cosine` it stays at `peak`. The warm-up is included in the `total` steps.
    """
    if step < warmup:
        return peak * step / warmup
    if not cosine:
        return peak
    part = (step - warmup) / (total - warmup)
    return peak * (decay_frac + (1 - decay_frac) * (1 + math.cos(math.pi * part)) / 2)


def make_optimizer(
    name: Optimizer, args: OptimizerArgs, parameters: list[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """Make an optimiser; 8-bit Adam needs CUDA and bitsandbytes and is replaced by Adam without them."""
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW if name == "AdamW" else torch.optim.Adam
    if name == "Adam8bit" and device.type == "cuda" and find_spec("bitsandbytes"):
        from bitsandbytes.optim import Adam8bit

        kind = Adam8bit
    options: dict[str, Any] = {"lr": args.lr, "betas": args.betas, "eps": args.eps, "weight_decay": args.weight_decay}
    if device.type == "cpu":
        options["fused"] = True  # one pass over the weights instead of a dozen
    return kind(parameters, **options)


# BatchNorm ------------------------------------------------------------------------------------------------------------


def initialize_batchnorm(network: CED, mel: Tensor) -> None:
    """Set the statistics of a BatchNorm that has none to those of its first batch, mel (b, f, n), of all processes.

    Its momentum is low: from mean 0 and variance 1, the running statistics would need hundreds of steps to approach
    those of any audio, and validation, which uses them, would measure another network than the one being trained.
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
        (f,), (f,), and the number of values of each channel.
    """
    sums = torch.cat([x.sum((0, 2)), x.new_tensor([x.shape[0] * x.shape[2]])])
    dist.all_reduce(sums)
    mean, count = sums[:-1] / sums[-1], sums[-1]
    squares = (x - mean[:, None]).square().sum((0, 2))
    dist.all_reduce(squares)
    return mean, squares / count, float(count)


class SharedBatchNorm(nn.BatchNorm1d):
    """A BatchNorm with the statistics of a batch over all processes, on CPUs as well, unlike `nn.SyncBatchNorm`.

    It is a network's first layer, so neither its input nor the statistics need gradients.
    """

    @classmethod
    def of(cls, layer: nn.BatchNorm1d) -> "SharedBatchNorm":
        """Return a layer that shares the parameters and statistics of another."""
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
        """Return the statistics of a batch, and update the running ones."""
        with torch.no_grad():
            mean, variance, count = shared_statistics(x)
            momentum = self.momentum or 0.0
            self.get_buffer("running_mean").lerp_(mean, momentum)
            self.get_buffer("running_var").lerp_(variance * (count / (count - 1)), momentum)
            self.get_buffer("num_batches_tracked").add_(1)
        return mean, variance


# Losses ---------------------------------------------------------------------------------------------------------------


class TargetLoss(nn.Module):
    """The loss of a network's logits against targets."""

    def __init__(self, network: CED, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take a network of pooling "logit", and a loss of logits and targets (b, c) that is linear in the targets."""
        super().__init__()
        self.learner, self.loss = network, loss

    def forward(self, mel: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, a scalar: mel (b, f, n), targets (b, c)."""
        return self.loss(self.learner.forward_mel(mel).float(), targets)


class ReconstructionLoss(nn.Module):
    """The error of a masked autoencoder on the patches that are hidden from it."""

    def __init__(self, autoencoder: MaskedAutoencoder) -> None:
        super().__init__()
        self.learner = autoencoder

    def forward(self, mel: Tensor, hidden: Tensor) -> Tensor:
        """Return the loss, a scalar: mel (b, f, n), hidden bool (b, tokens)."""
        return error_of_hidden(self.learner(mel, hidden).float(), hidden)


Objective = TargetLoss | ReconstructionLoss  # its `learner` is trained and saved


# A step ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """The items of a step in one process: with targets, or in masked pre-training with patches to hide."""

    chunks: Batch  # shifted already
    recipe: ViewRecipe  # how wide their masks may be
    targets: Tensor | None = None  # (b, c)
    hidden: Tensor | None = None  # bool (b, tokens)
    mixup: Tensor | None = None  # (b,) weights; None: no mixup


class Stepper:
    """A network, its loss and its optimiser, in one process of a run.

    Parameters that do not require gradients are not changed; if there are any, neither are the statistics of the
    BatchNorm. Several processes share these statistics, so that they train as one process would.
    """

    def __init__(
        self,
        network: CED,
        objective: Objective,
        world: World,
        *,
        optimizer: Optimizer = "Adam",
        optimizer_args: OptimizerArgs | None = None,
        mode: Mode = "off",
        compiled: bool = False,
    ) -> None:
        """Set up training.

        Args:
            network: computes the mel; the learner of the objective, or a part of it. It is moved to the device.
            objective: the loss to minimise.
            world: processes that average their gradients, and the device.
            optimizer: its name.
            optimizer_args: its arguments; None: the defaults.
            mode: precision of the forward pass.
            compiled: compile the objective with torch.compile.
        """
        self.network, self.mode, self.device = network, mode, world.device
        self._learner = objective.learner.to(world.device)  # its weights are saved in the state
        trained = [parameter for parameter in self._learner.parameters() if parameter.requires_grad]
        self._learner.train(len(trained) == len(list(self._learner.parameters())))
        self._initialize_batchnorm = network.training  # before the first step, if its BatchNorm has no statistics
        self._objective: nn.Module = objective
        if world.size > 1:
            for name, layer in network.init_bn.named_children():
                if isinstance(layer, nn.BatchNorm1d):
                    setattr(network.init_bn, name, SharedBatchNorm.of(layer))
            devices = [self.device] if self.device.type == "cuda" else None
            self._objective = DistributedDataParallel(objective, device_ids=devices)
        if compiled:
            self._objective.compile()
        self.optimizer = make_optimizer(optimizer, optimizer_args or OptimizerArgs(), trained, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half_type(self.mode, self.device) is torch.float16)

    def step(self, batch: TrainingBatch, rate: float) -> Tensor:
        """Take one step at a learning rate: front end and masks, mixup, loss, gradients, new weights.

        Returns:
            The loss before the step, a scalar on the device. With fp16, a step whose gradients are not finite changes
            nothing.

        Raises:
            TrainingError: the GPU's memory is too small.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with _out_of_memory_explained(len(batch.chunks.items)):
            waves, uniforms = batch.chunks.to_device(self.device)
            with torch.no_grad():
                mel = mask(self.network.front_end(waves), uniforms, batch.recipe)
                if self._initialize_batchnorm:
                    initialize_batchnorm(self.network, mel)
                    self._initialize_batchnorm = False
            loss = self._loss(mel, batch)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _loss(self, mel: Tensor, batch: TrainingBatch) -> Tensor:
        """Return the loss of mel (b, f, n), mixed where the batch has weights for mixup."""
        targets = None if batch.targets is None else batch.targets.to(self.device)
        if batch.mixup is not None and targets is not None:
            weights = batch.mixup.to(self.device)
            mel, targets = mixup(mel, weights), mixup(targets, weights)
        with autocast(self.mode, self.device):
            if batch.hidden is not None:
                loss: Tensor = self._objective(mel, hidden=batch.hidden.to(self.device))
            else:
                loss = self._objective(mel, targets=targets)
        return loss

    @property
    def _kind(self) -> dict[str, str]:
        """The optimiser and precision in use, which hardware and installed packages decide with the settings."""
        half = half_type(self.mode, self.device)
        return {"optimizer": type(self.optimizer).__name__, "precision": str(half or torch.float32)[len("torch.") :]}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return everything that the next step depends on; that step changes it in place."""
        return {
            "kind": self._kind,
            "network": self._learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            TrainingError: the optimiser or the precision differs, as it does on other hardware.
        """
        if (before := state["kind"]) != self._kind:
            was, now = (f"{kind['optimizer']} in {kind['precision']}" for kind in (before, self._kind))
            raise TrainingError(f"begun with {was}, but here it would be {now}; resume on hardware like the first")
        self._learner.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@contextmanager
def _out_of_memory_explained(items: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU's memory is too small for the {items} items of a step; a smaller batch_size needs less"
        ) from error
