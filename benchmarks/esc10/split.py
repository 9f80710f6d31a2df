"""Who hears what: for each held-out fold a table to learn from, one to choose checkpoints by, one to be judged by.

What chooses never judges, and recordings cut from one source never stand on both sides. Teachers can be asked about
sounds that nobody has labelled; a fourth table has mixtures of the recordings to learn from beside them.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from ced.distill.pack_writer import pack
from ced.errors import TableError
from ced.sound.audio import SAMPLE_RATE, load
from ced.sound.tables import read_table, write_table

TABLES = ("learn", "choose", "judge")
MIXED = "mixed"
MIXTURES = 2  # for each recording
FREE = "free"
FASTEST = 1.15
AUDIOSET = Path(__file__).with_name("audioset.tsv")  # ESC-10's classes as AudioSet's
SECONDS = 5.0  # of every clip
LENGTH = round(SECONDS * SAMPLE_RATE)
_SILENT = 1e-4  # the power that a recording is taken to have at least, as a part of full scale
UNSHIPPABLE = "Sampling"  # in the name of a licence under which nothing that is given away may be made


@dataclass(frozen=True)
class Clip:
    """A recording of the data set."""

    filename: str  # <fold>-<id of the source>-<take>-<label>.ogg
    fold: int
    label: int

    @property
    def source(self) -> str:
        """The recording that it was cut from."""
        return self.filename.split("-")[1]


def read_clips(data: Path) -> tuple[list[Clip], list[str]]:
    """Return the recordings of `data`/meta.tsv (filename, fold, label, name), and the names of the classes in order.

    Raises:
        TableError: a column is missing, a fold or a label is no number, or a file is not named as in ESC-10.
    """
    meta = read_table(data / "meta.tsv", required=("filename", "fold", "label", "name"))
    clips = []
    for filename, fold, label in zip(*(meta.column(name) for name in ("filename", "fold", "label")), strict=True):
        if not fold.isdecimal() or not label.isdecimal() or filename.count("-") != 3:
            raise TableError(
                f"table {meta.path}: {filename!r}, fold {fold!r}, label {label!r}; fold and label must be numbers, and"
                " file names FOLD-SOURCE-TAKE-LABEL.ogg"
            )
        clips.append(Clip(filename, int(fold), int(label)))
    names = {clip.label: name for clip, name in zip(clips, meta.column("name"), strict=True)}
    return clips, [names[label] for label in sorted(names)]


def shippable(data: Path) -> set[str]:
    """Return the file names whose licence lets us give away what was learned from them."""
    credit = read_table(data / "credits.tsv", required=("filename", "license"))
    pairs = zip(credit.column("filename"), credit.column("license"), strict=True)
    return {filename for filename, licence in pairs if UNSHIPPABLE not in licence}


def split(clips: Sequence[Clip], fold: int) -> dict[str, list[Clip]]:
    """Split for one held-out fold: it judges; of each other fold, one source a class chooses, the one cut least often.

    Returns:
        The clips of each of `TABLES`.
    """
    judge = [clip for clip in clips if clip.fold == fold]
    known = [clip for clip in clips if clip.fold != fold]
    groups: dict[tuple[int, int], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for clip in known:
        groups[clip.fold, clip.label][clip.source] += 1
    chosen = {min(counts, key=lambda source: (counts[source], source)) for counts in groups.values()}
    choose = [clip for clip in known if clip.source in chosen]
    learn = [clip for clip in known if clip.source not in chosen]
    return dict(zip(TABLES, (learn, choose, judge), strict=True))


def prepare(data: Path, folder: Path, fold: int) -> None:
    """Write classes.tsv and pack the three tables of a held-out fold: `folder`/pack/labels/{learn,choose,judge}.tsv.

    Clips that nothing may be given away of only judge, so that any of the students may ship.
    """
    clips, names = read_clips(data)
    free = shippable(data)
    folder.mkdir(parents=True, exist_ok=True)
    mids = dict(zip(*(read_table(AUDIOSET).column(name) for name in ("name", "mid")), strict=True))
    columns = {"index": [str(index) for index in range(len(names))], "mid": [mids.get(name, "") for name in names]}
    write_table(folder / "classes.tsv", {**columns, "name": names})
    for table, members in split(clips, fold).items():
        if table != "judge":
            members = [clip for clip in members if clip.filename in free]
        columns = {
            "filename": [str((data / "audio" / clip.filename).resolve()) for clip in members],
            "labels": [str(clip.label) for clip in members],
        }
        write_table(folder / f"{table}.tsv", columns)
        pack(folder / f"{table}.tsv", folder / "pack")
    _mix_table(folder, "learn", MIXED, MIXTURES)


def prepare_unlabelled(folder: Path, mixtures: int) -> None:
    """Pack two more tables of a prepared fold, for students that need no labelled clips to choose checkpoints by.

    `free` has the recordings of `learn` and `choose`, `free_mixed<mixtures>` those and `mixtures` mixtures for each, of
    recordings played a little faster or slower.
    """
    tables = [read_table(folder / f"{table}.tsv") for table in ("learn", "choose")]
    columns = {name: [cell for table in tables for cell in table.column(name)] for name in ("filename", "labels")}
    write_table(folder / f"{FREE}.tsv", columns)
    pack(folder / f"{FREE}.tsv", folder / "pack")
    _mix_table(folder, FREE, f"{FREE}_{MIXED}{mixtures}", mixtures, fastest=FASTEST)


def mix(first: NDArray[np.float32], second: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Add two waves (t,) of which the first makes up a share of the loudness, whatever theirs was."""
    loud = [max(float(np.sqrt(np.mean(np.square(wave)))), _SILENT) for wave in (first, second)]
    both = share * first / loud[0] + (1 - share) * second / loud[1]
    gain = min(share * loud[0] + (1 - share) * loud[1], 1 / float(np.abs(both).max(initial=1e-9)))
    return (gain * both).astype(np.float32)


