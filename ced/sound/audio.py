"""Any sound as models take it: mono float32 samples at 16 kHz, whole, block by block, or in windows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError
from ced.sound.decode import AUDIO_SUFFIXES, SoundBytes, Source, checked, name_of, open_source, to_float
from ced.sound.features import MIN_SAMPLES, SAMPLE_RATE
from ced.sound.reading import MOST_CHANNELS, Block, Opened, Reading, join_blocks, mean_of_channels

__all__ = [
    "AUDIO_SUFFIXES",
    "SAMPLE_RATE",
    "TAILS",
    "Channel",
    "Mix",
    "Sound",
    "SoundBytes",
    "Source",
    "Tail",
    "Window",
    "check_channel",
    "check_windows",
    "cut_windows",
    "load",
    "load_stored",
    "name_of",
    "open_sound",
    "resampled",
    "stream",
]

Channel = str | int  # "mean", "left", "right", or a number from 1
Tail = Literal["aligned", "short"]
TAILS: tuple[Tail, ...] = ("aligned", "short")
_SIDES = {"left": 1, "right": 2}
_BLOCK, _LOAD_BLOCK = 10.0, 120.0  # seconds; for `load`, most files are one block
# The mean of n independent channels has 1/n of their power; far less means that they are in opposite phase.
_CANCELLED = 0.06
_SILENCE = 1e-10  # power, -100 dB; quieter channels are not judged


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a sound.

    Attributes:
        start, end: seconds.
        wave: (t,) float32 at 16 kHz.
        new: seconds; sound before it is in earlier windows, too.
    """

    start: float
    end: float
    wave: NDArray[np.float32]
    new: float = 0.0


