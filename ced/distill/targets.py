"""Targets: stored top-k scores spread over all classes; and mixup of features and targets."""

import numpy as np
import torch
from torch import Tensor

from ced.config import Fill


def spread(
    values: Tensor, indexes: Tensor, num_classes: int, fill: Fill = "zero", generator: torch.Generator | None = None
) -> Tensor:
    """Spread the stored scores of a batch over all classes.

    With m the lowest stored score of a row, C classes and k stored scores, every other class gets: `zero` 0,
    `last_mean` m / (C - k), `last_half` m / 2, `last_random` U(0, 1) m (drawn for each class), `527` 1 / C.

    Args:
        values: (b, k) probabilities of any float type.
        indexes: (b, k) their classes, of any integer type.
        num_classes: C.
        fill: the value of classes outside the top k.
        generator: for `last_random`; on the device of `values`.

    Returns:
        (b, c) float32.
    """
    values = values.float()
    rows, topk = values.shape
    last = values.amin(dim=1, keepdim=True)
    if fill == "zero":
        rest = torch.zeros_like(last)
    elif fill == "last_mean":
        rest = last / max(num_classes - topk, 1)
    elif fill == "last_half":
        rest = last / 2
    elif fill == "last_random":
        rest = last * torch.rand((rows, num_classes), generator=generator, device=values.device)
    else:
        rest = torch.full_like(last, 1 / num_classes)
    return rest.expand(rows, num_classes).clone().scatter_(1, indexes.long(), values)


def mixup_weights(count: int, alpha: float, rng: np.random.Generator) -> Tensor:
    """Draw the weight of each item of a batch in its mixture, (b,) float32 from Beta(alpha, alpha)."""
    return torch.from_numpy(rng.beta(alpha, alpha, size=count).astype(np.float32))


def mixup(x: Tensor, weights: Tensor) -> Tensor:
    """Mix each item of a batch with its partner in the reversed batch: w x + (1 - w) partner.

    The losses used here are linear in the target, so the loss of mixed targets is the mixed loss.

    Args:
        x: (b, ...) masked mel features, or targets.
        weights: (b,) from `mixup_weights`.

    Returns:
        (b, ...), mixed.
    """
    weights = weights.reshape(-1, *[1] * (x.ndim - 1))
    return weights * x + (1 - weights) * x.flip(0)
