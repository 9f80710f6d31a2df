"""Sound as every model hears it: mono float32 samples at 16 kHz, whole, block by block or in windows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError
from ced.sound.decode import AUDIO_SUFFIXES, SoundBytes, Source, join, name_of, opened, to_float

__all__ = [
    "AUDIO_SUFFIXES",
    "SAMPLE_RATE",
    "SoundBytes",
    "Source",
    "Window",
    "cut",
    "load",
    "load_stored",
    "name_of",
    "resampled",
    "stream",
    "windows",
]

SAMPLE_RATE = 16_000
_LOAD_BLOCK = 120.0  # seconds; most files are one block


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a sound."""

    start: float  # seconds
    end: float  # seconds
    wave: NDArray[np.float32]  # (t,) at 16 kHz


def load(source: Source) -> NDArray[np.float32]:
    """Read a whole sound.

    Integers are divided by their full scale, floats kept as they are; channels are averaged, then resampled (soxr HQ).

    Args:
        source: a path, an http(s) address, the bytes of a file, a binary file object, or (samples, rate) with samples
            (t,) or (t, channels) of any integer or float type.

    Returns:
        (t,) float32 at 16 kHz, nominally in [-1, 1], at least one sample.

    Raises:
        AudioError: it is missing, unreadable, cut short, of an unknown kind, without samples, or has samples that are
            not finite, or far beyond [-1, 1].
    """
    return join(list(stream(source, _LOAD_BLOCK)))


def load_stored(source: Source, stereo: bool = False) -> NDArray[np.int16] | NDArray[np.float32]:
    """Read a whole sound as `load` does, but leave 16-bit samples that need no work as the int16 they are.

    Args:
        source: as for `load`.
        stereo: keep both channels of a two-channel source; other numbers of channels are averaged all the same.

    Returns:
        (t,), or (t, 2) of a two-channel source with `stereo`, at 16 kHz: int16 if the source is 16-bit and needed
        neither averaging nor resampling, else float32.

    Raises:
        AudioError: as for `load`.
    """
    with opened(source, _LOAD_BLOCK) as sound:
        samples = join(list(sound.blocks))
    if sound.channels == 1:
        samples = samples[:, 0]
    elif sound.channels != 2 or not stereo:
        samples = _mean(to_float(samples))
    if sound.rate != SAMPLE_RATE:
        samples = soxr.resample(to_float(samples), sound.rate, SAMPLE_RATE, "HQ")
    if not len(samples):
        raise _too_short(sound.name)
    return samples


def stream(source: Source, block_seconds: float = 10.0) -> Iterator[NDArray[np.float32]]:
    """Read a sound block by block, in memory bounded by the block: the samples of `load`, bit for bit.

    Args:
        source: as for `load`.
        block_seconds: how much is decoded at a time; the blocks that come out are about as long, and never empty.

    Yields:
        (t,) float32 at 16 kHz.

    Raises:
        AudioError: as for `load`, when the reading comes to the fault; blocks before it are out by then.
    """
    found = False
    with opened(source, block_seconds) as sound:
        for wave in resampled(sound.blocks, sound.rate):
            found = True
            yield wave
    if not found:
        raise _too_short(sound.name)


def resampled(blocks: Iterable[NDArray[Any]], rate: int) -> Iterator[NDArray[np.float32]]:
    """Bring the blocks of one sound to what models hear; what comes out is never empty.

    Args:
        blocks: samples (t, channels) of any integer or float type.
        rate: their sampling rate.

    Yields:
        (t,) float32 at 16 kHz, about as long as the blocks; a block is heard a few milliseconds late.
    """
    resampler = None
    if rate != SAMPLE_RATE:
        resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")
    for block in blocks:
        wave = _mean(to_float(block))
        if resampler is not None:
            wave = resampler.resample_chunk(wave)
        if len(wave):
            yield wave
    if resampler is not None:
        rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        if len(rest):
            yield rest


def windows(source: Source, length: float, hop: float | None = None) -> Iterator[Window]:
    """Cut a sound into windows, in bounded memory and without padding.

    Windows start every `hop` seconds. The last is as short as what is left; none only repeats what is already in one.

    Args:
        source: as for `load`.
        length: seconds a window.
        hop: seconds from one start to the next; None means `length`.

    Raises:
        AudioError: as for `load`.
        ConfigError: `length` or `hop` is shorter than one sample; raised at once.
    """
    return cut(stream(source), length, hop)


def cut(blocks: Iterable[NDArray[np.float32]], length: float, hop: float | None = None) -> Iterator[Window]:
    """Cut what is read block by block into windows, each as soon as its last sample is there; all as `windows` has it.

    Args:
        blocks: (t,) at 16 kHz, of any lengths.
        length, hop: as for `windows`.
    """
    hop = length if hop is None else hop
    for what, seconds in (("length", length), ("hop", hop)):
        if not 1 <= seconds * SAMPLE_RATE < 2**62:
            raise ConfigError(f"the window {what} is {seconds} s; it must be above 0, at least 1/{SAMPLE_RATE}")
    return _windows(blocks, round(length * SAMPLE_RATE), round(hop * SAMPLE_RATE))


def _windows(blocks: Iterable[NDArray[np.float32]], size: int, step: int) -> Iterator[Window]:
    buffer = np.zeros(0, np.float32)
    held = 0  # the sample that the buffer begins with
    start = 0  # the sample that the next window begins with
    seen = 0  # samples before this one are in a window already
    for block in blocks:
        buffer = np.concatenate((buffer, block))
        while held + len(buffer) >= start + size:
            yield _window(buffer[start - held : start - held + size], start)
            seen = start + size
            start += step
        drop = min(start - held, len(buffer))
        buffer, held = buffer[drop:], held + drop
    if held + len(buffer) > max(start, seen):
        yield _window(buffer[start - held :], start)


def _window(wave: NDArray[np.float32], start: int) -> Window:
    return Window(start / SAMPLE_RATE, (start + len(wave)) / SAMPLE_RATE, wave)


def _mean(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average channels, (t, channels) -> (t,)."""
    channels = samples.shape[1]
    if channels == 1:
        return samples[:, 0]
    mono = samples[:, 0] + samples[:, 1]  # by columns: numpy's mean over a short last axis is 30 times slower
    for channel in range(2, channels):
        mono += samples[:, channel]
    mono /= channels
    return mono


def _too_short(name: str) -> AudioError:
    return AudioError(f"{name} is too short to leave a sample at {SAMPLE_RATE} Hz")
