"""Find the sounds that arguments name: files, folders, patterns, lists, shards, addresses, sound on standard input."""

import glob
import logging
import mimetypes
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast
from urllib.parse import quote, urlsplit

from ced import remote
from ced.errors import AudioError, ConfigError
from ced.remote import Listed
from ced.sound import audio, shards
from ced.sound.decode import is_address
from ced.sound.ffmpeg import MEDIA_SUFFIXES
from ced.sound.web import TrustedAddress, without_password
from ced.text import decoded

SUFFIXES = audio.AUDIO_SUFFIXES | MEDIA_SUFFIXES  # of files that are found in folders, with or without PyAV
_PACKETS, _SYNC = (".ts", ".mts"), b"\x47"  # of MPEG-TS and of TypeScript; first byte of a packet (ISO 13818-1)
_KINDS_NAMED = 5  # suffixes of skipped files that a note names before it counts the rest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)  # runs may have millions
class InputSound:
    """A sound to be tagged, or one of its channels."""

    name: str  # in records and errors
    source: audio.Source
    place: str  # relative path of its output in a tree that mirrors the inputs, with its own suffix
    channel: int | None = None  # from 1, if each channel is tagged on its own

    @property
    def relative(self) -> Path:
        """The place as a path; it is not kept, as a path takes four times the memory of a text."""
        return Path(self.place)

    @property
    def is_stream(self) -> bool:
        """Whether the source is an open file, which may be readable only once."""
        return hasattr(self.source, "read")

    @property
    def key(self) -> str:
        """An identifier that is unique among the inputs of a run."""
        return self.name if self.channel is None else f"{self.name} [channel {self.channel}]"


def split_channels(inputs: Iterable[InputSound]) -> Iterator[InputSound]:
    """Yield an input for each channel of each sound, and sounds that cannot be opened unchanged, to fail later."""
    for item in inputs:
        if item.is_stream:  # each channel reads it
            item = _in_memory(item)
        try:
            with audio.open_sound(item.source) as sound:
                channels = sound.channels
        except AudioError:
            yield item
            continue
        for number in range(1, channels + 1):
            yield replace(item, place=f"{item.place}.channel{number}", channel=number)


def _in_memory(item: InputSound) -> InputSound:
    """Return an input with the bytes of its open file; one that cannot be read unchanged, to fail later."""
    try:
        data: object = cast(BinaryIO, item.source).read()
    except (OSError, ValueError):  # ValueError: the file is closed
        return item
    return replace(item, source=data) if isinstance(data, bytes) else item


def find_inputs(
    words: Sequence[str], stdin: BinaryIO | None = None, *, allow_private: bool = False
) -> list[InputSound]:
    """Find the sounds that arguments name, in the order of the arguments, each sound once.

    An argument is a file; a folder, searched recursively for known suffixes, in sorted order; a pattern with `*`, `?`,
    `[...]` or `**`, in sorted order; each of these also in a store (`ced.remote`); a shard, whose members are sounds,
    or SHARD!MEMBER (`ced.sound.shards`); an http(s) address; `-`, sound on `stdin`; `@FILE` or `@-`, a list of files,
    folders and addresses, each terminated by a line feed (or all by zero bytes), in UTF-8 or UTF-16. Other suffixes,
    hidden files, linked folders, pipes and devices in folders are skipped and counted in a log message, and so are
    text and image files that are named beside other files. A missing file is an input, too: reading it fails later.

    `place` is that of a file in its folder, or below the fixed part of its pattern; of files that are named
    one by one, in arguments or in a list, it is their place in the deepest folder that contains them all.

    Args:
        words: the arguments.
        stdin: standard input, if there is one.
        allow_private: redirects and playlists of addresses may lead to hosts that are not public. The names of
            addresses are without passwords.

    Raises:
        AudioError: a folder, a pattern or a list contains no sound, or a folder or pattern in a store cannot be listed.
        ConfigError: there are no arguments, or standard input is named twice or does not exist.
        MissingPackageError: a package for a store, or for Parquet, is not installed.
    """
    if not words:
        raise ConfigError("nothing to tag; name files, folders, patterns, addresses, @LIST or -")
    if sum(word in ("-", "@-") for word in words) > (stdin is not None):
        raise ConfigError("standard input (-, @-) can be read only once, and only if there is one")
    words = _without_documents(words)
    named = [word for word in words if _is_named(word)]
    places = _places(named)
    found: list[InputSound] = []
    for word in words:
        if word == "-":
            assert stdin is not None
            found.append(InputSound("<stdin>", stdin, "stdin"))
        elif word.startswith("@"):
            found += _read_list(word, stdin)
        else:
            found += _find_argument(word, places)
    unique: dict[str, InputSound] = {}
    for item in found:
        unique.setdefault(str(item.source), item)
    if allow_private:
        return [replace(item, source=_trusted(item.source)) for item in unique.values()]
    return list(unique.values())


