"""Draw docs/views.png: one view of one recording in the features of three taggers.

Run as `python -m scripts.draw_views`; needs the extras train and hf.
"""

from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from transformers import ASTFeatureExtractor

from ced.config import check, read_file
from ced.distill.hf_teacher import layout_of
from ced.distill.onnx_teacher import GraphSettings
from ced.distill.spectrogram import Spectrogram, resample
from ced.distill.views import SoundView, ViewRecipe, draw, mask, mask_uniforms, shift_into, sound_views
from ced.model.frontend import LogMel
from ced.sound.audio import SAMPLE_RATE, load
from ced.sound.features import mel_edges

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "views.png"
SAMPLES = 10 * SAMPLE_RATE
SEED = 1  # both bands can be seen
TICKS = (250, 500, 1_000, 2_000, 4_000, 8_000, 15_000)  # Hz


def show(
    axes: Axes,
    title: str,
    features: torch.Tensor,
    times: NDArray[np.float64],
    hertz: NDArray[np.float64],
    view: SoundView,
) -> None:
    """Draw a spectrogram, (f, n), with the bands of the view as lines."""
    inside = times <= 10
    corners = (times[inside][0], times[inside][-1], -0.5, len(hertz) - 0.5)
    image = features[:, torch.from_numpy(inside)]
    axes.imshow(image, origin="lower", aspect="auto", extent=corners, interpolation="nearest", cmap="magma")
    ticks = [tick for tick in TICKS if tick <= hertz[-1]]
    axes.set_yticks([float(np.interp(tick, hertz, np.arange(len(hertz)))) for tick in ticks], [f"{t:,}" for t in ticks])
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_ylabel("Hz", fontsize=8)
    axes.tick_params(labelsize=8)
    for fraction in view.time or ():
        axes.axvline(fraction * 10, color="white", linestyle=":", linewidth=1)
    for frequency in view.hertz or ():
        axes.axhline(
            float(np.interp(frequency, hertz, np.arange(len(hertz)))), color="white", linestyle=":", linewidth=1
        )


def main() -> None:
    """Draw the three panels."""
    recipe, settings = ViewRecipe(), check(GraphSettings, read_file(ROOT / "examples" / "mn04_as.yaml"), "mn04_as.yaml")
    recording = np.resize(load(ROOT / "resources" / "speech.ogg"), SAMPLES)  # repeated to ten seconds
    drawn = draw(recipe, SEED, SAMPLES)
    wave = np.empty(SAMPLES, np.float32)
    shift_into(wave, recording, drawn.shift)
    uniforms, waves = mask_uniforms([drawn]), torch.from_numpy(wave)[None]
    (view,) = sound_views(uniforms, recipe, SAMPLES)
    figure, (first, second, third) = pyplot.subplots(3, 1, figsize=(8, 7.5), layout="constrained", sharex=True)
    mel = mask(LogMel()(waves), uniforms, recipe)[0]
    show(first, "CED: 64 bands, 16 kHz", mel, np.arange(mel.shape[1]) / 100, mel_edges(64, 0, 8_000)[1:-1], view)
    ast = layout_of(ASTFeatureExtractor())
    assert settings.features is not None
    assert ast is not None
    for axes, title, other in (
        (second, "EfficientAT: 128 bands, 32 kHz", Spectrogram(settings.features, settings.rate)),
        (third, "AST: 128 bands, 16 kHz", ast),
    ):
        here = resample(waves, SAMPLE_RATE, other.rate)
        features = other.mask(other(here), [view], here.shape[1])[0]
        times = other.times(features.shape[1], here.shape[1]).numpy() * 10
        show(axes, title, features, times, other.hertz.numpy(), view)
    third.set_xlabel("seconds", fontsize=8)
    with BytesIO() as full:
        figure.savefig(full, dpi=90)
        Image.open(full).convert("RGB").quantize(128).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
