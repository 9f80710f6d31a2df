"""The optimiser and its learning rate."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ced.config import LoopConfig


def learning_rate(step: int, *, peak: float, warmup: int, total: int, decay_frac: float, cosine: bool) -> float:
    """Return the learning rate of a step (0, 1, ..., total - 1).

    It rises in a line from 0 to `peak` in `warmup` steps, then falls as half a cosine, to `decay_frac` * `peak` at the
    end of the last step; without `cosine` it stays.
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
    return kind(parameters, **options)
