"""Generated sounds: eight classes, each with its own random parameters, over background noise."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from ced.sound.audio import SAMPLE_RATE
from ced.sound.tables import write_table

_Wave = NDArray[np.float64]
_Rng = np.random.Generator
FOLDS = 5


def _seconds(samples: int) -> _Wave:
    return np.arange(samples) / SAMPLE_RATE


def _tone(frequency: _Wave | float, samples: int) -> _Wave:
    """Return a sine whose frequency (Hz) may change from sample to sample, (t,)."""
    steps = np.broadcast_to(frequency, (samples,)) / SAMPLE_RATE
    return np.sin(2 * np.pi * np.cumsum(steps))


def _harmonics(frequency: _Wave | float, samples: int, strengths: Sequence[float]) -> _Wave:
    """Return a tone and its overtones, (t,)."""
    out = np.zeros(samples)
    for part, strength in enumerate(strengths, start=1):
        out += strength * _tone(part * frequency, samples)
    return out


def _noise(rng: _Rng, samples: int, low: float, high: float) -> _Wave:
    """Return noise of one band (Hz) and unit power, (t,)."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum[(frequencies < low) | (frequencies > high)] = 0
    wave: _Wave = np.fft.irfft(spectrum, samples)
    wave /= wave.std() + 1e-9
    return wave


def _repeat(rng: _Rng, samples: int, every: float, jitter: float, make: Callable[[], _Wave]) -> _Wave:
    """Return events from `make`, one every `every` seconds, varied by up to `jitter` times that, (t,)."""
    out = np.zeros(samples)
    start = rng.uniform(0, every)
    while (at := int(start * SAMPLE_RATE)) < samples:
        event = make()[: samples - at]
        out[at : at + len(event)] += event
        start += every * (1 + rng.uniform(-jitter, jitter))
    return out


def _siren(rng: _Rng, samples: int) -> _Wave:
    centre, depth, rate = rng.uniform(600, 1300), rng.uniform(0.15, 0.45), rng.uniform(0.4, 2.5)
    sweep = np.sin(2 * np.pi * (rate * _seconds(samples) + rng.uniform()))
    if rng.random() < 0.5:  # two tones instead of a glide
        sweep = np.sign(sweep)
    return _harmonics(centre * (1 + depth * sweep), samples, (1.0, 0.4, 0.2))


def _bell(rng: _Rng, samples: int) -> _Wave:
    pitch, length = rng.uniform(300, 1200), rng.uniform(0.3, 1.2)

    def stroke() -> _Wave:
        out, time = np.zeros(samples), _seconds(samples)
        for part in (0.5, 1.0, 1.19, 1.5, 2.0, 2.76, 4.1):  # about those of a church bell
            out += rng.uniform(0.3, 1) * np.exp(-time * part / length) * _tone(pitch * part, samples)
        return out

    return _repeat(rng, samples, rng.uniform(0.5, 1.5), 0.1, stroke)


def _chirp(rng: _Rng, samples: int) -> _Wave:
    low, span, length = rng.uniform(1800, 4000), rng.uniform(0.2, 0.7), rng.uniform(0.05, 0.2)
    direction = rng.choice([-1, 1])

    def call() -> _Wave:
        ramp = np.linspace(0, 1, int(length * SAMPLE_RATE))[::direction]
        return np.sin(np.pi * ramp) * _tone(low * (1 + span * ramp), len(ramp))

    return _repeat(rng, samples, rng.uniform(0.15, 0.6), 0.4, call)


def _engine(rng: _Rng, samples: int) -> _Wave:
    speed = rng.uniform(30, 110) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.1, 0.8) * _seconds(samples)))
    fading = rng.uniform(0.3, 1)
    hum = _harmonics(speed, samples, [part**-fading for part in range(1, 12)])
    hiss: _Wave = 0.5 * _noise(rng, samples, 80, 1200) * (1 + _tone(speed, samples))
    return hum + hiss


