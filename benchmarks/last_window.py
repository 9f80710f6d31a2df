"""Measure how often the last window of a sound gets a wrong tag, when it is short and when it is aligned.

Run as `python benchmarks/last_window.py ESC10` (a few seconds for one fold), where ESC10 is a folder with `meta.tsv`
and `audio/`. Every clip is cut to 5 s and tagged in one window of full length and a rest of 0.05 to 2 s. Columns:

    rest         seconds after the window of full length
    full         in the window of full length: clips with a wrong tag, that is, one of another class at 0.5 or more
    short        the same for a last window as short as the rest
    aligned      the same for a last window of full length that ends with the sound
    right ...    clips whose last window has the right tag at 0.5 or more
    new ...      the same for a second sound, of another class, that occurs in the rest only
"""

import argparse
import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ced import Tagger
from ced.sound.audio import SAMPLE_RATE, load

SECONDS = 5.0
RESTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)  # seconds
THRESHOLD = 0.5

Waves = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Clips:
    """Clips of one length, with the index of their class."""

    waves: Waves
    classes: NDArray[np.int64]


def read_clips(folder: Path, folds: Iterable[str], names: tuple[str, ...]) -> Clips:
    with (folder / "meta.tsv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["fold"] in set(folds)]
    length = round(SECONDS * SAMPLE_RATE)
    waves = [load(folder / "audio" / row["filename"])[:length] for row in rows]
    padded = [np.pad(wave, (0, length - len(wave))) for wave in waves]
    return Clips(padded, np.array([names.index(row["name"]) for row in rows]))


def scores(tagger: Tagger, waves: Waves) -> NDArray[np.float32]:
    """Return the scores of each wave in one window, (n, c)."""
    return np.stack([next(tagger.score((wave, SAMPLE_RATE), window=SECONDS)).probs for wave in waves])


def wrong(probs: NDArray[np.float32], classes: NDArray[np.int64]) -> float:
    """Return how many clips have a tag of another class, in percent."""
    others = probs.copy()
    np.put_along_axis(others, classes[:, None], 0.0, axis=1)
    return float((others >= THRESHOLD).any(1).mean() * 100)


def right(probs: NDArray[np.float32], classes: NDArray[np.int64]) -> float:
    """Return how many clips have the tag of their class, in percent."""
    return float((np.take_along_axis(probs, classes[:, None], axis=1) >= THRESHOLD).mean() * 100)


def loudest(wave: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """Return the stretch of a wave that has the most power."""
    power = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    start = int(np.argmax(power[samples:] - power[:-samples]))
    return wave[start : start + samples]


def measure(tagger: Tagger, clips: Clips, rest: float) -> list[float]:
    """Return the columns of the table for one length of the rest."""
    samples, waves, classes = round(rest * SAMPLE_RATE), clips.waves, clips.classes
    full, short, aligned = (
        scores(tagger, [wave[part] for wave in waves])
        for part in (slice(None, -samples), slice(-samples, None), slice(samples, None))
    )
    others = np.random.default_rng(0).permutation(len(waves))
    pairs = [(one, other) for one, other in enumerate(others) if classes[one] != classes[other]]
    heard = classes[[other for _, other in pairs]]
    new = [loudest(waves[other], samples) for _, other in pairs]
    behind = [np.concatenate([waves[one][samples:-samples], part]) for (one, _), part in zip(pairs, new, strict=True)]
    return [
        *(wrong(full, classes), wrong(short, classes), wrong(aligned, classes)),
        *(right(short, classes), right(aligned, classes)),
        *(right(scores(tagger, new), heard), right(scores(tagger, behind), heard)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure tags of last windows.")
    parser.add_argument("data", type=Path, help="ESC-10")
    parser.add_argument("--model", default="esc10", help="a model with the classes of ESC-10")
    parser.add_argument("--folds", default="5", help="1 to 5, joined by commas; esc10 has learned from folds 1 to 4")
    words = parser.parse_args()
    tagger = Tagger(words.model)
    clips = read_clips(words.data, words.folds.split(","), tagger.labels.names)
    print(f"{words.model}, folds {words.folds}: {len(clips.waves)} clips; percent of them\n")
    columns = ("rest", "full", "short", "aligned", "right short", "right aligned", "new short", "new aligned")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for rest in RESTS:
        print(
            f"| {rest:g} s | " + " | ".join(f"{value:.1f}" for value in measure(tagger, clips, rest)) + " |", flush=True
        )


if __name__ == "__main__":
    main()
