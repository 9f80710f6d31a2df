"""What the decoders of all formats hand over: blocks of samples, and what is odd about their source."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, CedError, ClosedError, TooLongError

RATES = (1_000, 768_000)  # Hz
MOST_CHANNELS = 64
# Samples x channels for each byte of a file. Digital silence has up to 2,300 in FLAC, 640 in Opus; bombs have 14,000.
_MOST_PER_BYTE = 2_560
_UNSUSPICIOUS = 1 << 27  # samples x channels that any file may have: 25 minutes of CD sound
_MOST_VALUES = 1 << 22  # samples x channels in a block: 16 MiB of float32, whatever a header claims


@contextmanager
def boundary(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into AudioError: libraries raise all kinds of errors on files from outside."""
    try:
        yield
    except CedError:
        raise
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror or error}", name) from error
    except MemoryError as error:
        raise AudioError("cannot be decoded: it needs too much memory", name) from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise AudioError(f"cannot be decoded: {type(error).__name__}: {reason}", name) from error


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """A piece of a sound as it is stored: samples (t, channels) of any integer or float type, and their rate in Hz."""

    samples: NDArray[Any]
    rate: int


@dataclass(frozen=True, eq=False)
class Opened:
    """A source that a decoder has opened.

    Attributes:
        rate, channels: of its first block; later ones may differ.
        blocks: takes the most frames of a block and yields blocks; can be called once.
        seconds: how long it is according to its header; None: that says nothing.
    """

    rate: int
    channels: int
    blocks: Callable[[int], Iterator[Block]]
    seconds: float | None = None

    def frames(self, seconds: float) -> int:
        """Return how many frames to decode at a time: `seconds`, or fewer where they would take too much memory."""
        return max(1, min(round(seconds * self.rate), _MOST_VALUES // self.channels))


@dataclass(eq=False)
class Reading:
    """The state of reading one source, shared by its decoders and its reader.

    Attributes:
        name: what messages call it.
        budget: samples x channels that may be decoded; None: any number.
        size: bytes of the file; None: unknown. Far more samples than bytes are no recording.
        cancelled: asked at each block; True ends the reading with ClosedError.
        warnings: what was odd, a phrase each, without the name.
        expected_seconds: what the header claims; None: it claims nothing.
        position: where the last frame ends according to its time stamp, in seconds; None: unknown.
        lost: packets that could not be decoded and were left out.
        broken: whether the source was found to break off.
    """

    name: str
    budget: int | None = None
    size: int | None = None
    cancelled: Callable[[], bool] | None = None
    warnings: list[str] = field(default_factory=list)
    expected_seconds: float | None = None
    position: float | None = None
    lost: int = 0
    broken: bool = False
    _spent: int = 0
    _frames: dict[int, int] = field(
        default_factory=dict
    )  # passed on so far, for each rate; a sum of seconds would round

    @property
    def seconds(self) -> float:
        """How much was decoded, up to the last block that was passed on."""
        return sum(frames / rate for rate, frames in self._frames.items())

    def passed(self, frames: int, rate: int) -> None:
        """Count frames as passed on."""
        self._frames[rate] = self._frames.get(rate, 0) + frames

    def warn(self, text: str) -> None:
        """Add a warning, unless it was given before."""
        if text not in self.warnings:
            self.warnings.append(text)

    def spend(self, values: int) -> None:
        """Count `values` (samples x channels) as decoded.

        Raises:
            ClosedError: the reader has cancelled.
            TooLongError: the budget is exceeded, or the samples are out of all proportion to the file.
        """
        if self.cancelled is not None and self.cancelled():
            raise ClosedError(f"reading {self.name} was cancelled")
        self._spent += values
        if self.budget is not None and self._spent > self.budget:
            raise TooLongError(f"longer than the {self.budget} samples (times channels) that are allowed", self.name)
        if self.size is not None and self._spent > max(_UNSUSPICIOUS, _MOST_PER_BYTE * self.size):
            more = f"more than {_MOST_PER_BYTE} samples for each of its {self.size} bytes"
            raise TooLongError(f"{more}; no recording is as small, so it is not decoded further", self.name)

    def check_form(self, rate: int, channels: int) -> None:
        """Refuse rates and channels that no recording has, but that cost a lot to decode and resample.

        Raises:
            AudioError: one is out of range.
        """
        least, most = RATES
        if not least <= rate <= most:
            raise AudioError(f"the sampling rate is {rate} Hz; it must be {least} to {most} Hz", self.name)
        if not 1 <= channels <= MOST_CHANNELS:
            raise AudioError(f"{channels} channels; 1 to {MOST_CHANNELS} can be read", self.name)

    @property
    def cut(self) -> str:
        """How the source breaks off, if it does."""
        expected = self.expected_seconds
        of = f" of {expected:.2f} s" if expected is not None and expected - self.seconds > 0.005 else ""
        return f"cut short: it breaks off after {self.seconds:.2f} s{of}"


def join(blocks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Put blocks end to end, without a copy if there is only one."""
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