def _rain(rng: _Rng, samples: int) -> _Wave:
    wash = _noise(rng, samples, rng.uniform(300, 1500), rng.uniform(4000, 8000))
    drops = (rng.random(samples) < rng.uniform(0.0005, 0.004)) * rng.exponential(8, samples)
    splashes: _Wave = np.convolve(drops, np.exp(-np.arange(80) / 12), mode="same")
    return wash + splashes


def _clock(rng: _Rng, samples: int) -> _Wave:
    pitch, decay = rng.uniform(1500, 5000), rng.uniform(0.003, 0.012)
    time = _seconds(int(0.06 * SAMPLE_RATE))
    strengths = iter([1.0, rng.uniform(0.3, 1.0)] * samples)  # tick, tock

    def tick() -> _Wave:
        ring: _Wave = np.exp(-time / decay) * (_tone(pitch, len(time)) + 0.5 * rng.standard_normal(len(time)))
        return next(strengths) * ring

    return _repeat(rng, samples, rng.uniform(0.2, 0.6), 0.0, tick)


def _bark(rng: _Rng, samples: int) -> _Wave:
    pitch, length, formant = rng.uniform(250, 600), rng.uniform(0.1, 0.25), rng.uniform(800, 1800)

    def bark() -> _Wave:
        count = int(length * SAMPLE_RATE)
        rise = np.sin(np.pi * np.linspace(0, 1, count) ** 0.5)
        glide = pitch * (1 + 0.5 * rise) * rng.uniform(0.9, 1.1)
        breath = 2 * _noise(rng, count, 0.6 * formant, 1.6 * formant)
        voice: _Wave = rise * (_harmonics(glide, count, [1.0] * 7) + breath)
        return voice

    return _repeat(rng, samples, rng.uniform(0.35, 0.9), 0.3, bark)


def _drum(rng: _Rng, samples: int) -> _Wave:
    pitch, decay, snare = rng.uniform(60, 220), rng.uniform(0.04, 0.15), rng.uniform(0.1, 0.8)

    def hit() -> _Wave:
        time = _seconds(int(0.4 * SAMPLE_RATE))
        skin = _tone(pitch * (1 + np.exp(-time / 0.03)), len(time))
        struck: _Wave = np.exp(-time / decay) * (skin + snare * rng.standard_normal(len(time)))
        return struck

    return _repeat(rng, samples, rng.uniform(0.2, 0.5), 0.2, hit)


KINDS: dict[str, Callable[[_Rng, int], _Wave]] = {
    "Siren": _siren,
    "Bell": _bell,
    "Chirp": _chirp,
    "Engine": _engine,
    "Rain": _rain,
    "Clock": _clock,
    "Bark": _bark,
    "Drum": _drum,
}


def generate(kind: str, rng: _Rng, seconds: float) -> NDArray[np.float32]:
    """Return one sound of a class of `KINDS`, (t,) at 16 kHz, peak below 1.

    The sound is 0 to 20 dB louder than noise of a random band, and has a random level.
    """
    samples = round(seconds * SAMPLE_RATE)
    sound = KINDS[kind](rng, samples)
    noise = _noise(rng, samples, rng.uniform(20, 400), rng.uniform(1500, 8000))
    mixed = sound / (sound.std() + 1e-9) + noise * 10 ** (-rng.uniform(0, 20) / 20)
    loud: _Wave = mixed / np.abs(mixed).max() * 10 ** (-rng.uniform(1, 25) / 20)
    return loud.astype(np.float32)


def write_sounds(folder: Path, *, clips_per_class: int, seconds: float, seed: int) -> None:
    """Write labelled sounds: `folder`/audio/*.wav and, once all are written, `folder`/meta.tsv.

    The table has the columns filename, fold (1 to 5), label and name, as the one of ESC-10 here.
    """
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    table: dict[str, list[str]] = {"filename": [], "fold": [], "label": [], "name": []}
    for label, kind in enumerate(KINDS):
        for number in range(clips_per_class):
            name = f"{kind.lower()}-{number}.wav"
            soundfile.write(folder / "audio" / name, generate(kind, rng, seconds), SAMPLE_RATE)
            for column, value in zip(table, (name, str(number % FOLDS + 1), str(label), kind), strict=True):
                table[column].append(value)
    write_table(folder / "meta.tsv", table)
