"""Views: one random augmentation of a chunk, drawn from one seed, so that teacher and student see the same picture.

The order of the draws is the published one, so that published stores replay: whether to shift, by how much, then the
two uniforms that place both masks. Nothing else in distillation is random but mixup.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ced.config import SpecTransforms, WavTransforms

SHIFT_PROBABILITY = 0.5


@dataclass(frozen=True)
class ViewRecipe:
    """What a view may do to a chunk; None leaves that part out."""

    shift: tuple[float, float] | None = (-0.5, 0.5)  # lowest and highest shift, as fractions of the chunk
    time_mask: int | None = 192  # widest time mask, frames
    freq_mask: int | None = 24  # widest frequency mask, mel bins


NO_VIEW = ViewRecipe(shift=None, time_mask=None, freq_mask=None)


def recipe_of(wave: WavTransforms, spec: SpecTransforms) -> ViewRecipe:
    """Return the recipe that a configuration describes."""
    return ViewRecipe(
        shift=(wave.Shift.min_shift, wave.Shift.max_shift) if wave.Shift else None,
        time_mask=spec.TimeMasking.time_mask_param if spec.TimeMasking else None,
        freq_mask=spec.FrequencyMasking.freq_mask_param if spec.FrequencyMasking else None,
    )


@dataclass(frozen=True)
class View:
    """What one seed drew: how far the chunk is rolled and where its masks lie."""

    shift: int  # samples; those that leave one end enter at the other
    u1: float  # width of both masks, as a part of the widest
    u2: float  # place of both masks, as a part of the room they have


def draw(recipe: ViewRecipe, seed: int, samples: int, generator: torch.Generator | None = None) -> View:
    """Draw the view of a chunk of `samples` samples from `seed`.

    A `generator` may be passed to save making one; it is reseeded, the global state of torch is never touched.
    """
    generator = (generator or torch.Generator()).manual_seed(seed)
    shift = 0
    if recipe.shift is not None:
        apply = torch.bernoulli(torch.full((1,), SHIFT_PROBABILITY), generator=generator)
        if apply:
            low, high = (round(part * samples) for part in recipe.shift)
            shift = int(torch.randint(low, high + 1, (1,), dtype=torch.int32, generator=generator))
    u1 = float(torch.rand(1, generator=generator))
    u2 = float(torch.rand(1, generator=generator))
    return View(shift, u1, u2)


def shift_into(out: NDArray[Any], wave: NDArray[Any], shift: int) -> None:
    """Write `wave`, rolled to the right by `shift` samples, into the start of `out`, (t,) -> (>= t,)."""
    samples = len(wave)
    cut = shift % samples if samples else 0
    out[cut:samples] = wave[: samples - cut]
    out[:cut] = wave[samples - cut :]


def mask_uniforms(views: Sequence[View]) -> Tensor:
    """Return the draws that place the masks of a batch, (b, 2) float32."""
    return torch.tensor([[view.u1, view.u2] for view in views], dtype=torch.float32).reshape(-1, 2)


def mask(mel: Tensor, uniforms: Tensor, recipe: ViewRecipe) -> Tensor:
    """Fill one band of frames and one of mel bins of each clip with 0 dB.

    With u1, u2 a clip's uniforms and P the widest mask: width w = u1 P, start = floor(u2 (size - w)),
    end = start + floor(w); time first, then frequency.

    Args:
        mel: (b, f, n) dB features, left as they are.
        uniforms: (b, 2) from `mask_uniforms`, on the device of `mel`.
        recipe: how wide masks may be.

    Returns:
        (b, f, n), masked.
    """
    for axis, widest in ((2, recipe.time_mask), (1, recipe.freq_mask)):
        if widest is None:
            continue
        size = mel.shape[axis]
        width = uniforms[:, 0] * widest
        start = (uniforms[:, 1] * (size - width)).floor()
        end = start + width.floor()
        places = torch.arange(size, device=mel.device)
        inside = (places >= start[:, None]) & (places < end[:, None])  # (b, size)
        mel = mel.masked_fill(inside.unsqueeze(3 - axis), 0.0)
    return mel
