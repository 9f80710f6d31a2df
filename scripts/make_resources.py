"""Write the clips of resources/: one of each kind of file that taggers meet."""

from pathlib import Path

import numpy as np
import soundfile
import soxr

from ced.demo.sounds import generate
from ced.sound.audio import SAMPLE_RATE

CLIPS = [  # file, what sounds in each channel, seconds, rate
    ("bell_mono_16k.wav", ("Bell",), 2.5, 16_000),
    ("drum_mono_44k.wav", ("Drum",), 1.0, 44_100),
    ("siren_stereo_44k.flac", ("Siren", "Siren"), 1.0, 44_100),
    ("bark_mono_16k.flac", ("Bark",), 2.0, 16_000),
    ("rain_and_bark_stereo_44k.ogg", ("Rain", "Bark"), 12.0, 44_100),
    ("clock_mono_16k.ogg", ("Clock",), 4.0, 16_000),
]


def main() -> None:
    """Write the clips, the same ones every time."""
    folder = Path(__file__).parents[1] / "resources"
    folder.mkdir(exist_ok=True)
    for seed, (name, kinds, seconds, rate) in enumerate(CLIPS):
        rng = np.random.default_rng(seed)
        wave = np.stack([generate(kind, rng, seconds) for kind in kinds], axis=1)
        soundfile.write(folder / name, soxr.resample(wave, SAMPLE_RATE, rate, "HQ").clip(-1, 1), rate)


if __name__ == "__main__":
    main()