def _mix_table(folder: Path, table: str, out: str, mixtures: int, fastest: float = 1.0) -> None:
    """Pack the recordings of a table and mixtures of two of them, which have the labels of both.

    Args:
        folder: of the fold.
        table: name of the table of the recordings.
        out: name of the new table.
        mixtures: their number for each recording.
        fastest: recordings are played at up to this speed, or down to its inverse.
    """
    path = folder / f"{out}.tsv"
    if not path.exists():
        learned = read_table(folder / f"{table}.tsv")
        files, labels = list(learned.column("filename")), list(learned.column("labels"))
        waves = [fitted(load(Path(file))) for file in files]
        (folder / "mixtures").mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for number in range(mixtures * len(waves)):
            one, two = rng.choice(len(waves), 2, replace=False)
            first, second = (np.roll(_played(waves[of], fastest, rng), rng.integers(LENGTH)) for of in (one, two))
            mixture = folder / "mixtures" / f"{out}{number}.wav"
            soundfile.write(mixture, mix(first, second, rng.uniform(0.2, 0.8)), SAMPLE_RATE)
            files.append(str(mixture.resolve()))
            labels.append(";".join(sorted({labels[one], labels[two]})))
        write_table(path, {"filename": files, "labels": labels})
    pack(path, folder / "pack")


def _played(wave: NDArray[np.float32], fastest: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a wave (t,) at a random speed, cut or repeated to its length."""
    if fastest == 1:
        return wave
    speed = fastest ** rng.uniform(-1, 1)
    played: NDArray[np.float32] = soxr.resample(wave, SAMPLE_RATE * speed, SAMPLE_RATE)
    return np.resize(played, len(wave))


def fitted(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a wave (t,) cut or padded with zeros to the length of every clip."""
    return np.pad(wave, (0, max(0, LENGTH - len(wave))))[:LENGTH]
