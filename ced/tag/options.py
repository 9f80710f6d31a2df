"""The options of tagging: everything that a record depends on besides the sound and the model.

The command line shows their defaults, so importing this module must not import NumPy or the sound decoders.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, asdict, dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ced.errors import ConfigError
from ced.tag.clock import parse as parse_clock

if TYPE_CHECKING:
    from ced.sound.labels import ClassTable
    from ced.tag.select import Selection

EACH = "each"  # instead of a channel: the command line tags each channel on its own
BATCH = 32  # windows in one call of the model on an accelerator
MOST_BATCH = 1024  # windows
TOP_K = 3  # tags of a window without `top_k` and thresholds
EVENT_THRESHOLD = 0.5  # threshold of events without thresholds
FormatName = Literal["text", "jsonl", "csv", "spreadsheet", "audacity", "raven", "parquet"]  # `ced.tag.writers.FORMATS`
Tail = Literal["aligned", "short"]  # as in `ced.sound.audio`, which is not imported here
_SHORTEST, _LONGEST = 0.001, 2.0**31  # limits of a window or hop in seconds


class TagKeywords(TypedDict, total=False):
    """The fields of `TagOptions`, for methods that take them as keywords."""

    window: float
    hop: float | None
    columns: bool
    tail: Tail
    silence: float | None
    channel: str | int
    strict: bool
    top_k: int | None
    threshold: float | tuple[float, ...] | None
    labels: Sequence[str]
    exclude: Sequence[str]
    rollup: bool
    events: bool
    release: float
    gap: float
    shortest: float
    clock: str | None


# Defaults of live tagging. A sound is reported within two seconds: the time until it fills a window, a hop, a block and
# the scoring. Short pauses belong to an event: a dog that barks three times is one event.
LIVE: TagKeywords = {"events": True, "window": 1.5, "hop": 0.25, "threshold": EVENT_THRESHOLD, "gap": 2.0}


@dataclass(frozen=True)
class TagOptions:
    """How sounds are tagged: windows, selection of classes, and merging of windows into events.

    Values are validated on creation, except for what depends on the classes of a model, which `check` validates.

    Attributes:
        window: length of a window in seconds.
        hop: seconds from one window's start to the next, at most `window`; None: the window length.
        columns: score every 0.16 s of a window instead of the window as a whole; windows then do not overlap.
        tail: the rest after the last window of full length. "aligned": the last window has full length too and ends
            with the sound; a rest under 0.15 s is skipped. "short": the last window is as short as the rest, as in the
            published program, and often tagged wrongly.
        silence: do not score windows below this level (root mean square, in dB of full scale, below 0).
        channel: the channel to tag: "mean" (of all), "left", "right", or a channel's number, from 1.
        strict: refuse truncated files, instead of tagging the part that can be read.
        top_k: the most tags of a window; None: 3, or with thresholds all. Events have one tag each.
        threshold: the least probability of a tag, one number or one for each class of the model (above 1: never a
            tag); None: no threshold, or 0.5 for events.
        labels: labels to keep, as in `Selection`; empty: all.
        exclude: labels to leave out.
        rollup: raise each class to the highest probability of its descendants, and add headings of AudioSet's ontology.
        events: merge windows into events.
        release: an event continues above this fraction of its threshold; above 0, at most 1.
        gap: merge events of one class at most this many seconds apart.
        shortest: drop events shorter than this many seconds, after merging.
        clock: the clock time at the start of the sound, for `Record.began`: "auto", from its metadata or name, or a
            date and time in ISO 8601.
        thresholds, only: deprecated names of the arguments `threshold` and `labels`.

    Raises:
        ConfigError: a number is out of range, or two options contradict each other.
    """

    window: float = 10.0
    hop: float | None = None
    columns: bool = False
    tail: Tail = "aligned"
    silence: float | None = None
    channel: str | int = "mean"
    strict: bool = False
    top_k: int | None = None
    threshold: float | tuple[float, ...] | None = None
    labels: Sequence[str] = ()
    exclude: Sequence[str] = ()
    rollup: bool = False
    events: bool = False
    release: float = 0.5
    gap: float = 0.0
    shortest: float = 0.0
    clock: str | None = None
    thresholds: InitVar[float | tuple[float, ...] | None] = None
    only: InitVar[Sequence[str]] = ()

    def __post_init__(self, thresholds: float | tuple[float, ...] | None, only: Sequence[str]) -> None:
        self._take_deprecated("threshold", "thresholds", thresholds)
        self._take_deprecated("labels", "only", only)
        for name in ("labels", "exclude"):  # lists are common, but mutable
            if isinstance(value := getattr(self, name), str):
                raise ConfigError(f"{name} is the text {value!r}; it must be a list of labels, as [{value!r}]")
            chosen = tuple(value) if isinstance(value, Iterable) else (value,)
            if not all(isinstance(label, str) for label in chosen):
                raise ConfigError(f"{name} is {value!r}; it must be a list of labels, as ['Dog']")
            object.__setattr__(self, name, chosen)
        self._check_types()
        from ced.sound.audio import TAILS, check_channel

        number = check_channel(self.channel)
        if self.channel not in ("mean", "left", "right"):  # such as the text "2"
            object.__setattr__(self, "channel", number)
        if self.tail not in TAILS:
            raise ConfigError(f"tail is {self.tail!r}; allowed: {', '.join(TAILS)}")
        self._check_windows()
        self._check_numbers()
        if self.clock is not None:
            parse_clock(self.clock)

    def _take_deprecated(self, name: str, deprecated: str, value: object) -> None:
        if value is None or (isinstance(value, tuple) and not value):
            return
        warnings.warn(f"{deprecated} is deprecated; use {name}", DeprecationWarning, stacklevel=4)
        object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        """Check the types of values, and convert numbers, such as those of NumPy, to Python numbers for the journal."""
        for name in ("window", "hop", "silence", "release", "gap", "shortest", "top_k"):
            value, kind = getattr(self, name), Integral if name == "top_k" else Real
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                number = "a whole number" if kind is Integral else "a number"
                raise ConfigError(f"{name} is {value!r}; it must be {number}")
            if value is not None and not isinstance(value, int | float):
                object.__setattr__(self, name, (int if kind is Integral else float)(getattr(self, name)))
        for name in ("columns", "strict", "rollup", "events"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        given = self.threshold
        if given is None:
            return
        try:
            if isinstance(given, str):
                raise TypeError
            threshold = tuple(map(float, given)) if isinstance(given, Iterable) else float(given)
        except (TypeError, ValueError):
            raise ConfigError(f"threshold is {given!r}; it must be a number, or one for each class") from None
        object.__setattr__(self, "threshold", threshold)

    def _check_windows(self) -> None:
        for name, seconds in (("window", self.window), ("hop", self.step)):
            if not _SHORTEST <= seconds <= _LONGEST:
                raise ConfigError(f"{name} is {seconds} s; it must be at least {_SHORTEST} s")
        if self.step > self.window:
            raise ConfigError(f"hop is {self.hop} s, window {self.window} s; a longer hop would skip sound")
        if self.columns and self.hop is not None:
            raise ConfigError(f"hop is {self.hop} s; leave it out: overlapping windows would score columns twice")
        if self.silence is not None and not self.silence < 0:
            raise ConfigError(f"silence is {self.silence} dB of full scale; it must be below 0, as -60")

    def _check_numbers(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1")
        if self.events and self.top_k is not None:
            raise ConfigError(f"top_k {self.top_k} does not apply to events, which have one tag each; leave it out")
        given = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        for threshold in given:
            if threshold is not None and not threshold >= 0:
                raise ConfigError(f"a threshold is {threshold}; it must be 0 or more")
        if not 0 < self.release <= 1:
            raise ConfigError(f"release is {self.release}; it must be above 0 and at most 1")
        for name, seconds in (("gap", self.gap), ("shortest", self.shortest)):
            if not 0 <= seconds < math.inf:
                raise ConfigError(f"{name} is {seconds}; it must be 0 seconds or more")
        if not self.events and (self.release, self.gap, self.shortest) != (0.5, 0.0, 0.0):
            raise ConfigError("release, gap and shortest are options of events; set events")

    def check(self, labels: "ClassTable") -> None:
        """Validate what depends on the classes of a model, before any sound is read.

        Raises:
            ConfigError: a label is unknown, no label remains, the number of thresholds is not that of the classes, or
                roll-up is applied to classes without AudioSet's mids.
        """
        self.selection(labels)

    @property
    def step(self) -> float:
        """Seconds from one window's start to the next."""
        return self.window if self.hop is None else self.hop

    def selection(self, labels: "ClassTable") -> "Selection":
        """Return the selection of tags among these classes.

        Raises:
            ConfigError: as for `check`.
        """
        return _selection(self, labels)

    def of_channel(self, channel: int | None) -> "TagOptions":
        """Return the options with another channel; None: unchanged."""
        return self if channel is None else replace(self, channel=channel)

    def settings(self) -> dict[str, Any]:
        """Return the options as JSON values, with defaults in place of None, under the names in journals."""
        values = {**asdict(self), "hop": self.step, "top_k": self._top_k}
        del values["threshold"], values["labels"]
        return {**values, "thresholds": self._threshold, "only": self.labels}

    @property
    def _threshold(self) -> float | tuple[float, ...] | None:
        return EVENT_THRESHOLD if self.threshold is None and self.events else self.threshold

    @property
    def _top_k(self) -> int | None:
        return TOP_K if self.top_k is None and self._threshold is None else self.top_k


@lru_cache(maxsize=16)
def _selection(options: TagOptions, labels: "ClassTable") -> "Selection":
    from ced.tag.select import Selection

    return Selection(
        labels,
        top_k=options._top_k,
        thresholds=options._threshold,
        only=options.labels,
        exclude=options.exclude,
        rollup=options.rollup,
    )
