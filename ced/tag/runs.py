"""Runs of a tagger over many sounds into a folder, and runs from the scores that an earlier one kept."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ced import remote
from ced.errors import AudioError, ConfigError, StoreError
from ced.progress import Meter, Progress, silent
from ced.sound.labels import ClassTable, read_classes
from ced.tag.batch import (
    CLASSES_NAME,
    JOURNAL_NAME,
    SoundOutcome,
    Summary,
    kept_scores,
    process_to_folder,
    unfinished_scores,
)
from ced.tag.clips import write_clips
from ced.tag.inputs import InputSound, check_inputs, find_inputs, split_channels
from ced.tag.journal import Journal, stamp_of
from ced.tag.options import EACH, TagOptions
from ced.tag.records import Record
from ced.tag.scores import ScoreLog, ScoreType, read_scores
from ced.tag.tagger import Tagger, pieces
from ced.tag.uploads import local_folder

Name = str | os.PathLike[str]
SCORED = ("window", "hop", "columns", "tail", "silence", "channel", "strict", "clock")  # options that scores depend on


def tag_to_folder(
    tagger: Tagger,
    sounds: Name | InputSound | Iterable[Name] | Iterable[InputSound],
    out: Name,
    options: TagOptions | None = None,
    *,
    formats: Sequence[str] = ("jsonl",),
    combined: bool = False,
    keep_scores: bool = False,
    clips: Name | None = None,
    each_channel: bool = False,
    finished: Callable[[SoundOutcome[Record]], None] = lambda outcome: None,
    progress: Progress = silent,
) -> Summary:
    """Tag sounds into a folder; repeated after an interruption, it resumes, also within a sound.

    Sounds that an earlier run finished there are skipped, unless they have changed; arrays, bytes and open files are
    always tagged again. Sounds that cannot be read are listed in `errors.jsonl`. Interrupted or not, the tags are
    the same.

    Args:
        tagger: tags `tagger.jobs` sounds at a time.
        sounds: names of files, folders and others that `ced.tag.inputs.find_inputs` finds sounds by, or what it found.
        out: the folder, created if missing, or an address in a store (`ced.remote`).
        options: how sounds are tagged; None: the defaults. A later run in the folder must have the same, and the same
            model; a scorer of your own is recognised by the name of the tagger and its classes.
        formats: of the outputs (`ced.tag.writers.FORMATS`); they may differ from those of an earlier run.
        combined: write one output for all sounds, instead of one for each in a tree like that of the inputs.
        keep_scores: keep the scores of all windows, for an `EarlierRun`.
        clips: a folder for the clips of events; None: no clips.
        each_channel: tag each channel on its own, instead of the channel of `options`.
        finished: called after each sound that is not skipped.
        progress: called as sounds are tagged and uploaded.

    Returns:
        The counts of this run.

    Raises:
        AudioError: a folder, pattern or list has no sounds.
        BusyError: another process writes into the folder.
        CheckpointError: the model cannot score columns, or returned invalid scores.
        ClosedError: the tagger is closed.
        ConfigError: an argument is not possible, the folder was begun with other options, or two sounds would have one
            output.
        MissingPackageError: a package for a store, or for Parquet, is not installed.
        StoreError: the folder's journal is damaged or not a journal.
        WriteError: an output cannot be written.
    """
    if not isinstance(tagger, Tagger):
        raise ConfigError(f"tagger is {tagger!r}; it must be a Tagger, as Tagger('ced_mini')")
    _check_flags(combined=combined, keep_scores=keep_scores, each_channel=each_channel)
    options = _options(options)
    tagger.windows.check(options)
    out, clips = _folder("out", out), None if clips is None else _folder("clips", clips)
    check_outputs(out, options, keep_scores=keep_scores, clips=clips)
    inputs = _found(sounds)
    check_inputs(inputs, options.clock, clips=clips is not None, each_channel=each_channel)
    if each_channel:
        inputs = list(split_channels(inputs))
    channel = EACH if each_channel else options.channel
    settings = {"model": tagger.digest or _described(tagger), **options.settings(), "channel": channel}
    meter = Meter(progress, len(inputs), "tagging")
    with local_folder(out, progress) as folder:
        return process_to_folder(
            inputs,
            _Logged(tagger, options, folder, settings, keep_scores, clips, meter),
            folder,
            settings=settings,
            formats=formats,
            combined=combined,
            classes=tagger.labels if keep_scores else None,
            jobs=tagger.jobs,
            finished=_counted(meter, finished),
        )


def _folder(name: str, given: Name) -> Path:
    """Return the path that the argument `name` gives."""
    try:
        folder = Path(given)
        usable = b"\0" not in os.fsencode(folder)
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise ConfigError(f"{name} is {given!r}; it must be the path of a folder")
    return folder


def _options(given: TagOptions | None) -> TagOptions:
    """Return the options that are given, or the defaults."""
    if not isinstance(given, TagOptions | None):
        raise ConfigError(f"options is {given!r}; it must be TagOptions, as TagOptions(window=2.0)")
    return given or TagOptions()


def _check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; it must be True or False")


def _described(tagger: Tagger) -> str:
    """Return what a later run recognises a scorer without a digest by."""
    digest = hashlib.sha256(json.dumps(tagger.labels.names).encode()).hexdigest()[:8]
    return f"{tagger.name}, {len(tagger.labels)} classes {digest}"


def _found(sounds: object) -> list[InputSound]:
    """Return the sounds that are given, or found by the names given."""
    single = isinstance(sounds, str | bytes | os.PathLike | io.IOBase)
    given = list(sounds) if isinstance(sounds, Iterable) and not single else [sounds]
    for sound in given:
        if not isinstance(sound, str | os.PathLike | InputSound):
            raise ConfigError(
                f"a sound is given as {type(sound).__name__}; it must be a name, or for bytes, open files and arrays an"
                " InputSound(name, source, place)"
            )
    inputs = [sound for sound in given if isinstance(sound, InputSound)]
    names = [os.fspath(sound) for sound in given if isinstance(sound, str | os.PathLike)]
    return [*inputs, *(find_inputs(names) if names or not inputs else ())]


def check_outputs(out: Path | None, options: TagOptions, *, keep_scores: bool, clips: Path | None) -> None:
    """Check where the outputs of a run go, before any work is done for them; `out` None: they are printed.

    Raises:
        ConfigError: scores or clips would go into a store, or clips are not of events.
        WriteError: the address in a store cannot be written to.
    """
    if out is not None and (address := remote.address_of(out)) is not None:
        if keep_scores:
            raise ConfigError(f"kept scores (--keep-scores) need a local folder; the outputs go to {address}")
        remote.check_writable(address)
    if clips is not None and not options.events:
        raise ConfigError("clips (--clips) are cut out of events; add --events")
    if clips is not None and (address := remote.address_of(clips)) is not None:
        raise ConfigError(f"clips (--clips) need a local folder; got {address}")


@dataclass(frozen=True)
class _Logged:
    """Tags a sound while its scores are logged in the folder of the run, so that an interrupted run can resume."""

    tagger: Tagger
    options: TagOptions
    folder: Path
    settings: Mapping[str, Any]
    keep_scores: bool
    clips: Path | None
    meter: Meter

    def __call__(self, item: InputSound) -> Record:
        """Return the record of a sound."""
        # A stream has no stamp: what it delivers next time is another sound.
        about = {"sound": item.key, "stamp": stamp_of(item) or os.urandom(8).hex(), "settings": self.settings}
        kind: ScoreType = "float16" if self.keep_scores else "float32"
        options = self.options.of_channel(item.channel)
        with ScoreLog(self.folder, unfinished_scores(item), len(self.tagger.labels), about, kind) as scores:
            record = self.tagger.stream(
                item.source, options, name=item.name, scores=scores, progress=self.meter.sound
            ).record()
            scores.close(finish=self.keep_scores)
        if self.clips is not None:
            write_clips(item.source, record.pieces, self.clips, item.relative)
        return record


def _counted(meter: Meter, finished: Callable[[SoundOutcome[Record]], None]) -> Callable[[SoundOutcome[Record]], None]:
    def count(outcome: SoundOutcome[Record]) -> None:
        meter.file()
        finished(outcome)

    return count


class EarlierRun:
    """A folder of tags with kept scores: makes tags with other options, without reading the sounds.

    Args:
        folder: that of a run with `keep_scores`; it is local.

    Attributes:
        folder: the folder.
        labels: the classes of the scores.
        settings: the settings of the run, as JSON values.
        inputs: its sounds, whose sources are the files of their scores.

    Raises:
        ConfigError: the folder is an address in a store.
        StoreError: the folder has no journal, or a damaged one, or no scores were kept.
        TableError: the class table is damaged.
    """

    def __init__(self, folder: Name) -> None:
        self.folder = folder = _folder("folder", folder)
        if (address := remote.address_of(folder)) is not None:
            raise ConfigError(f"kept scores are read from a local folder; got {address}")
        with Journal(folder / JOURNAL_NAME, None) as journal:
            self.settings: Mapping[str, Any] = journal.settings
            # Without their pieces, which would fill the memory.
            self._records = {place: replace(journal.record_at(place), pieces=()) for place in journal.places()}
            self._stamps = {place: journal.stamp_at(place) for place in self._records}
        if not (folder / CLASSES_NAME).is_file():
            raise StoreError(f"the run in {folder} kept no scores; repeat it with --keep-scores")
        self.labels: ClassTable = read_classes(folder / CLASSES_NAME)
        self.inputs = [
            InputSound(
                record.file,
                folder / kept_scores(place),
                str(place),
                record.channel if isinstance(record.channel, int) else None,
            )
            for place, record in self._records.items()
        ]

    def record(self, item: InputSound, options: TagOptions, clips: Name | None = None) -> Record:
        """Return the record of a sound with other options; windows, channels and the clock stay as they were.

        Args:
            item: one of `inputs`.
            options: those about selection and events count.
            clips: a folder for the clips of its events, for which the file or address that is the sound's name is
                read; None: no clips.

        Raises:
            AudioError: its scores are missing or damaged, or for clips the sound has changed since it was tagged.
            ConfigError: it is not one of `inputs`, or an option is not possible.
        """
        options = _options(options)
        if not isinstance(item, InputSound):
            raise ConfigError(f"a sound is given as {type(item).__name__}; it must be one of the inputs of this run")
        place, scores = item.relative, self.folder / kept_scores(item.relative)
        if place not in self._records or item.source != scores:
            raise ConfigError(f"{item.name} is not one of the inputs of the earlier run in {self.folder}")
        if clips is not None:
            clips = _folder("clips", clips)
            check_outputs(None, options, keep_scores=False, clips=clips)
        try:
            windows = read_scores(scores, len(self.labels))
            found = tuple(pieces((row for window in windows for row in window), options, self.labels))
        except StoreError as error:
            raise AudioError(error.message, item.name) from error
        if clips is not None:
            self._check_unchanged(item)
            write_clips(item.name, found, clips, place)
        return replace(self._records[place], pieces=found, kind="events" if options.events else "windows")

    def _check_unchanged(self, item: InputSound) -> None:
        stamp = stamp_of(replace(item, source=item.name))
        if stamp is not None and stamp != self._stamps[item.relative]:
            raise AudioError("it has changed since it was tagged; tag it again", item.name)

    def tag_to_folder(
        self,
        out: Name,
        options: TagOptions | None = None,
        *,
        formats: Sequence[str] = ("jsonl",),
        combined: bool = False,
        clips: Name | None = None,
        finished: Callable[[SoundOutcome[Record]], None] = lambda outcome: None,
        progress: Progress = silent,
    ) -> Summary:
        """Make the tags of all sounds with other options into another folder.

        Args:
            out, formats, combined, clips, finished, progress: as for the function `tag_to_folder`.
            options: those about selection and events count; None: the defaults.

        Raises:
            ConfigError: an option is not possible, or `out` is the folder of this run.
            BusyError, StoreError, WriteError: as for the function `tag_to_folder`.
        """
        _check_flags(combined=combined)
        options = _options(options)
        options.check(self.labels)
        out, clips = _folder("out", out), None if clips is None else _folder("clips", clips)
        check_outputs(out, options, keep_scores=False, clips=clips)
        if out.resolve() == self.folder.resolve():
            raise ConfigError(f"{out} is the folder of the earlier run; choose another folder for the new tags")
        settings = {**options.settings(), **{name: self.settings.get(name) for name in ("model", *SCORED)}}
        meter = Meter(progress, len(self.inputs), "tagging")

        def process(item: InputSound) -> Record:
            record = self.record(item, options, clips)
            meter.sound(record.seconds)
            return record

        with local_folder(out, progress) as folder:
            return process_to_folder(
                self.inputs,
                process,
                folder,
                settings=settings,
                formats=formats,
                combined=combined,
                finished=_counted(meter, finished),
            )