def check_inputs(inputs: Sequence[InputSound], clock: str | None, *, clips: bool, each_channel: bool) -> None:
    """Check options against the sounds of a run, before their channels are split.

    Args:
        inputs: the sounds.
        clock: the option of this name.
        clips: whether events are cut out as clips.
        each_channel: whether each channel is tagged on its own.

    Raises:
        ConfigError: several sounds would have one clock time, or the sound of clips cannot be read a second time.
    """
    if clock not in (None, "auto") and len(inputs) > 1:
        raise ConfigError(f"clock (--clock) {clock} is the start of one sound; {len(inputs)} are named")
    streams = [item.name for item in inputs if item.is_stream]
    if clips and streams and not each_channel:  # a stream whose channels are split is kept in memory
        raise ConfigError(
            f"clips (--clips) are cut out in a second reading, which {streams[0]} does not allow; name a file"
        )


def _without_documents(words: Sequence[str]) -> Sequence[str]:
    """Skip text and image files if other files are named, too, because a shell expands `folder/*` to all files."""
    kept = [word for word in words if not (_is_named(word) and _is_document(word))]
    if not kept or len(kept) == len(words):
        return words
    logger.info("skipped%s", _counted(Counter(_suffix(word) for word in words if word not in kept), ": "))
    return kept


def _is_document(name: str) -> bool:
    suffix = _suffix(name)
    if suffix in SUFFIXES:  # including ambiguous ones, as .ts
        return False
    kind = mimetypes.guess_type(f"a{suffix}")[0] or ""
    return kind.startswith(("text/", "image/")) or kind in ("application/json", "application/pdf")


def _trusted(source: audio.Source) -> audio.Source:
    return TrustedAddress(source) if isinstance(source, str) and is_address(source) else source


def none_exists(inputs: Sequence[InputSound]) -> bool:
    """Return whether all inputs are names of files of this machine, and none of these files exists."""
    return bool(inputs) and all(
        isinstance(item.source, str) and _is_named(item.source) and not _is_found(item.source) for item in inputs
    )


def _is_found(name: str) -> bool:
    return shards.split_member(name) is not None or os.path.lexists(name)


def _is_named(word: str) -> bool:
    """Return whether an argument is the path of a single file, existing or not."""
    if word == "-" or word.startswith("@") or is_address(word) or remote.address_of(word) is not None:
        return False
    return not (os.path.isdir(word) or _is_pattern(word))


def _is_pattern(word: str) -> bool:
    return glob.has_magic(word) and not os.path.lexists(word)


def _find_argument(word: str, places: dict[str, Path]) -> Iterator[InputSound]:
    """Yield the inputs of an argument other than standard input; `places` are those of single files."""
    if is_address(word):
        yield InputSound(without_password(word), word, str(_place_of_address(word)))
    elif (address := remote.address_of(word)) is not None:
        yield from _in_store(address)
    elif os.path.isdir(word):
        yield from _in_folder(word)
    elif _is_pattern(word):
        yield from _matching(word)
    else:
        yield from _in_file(word, word, places[word])


def _in_file(name: str, source: str, place: Path) -> Iterator[InputSound]:
    """Yield the sound of a file, or those of a shard, and at the end of a damaged shard one that fails."""
    if not shards.is_shard(name):
        yield InputSound(name, source, str(place))
        return
    try:
        members, fault = shards.members(source)
    except AudioError:  # reading it fails again, and is reported then
        yield InputSound(name, f"{source}!", str(place))
        return
    stamp = shards.stamp_of(source)
    is_table = name.lower().endswith(".parquet")  # whose rows are sounds, with any names
    places = {member: _safe(member) for member in members}
    skipped = Counter(kind for at in places.values() if not is_table and (kind := _skipped_by_name(at)))
    if skipped or remote.address_of(source) is not None:  # searching a shard in a store takes time
        count = len(places) - skipped.total()
        logger.info("%s: %d sounds%s", name, count, _counted(skipped, ", skipped: "))
    for member, at in places.items():
        if is_table or _skipped_by_name(at) is None:
            yield InputSound(f"{name}!{member}", Listed(f"{source}!{member}", stamp), str(place / at))
    if fault is not None or len(places) == skipped.total():
        yield InputSound(name, f"{source}!", str(place.with_name(f"{place.name}!")))


def _safe(member: str) -> Path:
    """Return a place for the outputs of a member, below that of its shard."""
    parts = [part for part in PurePosixPath(member).parts if part not in ("/", "..")]
    return Path(*(part.replace("\\", "_").replace(":", "_") for part in parts or ["member"]))