class Sound:
    """A sound that is open for reading, from `open_sound`.

    Attributes:
        name: used in messages and results.
        rate: of the file, in Hz.
        channels: of the file.
    """

    def __init__(self, opened: Opened, reading: Reading, channel: Channel, strict: bool, block_seconds: float) -> None:
        self.name, self.rate, self.channels = reading.name, opened.rate, opened.channels
        self._opened, self._reading = opened, reading
        self._mix, self._strict, self._block_seconds = Mix(channel, reading.name), strict, block_seconds

    @property
    def warnings(self) -> list[str]:
        """Problems found so far, a phrase each, without the name; the list grows while the sound is read."""
        return self._reading.warnings

    def log_warnings(self, name: str | None = None) -> None:
        """Log the problems, and what can be done about them, under the name of the sound or another."""
        self._reading.log_warnings(name or self.name)

    @property
    def expected_seconds(self) -> float | None:
        """The length of the sound according to its header; None if the header gives none, or is not read yet."""
        return self._reading.expected_seconds

    @property
    def seconds(self) -> float:
        """Seconds decoded so far."""
        return self._reading.seconds

    @property
    def complete(self) -> bool:
        """False once the sound is known to be cut short, possibly only after the last block."""
        return not self._reading.broken

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Decode the sound block by block, once, in bounded memory.

        Yields:
            (t,) float32 at 16 kHz, none empty; together at least one sample.

        Raises:
            AudioError: it cannot be decoded, has no samples or invalid ones, or, with `strict`, is cut short. Blocks
                before the fault are yielded first.
            TooLongError, ClosedError: as for `open_sound`.
        """
        samples = 0
        blocks = self._opened.blocks(self._opened.frames(self._block_seconds))
        for wave in resampled(_checked_at_end(checked(blocks, self._reading), self._reading, self._strict), self._mix):
            samples += len(wave)
            yield wave
        if not samples:
            raise _too_short(self.name)
        if samples < MIN_SAMPLES:
            self._reading.warn(f"only {samples / SAMPLE_RATE:.3f} s long, too short to be tagged reliably")
        if (cancelled := self._mix.cancelled()) is not None:
            self._reading.warn(cancelled)


@contextmanager
def open_sound(
    source: Source,
    *,
    channel: Channel = "mean",
    strict: bool = False,
    budget: int | None = None,
    cancelled: Callable[[], bool] | None = None,
    block_seconds: float = _BLOCK,
) -> Iterator[Sound]:
    """Open a sound for reading block by block, and close it at the end of the `with` block.

    Integers are divided by their full scale, floats kept as they are; channels are averaged, or one is taken, then
    resampled to 16 kHz (soxr HQ).

    Args:
        source: a path of a regular file, SHARD!MEMBER (`ced.sound.shards`), an address in a store (`ced.remote`), an
            http(s) address, the bytes of a file, a binary file object, or (samples, rate) with samples (t,) or
            (t, channels) of any integer or float type.
        channel: "mean" of all channels, "left", "right", or the number of a channel, from 1. "mean" adds a warning
            where the channels cancel each other.
        strict: refuse a sound that is cut short; otherwise the rest is read, `complete` becomes False, and a warning
            reports the missing part.
        budget: the most samples x channels to decode. Seconds do not measure the work: one second of 8 channels
            at 700 kHz costs as much as two minutes of one CD channel.
        cancelled: called for each decoded block (at most a few tenths of a second of work) in the reading thread;
            when it returns True, reading ends with ClosedError.
        block_seconds: seconds to decode at a time; fewer where that would take more than 16 MiB.

    Raises:
        AudioError: the sound is missing, not a regular file, unreadable, of an unknown kind, or has a sampling rate
            outside 1,000-768,000 Hz, more than 64 channels, or no channel of that number; see also `Sound.blocks`.
        ConfigError: `channel` is not one of those above.
        TooLongError: (while reading) the budget is exceeded, or the sound has more than 2**27 samples and more than
            2,560 for each byte of its file, as decompression bombs have.
        ClosedError: (while reading) `cancelled` returned True.
    """
    number = check_channel(channel)
    reading = Reading(name_of(source), budget, cancelled=cancelled)
    with ExitStack() as stack:
        opened = open_source(source, reading, stack)
        if number is not None:
            _check_number(number, opened.channels, reading.name)
        yield Sound(opened, reading, channel, strict, block_seconds)


def check_channel(channel: Channel, others: Sequence[str] = ()) -> int | None:
    """Return the number of a channel, from 1; None for the mean of all.

    Args:
        channel: "mean", "left", "right", or a number, also as text.
        others: further values that the caller allows, for the message.

    Raises:
        ConfigError: it is not "mean", "left", "right" or a number from 1 to 64.
    """
    if channel == "mean":
        return None
    number = _SIDES.get(str(channel), channel)
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 9:
        number = int(number)
    if not isinstance(number, int) or not 1 <= number <= MOST_CHANNELS:
        allowed = ", ".join(["mean", "left", "right", *others])
        raise ConfigError(f"the channel is {channel!r}; it must be {allowed} or a number from 1")
    return number


def load(source: Source, *, channel: Channel = "mean", strict: bool = True) -> NDArray[np.float32]:
    """Read a whole sound; its problems are logged as warnings.

    Args:
        source, channel, strict: as for `open_sound`.

    Returns:
        (t,) float32 at 16 kHz, nominally in [-1, 1], at least one sample.

    Raises:
        AudioError: as for `open_sound`, or its samples are not finite, or far outside [-1, 1].
        ConfigError: as for `open_sound`.
    """
    return join_blocks(list(stream(source, _LOAD_BLOCK, channel=channel, strict=strict)))


def load_stored(source: Source, stereo: bool = False) -> NDArray[np.int16] | NDArray[np.float32]:
    """Read a whole sound as `load` does, but keep 16-bit samples as int16 where nothing has to be computed.

    Args:
        source: as for `open_sound`.
        stereo: keep both channels of a two-channel source; any other number of channels is averaged.

    Returns:
        (t,), or (t, 2) for a two-channel source with `stereo`, at 16 kHz: int16 if the source is 16-bit and needs
        neither averaging nor resampling, else float32.

    Raises:
        AudioError: as for `load`, also for a sound that is cut short.
    """
    reading = Reading(name_of(source))
    with ExitStack() as stack:
        opened = open_source(source, reading, stack)
        blocks = opened.blocks(opened.frames(_LOAD_BLOCK))
        pieces = list(_checked_at_end(checked(blocks, reading), reading, strict=True))
    reading.log_warnings(reading.name)
    rate, channels = pieces[0].rate, opened.channels
    if any((piece.rate, piece.samples.shape[1]) != (rate, channels) for piece in pieces):
        samples: NDArray[Any] = join_blocks(list(resampled(pieces, Mix("mean", reading.name))))
    else:
        samples = join_blocks([piece.samples for piece in pieces])
        if channels == 1:
            samples = samples[:, 0]
        elif channels != 2 or not stereo:
            samples = mean_of_channels(to_float(samples))
        if rate != SAMPLE_RATE:
            samples = soxr.resample(to_float(samples), rate, SAMPLE_RATE, "HQ")
    if not len(samples):
        raise _too_short(reading.name)
    return samples


def stream(
    source: Source, block_seconds: float = _BLOCK, *, channel: Channel = "mean", strict: bool = True
) -> Iterator[NDArray[np.float32]]:
    """Read a sound block by block, in memory bounded by the block; the samples are those of `load`, bit for bit.

    Args:
        source, channel, strict: as for `open_sound`.
        block_seconds: seconds to decode at a time; the blocks yielded are about as long, and never empty.

    Yields:
        (t,) float32 at 16 kHz.

    Raises:
        AudioError, ConfigError: as for `load`, when reading reaches the fault; blocks before it are yielded first.
    """
    with open_sound(source, channel=channel, strict=strict, block_seconds=block_seconds) as sound:
        try:
            yield from sound.blocks()
        finally:
            sound.log_warnings()


def _checked_at_end(blocks: Iterable[Block], reading: Reading, strict: bool) -> Iterator[Block]:
    """Pass blocks on; at the end, raise AudioError if there was none or, with `strict`, the source is cut short."""
    found = False
    for block in blocks:
        found = True
        yield block
    if reading.broken:
        if strict or not found:
            raise AudioError(reading.cut, reading.name)
        reading.warn(reading.cut)
    elif reading.lost:
        plural = "s were" if reading.lost > 1 else " was"
        reading.warn(f"{reading.lost} damaged packet{plural} left out")
    if not found:
        raise AudioError("no samples", reading.name)


def _check_number(number: int, channels: int, name: str) -> None:
    if number > channels:
        plural = "s" if channels > 1 else ""
        raise AudioError(f"there is no channel {number}; it has {channels} channel{plural}", name)


class Mix:
    """Reduce blocks (t, channels) to one channel, (t,) float32, and note whether the channels cancel in the mean.

    Args:
        channel: as for `open_sound`.
        name: of the sound, for messages.

    Raises:
        ConfigError: `channel` is invalid.
        AudioError: (when called) the first block has no such channel.
    """

    def __init__(self, channel: Channel, name: str) -> None:
        self._number, self._name = check_channel(channel), name
        self._powers = np.zeros(2)  # of the mean and of the channels, summed over all samples
        self._expected = 0.0  # of the mean, if the channels were independent
        self._frames = 0

    def __call__(self, samples: NDArray[Any]) -> NDArray[np.float32]:
        """Reduce a block."""
        channels = samples.shape[1]
        if self._number is not None and not self._frames:
            _check_number(self._number, channels, self._name)
        self._frames += len(samples)
        if channels == 1:
            return to_float(samples)[:, 0]
        if self._number is not None:  # a later part of a file may have fewer channels than the first
            return to_float(np.ascontiguousarray(samples[:, min(self._number, channels) - 1]))
        each = to_float(samples)
        mono = mean_of_channels(each)
        power = float(np.vdot(each, each)) / channels
        self._powers += float(np.vdot(mono, mono)), power
        self._expected += power / channels
        return mono

    def cancelled(self) -> str | None:
        """Return a warning if the channels cancelled each other."""
        mean, each = self._powers
        if each <= _SILENCE * self._frames or mean >= _CANCELLED * self._expected:
            return None
        less = f"{10 * np.log10(each / mean):.0f} dB below them" if mean else "silent"
        return f"the channels cancel each other (opposite phase): their mean is {less}; choose one channel instead"


def resampled(
    blocks: Iterable[Block], mix: Callable[[NDArray[Any]], NDArray[np.float32]]
) -> Iterator[NDArray[np.float32]]:
    """Convert the decoded blocks of one sound to mono at 16 kHz; no yielded block is empty.

    Args:
        blocks: may change their rate and channels.
        mix: reduces (t, channels) to (t,) float32, such as a `Mix`.

    Yields:
        (t,) float32 at 16 kHz, about as long as the blocks; the resampler delays samples by a few milliseconds.
    """
    resampler, rate = None, SAMPLE_RATE
    for block in blocks:
        if block.rate != rate:
            if resampler is not None and len(rest := _rest(resampler)):
                yield rest
            rate = block.rate
            resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")
        wave = mix(block.samples)
        if resampler is not None:
            wave = resampler.resample_chunk(wave)
        if len(wave):
            yield wave
    if resampler is not None and len(rest := _rest(resampler)):
        yield rest


def _rest(resampler: Any) -> NDArray[np.float32]:
    """Return the samples that a resampler still holds at the end of a sound."""
    rest: NDArray[np.float32] = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    return rest


def check_windows(length: float, hop: float) -> None:
    """Check the length and the hop of windows, both in seconds.

    Raises:
        ConfigError: one is shorter than one sample.
    """
    for what, seconds in (("length", length), ("hop", hop)):
        if not 1 <= seconds * SAMPLE_RATE < 2**62:
            raise ConfigError(f"the window {what} is {seconds} s; it must be above 0, at least 1/{SAMPLE_RATE}")


def cut_windows(
    blocks: Iterable[NDArray[np.float32]], length: float, hop: float, *, tail: Tail = "aligned"
) -> Iterator[Window]:
    """Cut the blocks of a sound into windows, each as soon as its last sample has arrived, without padding.

    Windows start every `hop` seconds; a window that would only repeat earlier ones is left out. A sound shorter than
    one window is one window.

    Args:
        blocks: (t,) at 16 kHz, of any lengths, such as those of `Sound.blocks`.
        length: seconds a window.
        hop: seconds from one start to the next.
        tail: how the rest after the last full window is cut. "aligned": the last window has full length too and ends
            with the sound, so it overlaps the one before; a rest under 0.15 s, less than a patch of a network, is left
            out. "short": the last window is as short as the rest, as in the published program; models tag such windows
            wrongly far more often.

    Raises:
        ConfigError: `length` or `hop` is shorter than one sample; raised at once.
    """
    check_windows(length, hop)
    return _windows(blocks, round(length * SAMPLE_RATE), round(hop * SAMPLE_RATE), tail)


def _windows(blocks: Iterable[NDArray[np.float32]], size: int, step: int, tail: Tail) -> Iterator[Window]:
    buffer = np.zeros(0, np.float32)
    held = 0  # the first sample of the buffer
    start = 0  # the first sample of the next window
    seen = 0  # samples before this one are in a window already
    for block in blocks:
        buffer = np.concatenate((buffer, block))
        while held + len(buffer) >= start + size:
            yield _window(buffer[start - held : start - held + size], start, seen)
            seen = start + size
            start += step
        kept = start if tail == "short" else min(start, held + len(buffer) - size)  # for a last window of full length
        drop = min(max(kept - held, 0), len(buffer))
        buffer, held = buffer[drop:], held + drop
    end = held + len(buffer)
    if end <= max(start, seen):
        return
    if tail == "short" or not seen:
        yield _window(buffer[start - held :], start, seen)
    elif end - seen >= MIN_SAMPLES:
        yield _window(buffer[end - size - held :], end - size, seen)


def _window(wave: NDArray[np.float32], start: int, seen: int) -> Window:
    return Window(start / SAMPLE_RATE, (start + len(wave)) / SAMPLE_RATE, wave, max(start, seen) / SAMPLE_RATE)


def _too_short(name: str) -> AudioError:
    return AudioError(f"too short: less than a sample at {SAMPLE_RATE} Hz is left", name)
