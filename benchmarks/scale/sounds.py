"""The parts `files`, `hours` and `ray`: `ced tag` of many short files, of one long file, and on a Ray cluster.

    files   folders of files of one second each (hard links to a few hundred different ones): tag them, each into a file
            of its own; repeat the command, which then finds everything done; and write one table of all from the
            journal (`--combine`), as CSV and as Parquet
    hours   one FLAC file, 16 kHz, mono: tag it, and decode it without a model; and six minutes of Opus, 48 kHz,
            stereo, decoded only
    ray     clips of five seconds: `ced tag` with one and with two threads, and a Ray cluster of this machine with one
            and with two workers take turns. Each tags a few clips, then all of them. What the larger run takes beyond
            the smaller is the rate; what the smaller takes is mostly the start: of Python, of Ray, of workers and
            models. Figures are medians over rounds; the processor time is that of all processes, with Ray's own

The sounds are cut from real ones and repeated, or generated if there are none. The model's time does not depend on the
number of files, so the default is a small one.
"""

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from benchmarks.scale.costs import Cost, Work, of_command, of_processes, of_work
from benchmarks.scale.results import Row
from ced.files import make_folders
from ced.sound.audio import SAMPLE_RATE, cut_windows, load, open_sound
from ced.tag.batch import JOURNAL_NAME
from ced.tag.inputs import find_inputs
from ced.tag.options import TagOptions

TAG, RESUME, COMBINED = "tag", "repeat the command", {"csv": "combine, CSV", "parquet": "combine, Parquet"}
DECODE, OPUS = "decode", "decode Opus, 48 kHz, stereo"
DIFFERENT = 200  # files; the others are links to these
PER_FOLDER = 1000
BLOCK = 60  # seconds of a long file that are written at once
GENERATED = 20  # sounds
LENGTH = 5  # seconds of each
OPUS_HOURS = 0.1  # encoding it takes longer than all else
PLAIN = {1: "ced tag -j 1", 2: "ced tag -j 2"}
RAY = {1: "Ray, 1 worker", 2: "Ray, 2 workers"}
CLUSTER_FEW = 16  # clips
CLUSTER_SECONDS = 5.0  # of a clip

Wave = NDArray[np.float32]  # (t,), 16 kHz