def _in_store(address: str) -> Iterator[InputSound]:
    """Yield the sounds in a folder of a store or that match a pattern, or the one at an address.

    The store is not asked for addresses of sounds: lists may have millions, and reading a missing one fails later.
    """
    remote.check_installed(address)
    shown = remote.without_secrets(address)
    place = _safe(shown.partition("://")[2])
    is_sound = shards.split_member(address) is not None or _suffix(shown) in SUFFIXES
    if is_sound and not remote.has_wildcards(address):
        yield InputSound(shown, address, str(place))
        return
    try:
        is_pattern = remote.is_pattern(address)
        found: list[str] = list(remote.find(address))
    except AudioError as error:
        if remote.has_wildcards(address):
            raise AudioError(f"cannot list {error.message}") from error
        found, is_pattern = [address], False  # reading it fails, too
    if found == [address]:
        yield from _in_file(shown, found[0], place)
        return
    folder = address
    while is_pattern and remote.has_wildcards(folder):
        folder = os.path.dirname(folder)
    places = {file: _safe(file[len(folder) :]) for file in found}
    skipped: Counter[str] = Counter()
    for file, at in list(places.items()):
        kind = _skipped_by_name(at)
        if kind is not None and (kind == "hidden" or not is_pattern):  # as in local folders
            skipped[kind] += 1
            del places[file]
    if not places:
        none = "no file matches" if is_pattern else "no sound files in"
        raise AudioError(f"{none} {shown}{_counted(skipped, ': ')}")
    if skipped:
        logger.info("%s: skipped%s", shown, _counted(skipped, ": "))
    for file, at in places.items():
        yield from _in_file(str(file), file, at)  # a whole name: what follows a "?" in a listing is no query


def _skipped_by_name(place: Path) -> str | None:
    """Return the kind of a file to skip in a folder of a store or in an archive; None: it is a sound."""
    if any(part.startswith(".") for part in place.parts):
        return "hidden"
    suffix = _suffix(place.name)
    return None if suffix in SUFFIXES else suffix or "without suffix"


def _in_folder(folder: str) -> Iterator[InputSound]:
    files: list[str] = []
    skipped: Counter[str] = Counter()
    _search(folder, files, skipped)
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        raise AudioError(
            f"folder {folder} contains no sound files{_counted(skipped, ': ')}", hint=f"known suffixes: {kinds}"
        )
    if skipped:
        logger.info("%s: skipped%s", folder, _counted(skipped, ": "))
    for file in sorted(files, key=lambda file: file.split(os.sep)):
        yield InputSound(file, file, os.path.relpath(file, folder))


def _search(folder: str, files: list[str], skipped: Counter[str]) -> None:
    """Add the sounds of a folder, searched recursively, to `files`; count skipped entries by kind."""
    folders = [folder]
    while folders:
        place = folders.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    kind = _skipped_as(entry)
                    if kind is not None:
                        skipped[kind] += 1
                    elif entry.is_dir():
                        folders.append(os.path.join(place, entry.name))
                    else:
                        files.append(os.path.join(place, entry.name))
        except OSError as error:
            logger.warning("folder %s cannot be searched: %s", place, error.strerror)


def _skipped_as(entry: "os.DirEntry[str]") -> str | None:
    """Return the kind of an entry to skip; None: it is a sound, or a folder to search."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "linked folder" if entry.is_symlink() else None
    suffix = _suffix(entry.name)
    if suffix not in SUFFIXES or (suffix in _PACKETS and entry.is_file() and not _is_transport_stream(entry.path)):
        return suffix or "without suffix"
    if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):  # reading a broken link fails later
        return None
    return "pipe or device"


def _is_transport_stream(path: str) -> bool:
    """Return whether a file begins with a packet of MPEG-TS, with or without a time stamp; True if it is unreadable."""
    try:
        with open(path, "rb") as file:
            begin = file.read(5)
    except OSError:  # reading it fails later
        return True
    return _SYNC in (begin[:1], begin[4:])


def _counted(kinds: Counter[str], begin: str) -> str:
    """Return kinds with their counts, the most common first, after `begin`; empty if there are none."""
    if not kinds:
        return ""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count} {kind}" for kind, count in ordered[:_KINDS_NAMED]]
    rest = sum(count for _, count in ordered[_KINDS_NAMED:])
    return begin + ", ".join([*named, *([f"{rest} others"] if rest else [])])


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
        yield from _in_file(file, file, places[file])


def _read_list(word: str, stdin: BinaryIO | None) -> Iterator[InputSound]:
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
        raise AudioError(f"cannot read the list {name}: it begins like UTF-16 text, but is not") from error
    words = [line.removesuffix("\r") for line in text.split("\0" if "\0" in text else "\n")]
    words = [word for word in words if word.strip()]
    if not words:
        raise AudioError(f"the list {name} is empty")
    files = [
        word for word in words if not (is_address(word) or remote.address_of(word) is not None or os.path.isdir(word))
    ]
    places = _places(files)
    for line in words:
        if line in places:  # even with pattern characters: a list has no patterns
            yield from _in_file(line, line, places[line])
        else:
            yield from _find_argument(line, places)


def _places(files: Iterable[str], *folders: str) -> dict[str, Path]:
    """Return the place of each file in the deepest folder that contains all of them and `folders`."""
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
