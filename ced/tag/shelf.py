"""The sounds that are being looked at, one for each who looks: in memory and on disk no longer than they are wanted."""

import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ced.tag.hearing import Clip
from ced.tag.timeline import Timeline


@dataclass(frozen=True, eq=False)
class Kept:
    """A sound on the shelf."""

    token: str  # the name of its folder, which cannot be guessed
    clip: Clip
    timeline: Timeline


class Shelf:
    """Keeps the last sound of each owner, until it is replaced, not asked for in a long time, or out of room.

    Several threads may use it at once.
    """

    def __init__(
        self, folder: Path, *, most: int = 16, longest: float = 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with nothing.

        Args:
            folder: where sounds lie, each in a folder of its own.
            most: sounds at a time; more push out those that were not asked for in the longest time.
            longest: seconds that a sound stays without being asked for.
            clock: gives the time in seconds.
        """
        self._folder, self._most, self._longest, self._clock = folder, most, longest, clock
        self._kept: dict[str, tuple[float, Kept]] = {}  # by owner: when last asked for, what; the latest last
        self._lock = threading.Lock()

    def room(self) -> Path:
        """Make a folder for a clip; whoever asks for it removes it, unless `put` takes the clip."""
        folder = self._folder / secrets.token_urlsafe(16)
        folder.mkdir(parents=True)
        return folder

    def put(self, owner: str, clip: Clip, timeline: Timeline) -> Kept:
        """Keep a clip, which lies in a folder that `room` made, and its timeline instead of the owner's last."""
        kept = Kept(clip.path.parent.name, clip, timeline)
        with self._lock:
            _, last = self._kept.pop(owner, (0.0, None))
            if last is not None and last.token != kept.token:
                _remove(last)
            self._kept[owner] = self._clock(), kept
            while len(self._kept) > self._most:
                self._drop(next(iter(self._kept)))
        return kept

    def get(self, owner: str) -> Kept | None:
        """Return what is kept for an owner, if anything."""
        with self._lock:
            if owner not in self._kept:
                return None
            _, kept = self._kept.pop(owner)
            self._kept[owner] = self._clock(), kept
            return kept

    def find(self, token: str) -> Kept | None:
        """Return what a token stands for, if anything."""
        with self._lock:
            owner = next((owner for owner, (_, kept) in self._kept.items() if kept.token == token), None)
        return None if owner is None else self.get(owner)

    def forget(self, owner: str) -> None:
        """Remove what is kept for an owner."""
        with self._lock:
            if owner in self._kept:
                self._drop(owner)

    def sweep(self) -> None:
        """Remove what was not asked for in a long time."""
        with self._lock:
            oldest = self._clock() - self._longest
            for owner in [owner for owner, (last, _) in self._kept.items() if last < oldest]:
                self._drop(owner)

    def _drop(self, owner: str) -> None:
        _remove(self._kept.pop(owner)[1])


def _remove(kept: Kept) -> None:
    shutil.rmtree(kept.clip.path.parent, ignore_errors=True)
