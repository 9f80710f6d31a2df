"""The whole job on one page: from a folder of recordings to a student that tags a sound.

Pack the clips, teach two networks their labels, store what both say about many views, let a third learn from that
without any label, and see on held-out clips how good they all are. It runs on sounds generated for the purpose, or on
recordings with a table of labels; interrupted, it goes on where it was.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import torch

from ced.demo.plan import GENERATED, RECORDED, Plan, Settings
from ced.demo.sounds import write_set
from ced.distill.evaluate import Evaluation, evaluate
from ced.distill.finetune import finetune
from ced.distill.pack_reader import AudioPack
from ced.distill.pack_writer import pack
from ced.distill.store import store
from ced.distill.train import train
from ced.distill.view_store import ViewStore
from ced.errors import TableError
from ced.model.loading import load_model
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.tables import read_table, write_table
from ced.tag.records import Tags
from ced.tag.tagger import Tagger

Say = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """What the job came to."""

    scores: Mapping[str, Evaluation]  # of each teacher, the ensemble and the student, on held-out clips
    parameters: Mapping[str, int]
    tagged: Mapping[str, Tags]  # held-out files as the student hears them
    views: int
    bytes_a_view: int
    seconds: Mapping[str, float]  # of each stage, in this run
    written: Mapping[str, Path]

    def lines(self) -> Iterator[str]:
        """Yield the report as text."""
        for name, tags in self.tagged.items():
            yield f"{name}: " + ", ".join(f"{tag.label} {tag.prob:.2f}" for tag in tags.tags)
        held_out = self.scores["student"]
        yield f"\nOn {held_out.clips} held-out clips of {len(held_out.labels)} classes:\n"
        yield f"{'':<12}{'mAP':>8}{'accuracy':>10}{'parameters':>12}"
        for name, found in self.scores.items():
            accuracy = "" if found.accuracy is None else f"{100 * found.accuracy:.1f} %"
            yield f"{name:<12}{found.map:>8.4f}{accuracy:>10}{self.parameters[name]:>12,}"
        yield f"\nviews stored  {self.views:,} of {self.bytes_a_view} bytes"
        yield "seconds       " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        yield f"in all        {sum(self.seconds.values()):.0f} s\n"
        for what, path in self.written.items():
            yield f"{what:<14}{path}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: on networks this small a second one costs more than it brings, twice the time here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def run(
    out: Path,
    *,
    data: Path | None = None,
    fold: int = 5,
    settings: Settings | None = None,
    say: Say = lambda line: None,
    progress: Progress = silent,
) -> Report:
    """Do the whole job in a folder.

    Args:
        out: where everything goes; each data set and fold has its own folder there.
        data: recordings with `meta.tsv` (filename, fold, label, name), audio beside it or in `audio/`; None: generated.
        fold: which fold is held out.
        settings: None: those that suit the data.
        say: told what happens, a line at a time.
        progress: told how far each stage is.

    Raises:
        TableError: meta.tsv lacks a column, or has no clip inside or outside the fold.
    """
    settings = settings or (GENERATED if data is None else RECORDED)
    folder = out / f"{'generated' if data is None else data.resolve().name}_fold{fold}"
    stages = _Stages(say)
    with stages.time("sounds", "Making sounds" if data is None else f"Reading {data}"):
        data = data or generated_set(folder / "sounds", settings)
        train_list, test_list, classes = split(data, fold, folder / "lists")
    with stages.time("pack", "Packing them"):
        train_data, test_data = (
            pack(table, folder / "pack", progress=progress).index for table in (train_list, test_list)
        )
        plan = Plan(folder, settings, train_data, classes, min(settings.chunk_seconds, median_length(train_data)))

    teachers = {}
    for number, name in enumerate(settings.teachers):
        with stages.time(name, f"Training {name} on the labels"):
            teaching = plan.teacher(name, seed=number)
            teachers[name] = finetune(teaching, name=name, resume=plan.begun(name), progress=progress)
    with stages.time("store", f"Storing what the teachers say about {settings.stored_epochs} views of each chunk"):
        logits = store(plan.store(teachers), progress=progress)
    with stages.time("student", "Distilling the student, without labels"):
        student = train(plan.student(logits), name="student", resume=plan.begun("student"), progress=progress)

    with stages.time("evaluate", "Evaluating on held-out clips"):
        scores, parameters = examine(teachers, student, test_data)
    with stages.time("tag", "Tagging a few files with the student"):
        tagged = tag_some(student, read_table(test_list).column("filename"))
    written = {"pack": train_data, **teachers, "view store": logits, "student": student}
    return Report(scores, parameters, tagged, *_cost(logits), stages.seconds, written)


def generated_set(folder: Path, settings: Settings) -> Path:
    """Write the generated sounds, unless they are there; return their folder."""
    if not (folder / "meta.tsv").exists():
        write_set(folder, clips_per_class=settings.clips_per_class, seconds=settings.clip_seconds, seed=1)
    return folder


def split(data: Path, fold: int, out: Path) -> tuple[Path, Path, Path]:
    """Write three tables: clips to learn from, clips of the held-out fold, and the classes."""
    meta = read_table(data / "meta.tsv", required=("filename", "fold", "label", "name"))
    for row, label in enumerate(meta.column("label"), start=1):
        if not label.isdecimal():
            raise TableError(f"{meta.path}, row {row}: label is {label!r}; it must be a number (0, 1, 2, ...)")
    names = dict(sorted(zip(meta.column("label"), meta.column("name"), strict=True), key=lambda pair: int(pair[0])))
    write_table(out / "classes.tsv", {"index": [str(index) for index in range(len(names))], "name": [*names.values()]})
    index_of = {label: str(index) for index, label in enumerate(names)}
    audio = data / "audio" if (data / "audio").is_dir() else data
    for table, held_out in (("train.tsv", False), ("test.tsv", True)):
        rows = [row for row, value in enumerate(meta.column("fold")) if (value == str(fold)) == held_out]
        if not rows:
            folds = ", ".join(sorted(set(meta.column("fold"))))
            raise TableError(f"fold {fold} of {meta.path} leaves no clip for {table}; its folds are {folds}")
        write_table(
            out / table,
            {
                "filename": [str(audio / meta.column("filename")[row]) for row in rows],
                "labels": [index_of[meta.column("label")[row]] for row in rows],
            },
        )
    return out / "train.tsv", out / "test.tsv", out / "classes.tsv"


def median_length(table: Path) -> float:
    """Return the seconds of the median clip of a pack."""
    clips = AudioPack(table)
    return median_low(clips.samples(row) for row in range(len(clips))) / SAMPLE_RATE


def examine(
    teachers: Mapping[str, Path], student: Path, test_data: Path
) -> tuple[dict[str, Evaluation], dict[str, int]]:
    """Return the scores and the number of parameters of each teacher, all of them together, and the student."""
    taggers = {name: [load_model(path)] for name, path in teachers.items()}
    taggers["ensemble"] = [model for members in taggers.values() for model in members]
    taggers["student"] = [load_model(student)]
    scores = {name: evaluate(models, test_data) for name, models in taggers.items()}
    return scores, {name: sum(map(_parameters, models)) for name, models in taggers.items()}


def tag_some(student: Path, files: Sequence[str], count: int = 4) -> dict[str, Tags]:
    """Tag some files, as anyone would who was given the student."""
    tagger = Tagger(student)
    return {file: tagger.tag(file)[0] for file in files[:: max(1, len(files) // count)][:count]}


class _Stages:
    """Says what is done, and takes the time."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str, what: str) -> Iterator[None]:
        self.say(f"{what} ...")
        began = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - began


def _parameters(model: CED) -> int:
    return sum(weights.numel() for weights in model.parameters())


def _cost(logits: Path) -> tuple[int, int]:
    """Return how many views a store has, and the bytes of one."""
    views = ViewStore(logits)
    first = views.rows(1)
    return views.epochs * len(first), (first.values.nbytes + first.indexes.nbytes + first.seeds.nbytes) // len(first)
