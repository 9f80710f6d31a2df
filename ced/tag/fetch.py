"""A sound behind an address that somebody else named, fetched as a file: only from public hosts, and within a size."""

import time
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from ced.errors import AudioError
from ced.sound.web import Web
from ced.text import size

LONGEST = 300.0  # seconds for the whole of it
_BLOCK = 1 << 16


def fetch(address: str, folder: Path, *, most: int, private: bool = False) -> Path:
    """Fetch what an address holds into a folder, under the last part of the address as its name.

    Args:
        address: http or https.
        folder: where to put it.
        most: bytes that it may have.
        private: whether hosts that are not public (this machine, local networks) may be asked.

    Raises:
        AudioError: as for `Web.open`, or it holds more than `most`, or takes longer than `LONGEST`.
    """
    deadline = time.monotonic() + LONGEST
    address = address.strip()
    with Web(address, private="any" if private else "none").open() as source:
        path = folder / _name(source.name)
        done = 0
        with path.open("wb") as file:
            while block := source.read(_BLOCK):
                done += len(block)
                if done > most:
                    raise AudioError(f"holds more than {size(most)}, the most that is fetched", address)
                if time.monotonic() > deadline:
                    raise AudioError(f"takes longer than {LONGEST:g} s to fetch", address)
                file.write(block)
    return path


def _name(address: str) -> str:
    parts = urlsplit(address)
    name = PurePosixPath(unquote(parts.path)).name or parts.hostname or "sound"
    return "".join(letter for letter in name if letter.isprintable() and letter not in '/\\:*?"<>|')[-100:] or "sound"
