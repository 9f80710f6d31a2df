"""What the words of a command line mean: files, folders, patterns, lists, addresses, sound on standard input."""

import glob
import io
import logging
import mimetypes
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote, urlsplit

from ced.errors import AudioError, ConfigError
from ced.sound import audio
from ced.sound.ffmpeg import MEDIA_SUFFIXES
from ced.sound.web import TrustedAddress, is_address, without_password
from ced.text import decoded

SUFFIXES = audio.AUDIO_SUFFIXES | MEDIA_SUFFIXES  # what is taken from folders, whether or not PyAV is there to read it
_PACKETS, _SYNC = (".ts", ".mts"), b"\x47"  # of MPEG-TS and of TypeScript; first byte of a packet (ISO 13818-1)
_KINDS_NAMED = 5  # of files that were left out, before the rest is counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputSound:
    """A sound to be tagged, or one of its channels."""

    name: str  # what records call it
    source: audio.Source
    relative: Path  # where its output goes in a tree that mirrors the inputs'; its own suffix included
    channel: int | None = None  # from 1, where each channel is tagged on its own

    @property
    def key(self) -> str:
        """What tells it from all other inputs of a run."""
        return self.name if self.channel is None else f"{self.name} [channel {self.channel}]"


def each_channel(inputs: Iterable[InputSound]) -> Iterator[InputSound]:
    """Yield an input for each channel of each sound; one that cannot be opened stays as it is, and fails later."""
    for item in inputs:
        if isinstance(item.source, io.IOBase):  # every channel reads it
            item = replace(item, source=item.source.read())
        try:
            with audio.open_sound(item.source) as sound:
                channels = sound.channels
        except AudioError:
            yield item
            continue
        for number in range(1, channels + 1):
            place = item.relative.with_name(f"{item.relative.name}.channel{number}")
            yield replace(item, relative=place, channel=number)


def find_inputs(
    words: Sequence[str], stdin: BinaryIO | None = None, *, allow_private: bool = False
) -> list[InputSound]:
    """Find the sounds that words stand for, in the order of the words, each sound once.

    A word is a file; a folder (its sounds of known kinds, with those of its folders, sorted; what is left out of it,
    such as other kinds, hidden files, linked folders, pipes and devices, is counted in a note); a pattern with `*`,
    `?`, `[...]` or `**` (sorted); an http(s) address; `-`, sound on `stdin`; `@FILE` or `@-`, a list of files, folders
    and addresses, each ended by a line feed (or all by zero bytes), in UTF-8 or UTF-16.
    A file that is not there is an input all the same: reading it fails, as with any other that cannot be read. Texts
    and pictures that are named beside other files are left out with a note.

    `relative` of what a folder or the fixed part of a pattern holds is its place therein; of files that are named one
    by one, in words or in one list, their place in the deepest folder that holds them all.

    Args:
        words: what to find.
        stdin: standard input, if there is one.
        allow_private: redirects and playlists of addresses may lead to hosts that are not public. The names of
            addresses are without passwords.

    Raises:
        AudioError: a folder, a pattern or a list holds no sound.
        ConfigError: there is no word, or standard input is asked for twice or is not there.
    """
    if not words:
        raise ConfigError("there is nothing to tag; name files, folders, patterns, addresses, @LIST or -")
    if sum(word in ("-", "@-") for word in words) > (stdin is not None):
        raise ConfigError("standard input (-, @-) can be read once, if it is there")
    words = _without_documents(words)
    named = [word for word in words if _is_named(word)]
    places = _places(named)
    found: list[InputSound] = []
    for word in words:
        if word == "-":
            assert stdin is not None
            found.append(InputSound("<stdin>", stdin, Path("stdin")))
        elif word.startswith("@"):
            found += _listed(word, stdin)
        else:
            found += _meant(word, places)
    unique: dict[str, InputSound] = {}
    for item in found:
        unique.setdefault(str(item.source), item)
    if allow_private:
        return [replace(item, source=_trusted(item.source)) for item in unique.values()]
    return list(unique.values())


def _without_documents(words: Sequence[str]) -> Sequence[str]:
    """Leave out files that are texts or pictures by name, where others are named too, as a shell expands `folder/*`."""
    kept = [word for word in words if not (_is_named(word) and _is_document(word))]
    if not kept or len(kept) == len(words):
        return words
    logger.info("left out%s", _counted(Counter(_suffix(word) for word in words if word not in kept), ": "))
    return kept


def _is_document(name: str) -> bool:
    suffix = _suffix(name)
    if suffix in SUFFIXES:  # also those that have another meaning elsewhere, as .ts
        return False
    kind = mimetypes.guess_type(f"a{suffix}")[0] or ""
    return kind.startswith(("text/", "image/")) or kind in ("application/json", "application/pdf")


def _trusted(source: audio.Source) -> audio.Source:
    return TrustedAddress(source) if isinstance(source, str) and is_address(source) else source


