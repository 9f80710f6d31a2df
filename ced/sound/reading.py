"""What the decoders of all formats hand over: blocks of samples, and what is odd about their source."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ced.errors import AudioError, ClosedError, TooLongError

RATES = (1_000, 768_000)  # Hz
MOST_CHANNELS = 64
_MOST_VALUES = 1 << 22  # samples x channels in a block: 16 MiB of float32, whatever a header claims


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
        blocks: yields blocks of up to so many frames; can be called once.
    """

    rate: int
    channels: int
    blocks: Callable[[int], Iterator[Block]]

    def frames(self, seconds: float) -> int:
        """Return how many frames to decode at a time: `seconds`, or fewer where they would take too much memory."""
        return max(1, min(round(seconds * self.rate), _MOST_VALUES // self.channels))


@dataclass(eq=False)
class Reading:
    """The state of reading one source, shared by its decoders and its reader.

    Attributes:
        name: what messages call it.
        budget: samples x channels that may be decoded; None: any number.
        cancelled: asked at each block; True ends the reading with ClosedError.
        warnings: what was odd, a phrase each, without the name.
        expected_seconds: what the header claims; None: it claims nothing.
        seconds: decoded so far.
        cut: how the source breaks off; None: it does not, so far.
    """

    name: str
    budget: int | None = None
    cancelled: Callable[[], bool] | None = None
    warnings: list[str] = field(default_factory=list)
    expected_seconds: float | None = None
    seconds: float = 0.0
    cut: str | None = None
    _spent: int = 0

    def warn(self, text: str) -> None:
        """Add a warning, unless it was given before."""
        if text not in self.warnings:
            self.warnings.append(text)

    def spend(self, values: int) -> None:
        """Count `values` (samples x channels) as decoded.

        Raises:
            ClosedError: the reader has cancelled.
            TooLongError: the budget is exceeded.
        """
        if self.cancelled is not None and self.cancelled():
            raise ClosedError(f"reading {self.name} was cancelled")
        self._spent += values
        if self.budget is not None and self._spent > self.budget:
            raise TooLongError(f"longer than the {self.budget} samples (times channels) that are allowed", self.name)

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

    def broken(self, found: float, expected: float | None = None) -> None:
        """Note that the source breaks off after `found` of `expected` seconds."""
        of = f" of {expected:.2f} s" if expected is not None and expected > found else ""
        self.cut = f"cut short: it breaks off after {found:.2f} s{of}"
