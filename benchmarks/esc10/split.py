"""Who hears what: for each held-out fold a table to learn from, one to choose checkpoints by, one to be judged by.

What chooses never judges, and recordings cut from one source never stand on both sides.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ced.distill.wavpack import pack
from ced.sound.tables import read_table, write_table

TABLES = ("learn", "choose", "judge")
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
        TableError: a column is missing.
    """
    meta = read_table(data / "meta.tsv", required=("filename", "fold", "label", "name"))
    columns = (meta.column(name) for name in ("filename", "fold", "label"))
    clips = [Clip(filename, int(fold), int(label)) for filename, fold, label in zip(*columns, strict=True)]
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
    write_table(folder / "classes.tsv", {"index": [str(index) for index in range(len(names))], "name": names})
    for table, members in split(clips, fold).items():
        if table != "judge":
            members = [clip for clip in members if clip.filename in free]
        columns = {
            "filename": [str((data / "audio" / clip.filename).resolve()) for clip in members],
            "labels": [str(clip.label) for clip in members],
        }
        write_table(folder / f"{table}.tsv", columns)
        pack(folder / f"{table}.tsv", folder / "pack")