def _is_named(word: str) -> bool:
    """Return whether a word is the path of one file, there or not."""
    return (
        word != "-" and not word.startswith("@") and not (is_address(word) or os.path.isdir(word) or _is_pattern(word))
    )


def _is_pattern(word: str) -> bool:
    return glob.has_magic(word) and not os.path.lexists(word)


def _meant(word: str, places: dict[str, Path]) -> Iterator[InputSound]:
    """Yield the inputs of a word that needs no standard input; `places` are those of files that are named."""
    if is_address(word):
        yield InputSound(without_password(word), word, _place_of_address(word))
    elif os.path.isdir(word):
        yield from _in_folder(word)
    elif _is_pattern(word):
        yield from _matching(word)
    else:
        yield InputSound(word, word, places[word])


def _in_folder(folder: str) -> Iterator[InputSound]:
    files: list[str] = []
    left_out: Counter[str] = Counter()
    _search(folder, files, left_out)
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        raise AudioError(f"folder {folder} holds no sound files{_counted(left_out, ': ')}", hint=f"known are {kinds}")
    if left_out:
        logger.info("%s: left out%s", folder, _counted(left_out, ": "))
    for file in sorted(files, key=lambda file: file.split(os.sep)):
        yield InputSound(file, file, Path(os.path.relpath(file, folder)))


def _search(folder: str, files: list[str], left_out: Counter[str]) -> None:
    """Add the sounds of a folder, and of those below it, to `files`; count what is left out by its kind."""
    folders = [folder]
    while folders:
        place = folders.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    kind = _left_out_as(entry)
                    if kind is not None:
                        left_out[kind] += 1
                    elif entry.is_dir():
                        folders.append(os.path.join(place, entry.name))
                    else:
                        files.append(os.path.join(place, entry.name))
        except OSError as error:
            logger.warning("folder %s cannot be searched: %s", place, error.strerror)


def _left_out_as(entry: "os.DirEntry[str]") -> str | None:
    """Return the kind of an entry that is left out; None: it is a sound, or a folder to search."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "linked folder" if entry.is_symlink() else None
    suffix = _suffix(entry.name)
    if suffix not in SUFFIXES or (suffix in _PACKETS and entry.is_file() and not _is_transport_stream(entry.path)):
        return suffix or "without suffix"
    if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):  # a broken link is an error later
        return None
    return "pipe or device"


def _is_transport_stream(path: str) -> bool:
    """Return whether a file begins with a packet of MPEG-TS, with or without a time stamp; one not readable does."""
    try:
        with open(path, "rb") as file:
            begin = file.read(5)
    except OSError:  # an error later
        return True
    return _SYNC in (begin[:1], begin[4:])


def _counted(kinds: Counter[str], begin: str) -> str:
    """Return a list of kinds with their numbers, the most common first; empty if there are none."""
    if not kinds:
        return ""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count} {kind}" for kind, count in ordered[:_KINDS_NAMED]]
    rest = sum(count for _, count in ordered[_KINDS_NAMED:])
    return begin + ", ".join([*named, *([f"{rest} of other kinds"] if rest else [])])


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _matching(pattern: str) -> Iterator[InputSound]:
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    files = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    if not files:
        raise AudioError(f"no file matches {pattern}")
    places = _places(files, fixed)
    for file in files:
        yield InputSound(file, file, places[file])


def _listed(word: str, stdin: BinaryIO | None) -> Iterator[InputSound]:
    name = "standard input" if word == "@-" else word[1:]
    try:
        if word == "@-":
            assert stdin is not None
            text = decoded(stdin.read())
        else:
            text = decoded(Path(name).read_bytes())
    except OSError as error:
        raise AudioError(f"cannot read the list {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AudioError(f"cannot read the list {name}: it begins as UTF-16 text, but is not") from error
    words = [line.removesuffix("\r") for line in text.split("\0" if "\0" in text else "\n")]
    words = [word for word in words if word.strip()]
    if not words:
        raise AudioError(f"the list {name} names no file")
    files = [word for word in words if not is_address(word) and not os.path.isdir(word)]
    places = _places(files)
    for line in words:
        if line in places:  # whatever characters it has: a list holds no patterns
            yield InputSound(line, line, places[line])
        else:
            yield from _meant(line, places)


def _places(files: Iterable[str], *folders: str) -> dict[str, Path]:
    """Return where each file lies in the deepest folder that holds them all, and `folders` as well."""
    whole = {file: os.path.abspath(file) for file in files}
    if not whole:
        return {}
    common = os.path.commonpath([*map(os.path.abspath, folders), *map(os.path.dirname, whole.values())])
    return {file: Path(os.path.relpath(path, common)) for file, path in whole.items()}


def _place_of_address(address: str) -> Path:
    parts = urlsplit(address)
    names = [name for name in PurePosixPath(parts.path).parts if name not in ("/", "..")]
    if parts.query:
        names = [*names[:-1], f"{names[-1] if names else ''}{quote('?' + parts.query, safe='=')}"]
    return Path(parts.hostname or "", *(name.replace("\\", "_").replace(":", "_") for name in names or ["index"]))