def real_sounds(data: Path, most: int = DIFFERENT) -> list[Wave]:
    """Return some sounds of a folder, at 16 kHz, evenly spread over its files."""
    found = find_inputs([str(data)])
    chosen = found[:: max(1, len(found) // most)][:most]
    return [load(item.source) for item in chosen]


def generated_sounds() -> list[Wave]:
    """Return sounds of noise and a tone each."""
    rng = np.random.default_rng(0)
    axis = np.arange(LENGTH * SAMPLE_RATE) / SAMPLE_RATE
    tones = [0.1 * np.sin(2 * np.pi * (200 + 150 * number) * axis) for number in range(GENERATED)]
    return [(tone + 0.02 * rng.standard_normal(len(tone))).astype(np.float32) for tone in tones]


def write_files(folder: Path, sounds: Sequence[Wave], count: int, seconds: float) -> None:
    """Write `count` WAV files, 16-bit, in folders of a thousand; all but the first few hundred are links to these."""
    size = round(seconds * SAMPLE_RATE)
    longer = [sound for sound in sounds if len(sound) >= size]
    if not longer:
        raise SystemExit(f"none of the sounds has {seconds:g} s; name others with --data")
    pieces = cycle(sound[start : start + size] for sound in longer for start in range(0, len(sound) - size + 1, size))
    paths = [Path(f"{number // PER_FOLDER:05}", f"{number:08}.wav") for number in range(count)]
    for path in paths[::PER_FOLDER]:
        make_folders(folder, path.parent)
    for path, piece in zip(paths[:DIFFERENT], pieces, strict=False):
        soundfile.write(folder / path, piece, SAMPLE_RATE, "PCM_16")
    for path, original in zip(paths[DIFFERENT:], cycle(paths[:DIFFERENT]), strict=False):
        os.link(folder / original, folder / path)


def write_hours(path: Path, sounds: Sequence[Wave], hours: float, rate: int, channels: int, subtype: str) -> None:
    """Write a file that repeats sounds, resampled to `rate`, in the container that its suffix names."""
    left = round(hours * 3600 * rate)
    whole = soxr.resample(repeated(sounds, BLOCK * SAMPLE_RATE), SAMPLE_RATE, rate)
    with soundfile.SoundFile(path, "w", rate, channels, subtype) as file:
        while left > 0:
            block = whole[:left]
            file.write(np.repeat(block[:, None], channels, axis=1))
            left -= len(block)


def repeated(sounds: Sequence[Wave], size: int) -> Wave:
    """Return sounds one after the other, repeated to at least `size` samples."""
    whole = np.concatenate(list(sounds))
    return np.tile(whole, max(1, -(-size // len(whole))))


def tagging(source: Path, out: Path, model: str, *options: str) -> list[str | Path]:
    """Return a command that tags a file or a folder."""
    return [sys.executable, "-m", "ced", "tag", "-m", model, "--out", out, *options, source]


def files_part(folder: Path, count: int, sounds: Sequence[Wave], model: str) -> Iterator[Row]:
    """Measure the tagging of files of a second each."""
    source, out = folder / "sounds", folder / "tags"
    write_files(source, sounds, count, 1.0)
    cost = of_command(tagging(source, out, model))
    yield Row.of(TAG, count, cost, (out / JOURNAL_NAME).stat().st_size)
    yield Row.of(RESUME, count, of_command(tagging(source, out, model)))
    for name, work in COMBINED.items():
        cost = of_command(tagging(source, out, model, "--combine", "--format", name))
        yield Row.of(work, count, cost, (out / f"tags.{name}").stat().st_size)


def hours_part(folder: Path, hours: float, sounds: Sequence[Wave], model: str) -> Iterator[Row]:
    """Measure the tagging of a long file, with the default windows, and the decoding of it and of a shorter one."""
    flac, opus, out = folder / "long.flac", folder / "long.ogg", folder / "tags"
    write_hours(flac, sounds, hours, SAMPLE_RATE, 1, "PCM_16")
    cost = of_command(tagging(flac, out, model))
    yield Row.of(TAG, hours, cost, (out / JOURNAL_NAME).stat().st_size)
    yield Row.of(DECODE, hours, of_work(prepare_decoding, flac), flac.stat().st_size)
    write_hours(opus, sounds, OPUS_HOURS, 48_000, 2, "OPUS")
    yield Row.of(OPUS, OPUS_HOURS, of_work(prepare_decoding, opus), opus.stat().st_size)


def prepare_decoding(path: Path) -> Work:
    """Return the decoding of a file into the default windows."""

    def decode() -> None:
        options = TagOptions()
        with open_sound(path) as sound:
            for _ in cut_windows(sound.blocks(), options.window, options.step, tail=options.tail):
                pass

    return decode


def options_of(side: str) -> list[str]:
    """Return the options of a side; both write Parquet."""
    for workers, name in PLAIN.items():
        if side == name:
            return ["--jobs", str(workers), "--format", "parquet", "--combine"]
    (workers,) = (workers for workers, name in RAY.items() if side == name)
    return ["--ray", "auto", "--workers", str(workers)]


def ray_part(folder: Path, clips: int, sounds: Sequence[Wave], model: str, rounds: int) -> Iterator[Row]:
    """Measure all sides, each with few clips and with all of them."""
    found: dict[tuple[str, int], list[Cost]] = {}
    for count in (CLUSTER_FEW, clips):
        write_files(folder / f"{count}", sounds, count, CLUSTER_SECONDS)
    for number in range(rounds):
        for side in (*PLAIN.values(), *RAY.values()):
            for count in (CLUSTER_FEW, clips):
                out = folder / f"out-{number}-{count}-{side}"
                cost = of_processes(tagging(folder / f"{count}", out, model, *options_of(side)))
                found.setdefault((side, count), []).append(cost)
    for (side, count), costs in found.items():
        seconds = statistics.median(cost.seconds for cost in costs)
        processor = statistics.median(cost.processor for cost in costs)
        yield Row.of(side, count, Cost(seconds, processor, None))
