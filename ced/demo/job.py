"""The whole method on one page: from a folder of recordings to a student that tags a sound.

Pack the clips, train two teachers on their labels, store the teachers' scores of many views, distil a student from
them without labels, and evaluate all of them on held-out clips. The recordings are generated, or a folder of audio with
a table of labels. An interrupted run is resumed by repeating it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import torch

from ced.config import (
    FinetuneConfig,
    FrequencyMaskingArgs,
    ShiftArgs,
    SpecTransforms,
    StoreConfig,
    TimeMaskingArgs,
    TrainConfig,
    WavTransforms,
)
from ced.demo.sounds import write_sounds
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
from ced.sound.features import FrontEnd, frames_of
from ced.sound.tables import read_table, write_table
from ced.tag.records import Tags
from ced.tag.tagger import Tagger

SHIFT = WavTransforms(Shift=ShiftArgs())


@dataclass(frozen=True)
class DemoSettings:
    """The sizes of the networks and the lengths of their trainings."""

    teachers: Mapping[str, Mapping[str, Any]]  # name: changes to the network of ced_tiny
    student: Mapping[str, Any]
    teacher_epochs: int
    student_epochs: int
    stored_epochs: int  # views of each chunk
    lr: float
    batch_size: int
    chunk_seconds: float = 2.5  # at most; shorter if most clips are
    warmup_epochs: float = 3
    mixup: float | None = None
    mask: float = 0.1  # widest mask as a part of the mel, in time and in frequency
    topk: int = 5
    clips_per_class: int = 60  # of the generated sounds
    clip_seconds: float = 2.0


GENERATED = DemoSettings(
    teachers={
        "teacher_a": {"embed_dim": 96, "num_heads": 3, "depth": 4},
        "teacher_b": {"embed_dim": 128, "num_heads": 4, "depth": 2},
    },
    student={"embed_dim": 64, "num_heads": 2, "depth": 4},
    teacher_epochs=26,
    student_epochs=36,
    stored_epochs=12,
    lr=2e-3,
    batch_size=8,
)
RECORDED = DemoSettings(
    teachers={
        "teacher_a": {"embed_dim": 96, "num_heads": 3, "depth": 4},
        "teacher_b": {"embed_dim": 128, "num_heads": 4, "depth": 3},
    },
    student={"embed_dim": 64, "num_heads": 2, "depth": 4},
    teacher_epochs=120,
    student_epochs=80,
    stored_epochs=20,
    lr=1e-3,
    batch_size=8,
    warmup_epochs=5,
    mixup=0.2,
)


@dataclass(frozen=True)
class DemoReport:
    """The results of a run."""

    scores: Mapping[str, Evaluation]  # of each teacher, the ensemble and the student, on held-out clips
    parameters: Mapping[str, int]
    tagged: Mapping[str, Tags]  # the student's tags of a few held-out files
    views: int
    bytes_per_view: int
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
        yield f"\nviews stored  {self.views:,} of {self.bytes_per_view} bytes"
        yield "seconds       " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        yield f"total         {sum(self.seconds.values()):.0f} s\n"
        for what, path in self.written.items():
            yield f"{what:<14}{path}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: for networks this small, a second one made the run twice as long when measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def run_demo(
    out: Path,
    *,
    data: Path | None = None,
    fold: int = 5,
    settings: DemoSettings | None = None,
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> DemoReport:
    """Run the whole method in a folder.

    Args:
        out: folder for the output; each data set and fold has a folder of its own in it.
        data: recordings with `meta.tsv` (filename, fold, label, name), audio beside it or in `audio/`; None: generated.
        fold: the fold that is held out.
        settings: None: `GENERATED` or `RECORDED`.
        announce: called with a line before each stage.
        progress: called as each stage advances.

    Raises:
        TableError: meta.tsv lacks a column, or has no clip inside or outside the fold.
    """
    settings = settings or (GENERATED if data is None else RECORDED)
    folder = out / f"{'generated' if data is None else data.resolve().name}_fold{fold}"
    stages = _Stages(announce)
    with stages.time("sounds", "Generating sounds" if data is None else f"Reading {data}"):
        data = data or generated_sounds(folder / "sounds", settings)
        train_list, test_list, classes = split(data, fold, folder / "lists")
    with stages.time("pack", "Packing them"):
        train_data, test_data = (
            pack(table, folder / "pack", progress=progress).index for table in (train_list, test_list)
        )
        seconds = min(settings.chunk_seconds, median_length(train_data))
        configs = DemoConfigs(folder, settings, train_data, classes, seconds)

    teachers = {}
    for number, name in enumerate(settings.teachers):
        with stages.time(name, f"Training {name} on the labels"):
            resume = configs.begun(name)
            teachers[name] = finetune(configs.teacher(name, seed=number), name=name, resume=resume, progress=progress)
    with stages.time("store", f"Storing the teachers' scores of {settings.stored_epochs} views of each chunk"):
        logits = store(configs.store(teachers), progress=progress)
    with stages.time("student", "Distilling the student, without labels"):
        resume = configs.begun("student")
        student = train(configs.student(logits), name="student", resume=resume, progress=progress)

    with stages.time("evaluate", "Evaluating on held-out clips"):
        scores, parameters = evaluate_all(teachers, student, test_data)
    with stages.time("tag", "Tagging a few files with the student"):
        tagged = tag_some(student, read_table(test_list).column("filename"))
    written = {"pack": train_data, **teachers, "view store": logits, "student": student}
    return DemoReport(scores, parameters, tagged, *_size_of_store(logits), stages.seconds, written)


def generated_sounds(folder: Path, settings: DemoSettings) -> Path:
    """Write the generated sounds unless they exist; return their folder."""
    if not (folder / "meta.tsv").exists():
        write_sounds(folder, clips_per_class=settings.clips_per_class, seconds=settings.clip_seconds, seed=1)
    return folder


def split(data: Path, fold: int, out: Path) -> tuple[Path, Path, Path]:
    """Write and return three tables: clips to train on, clips of the held-out fold, and the classes."""
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
    """Return the length of the median clip of a pack in seconds."""
    lengths: list[int] = AudioPack(table).lengths().tolist()
    return median_low(lengths) / SAMPLE_RATE


def evaluate_all(
    teachers: Mapping[str, Path], student: Path, test_data: Path
) -> tuple[dict[str, Evaluation], dict[str, int]]:
    """Return results and number of parameters of each teacher, of their ensemble, and of the student."""
    taggers = {name: [load_model(path)] for name, path in teachers.items()}
    taggers["ensemble"] = [model for members in taggers.values() for model in members]
    taggers["student"] = [load_model(student)]
    scores = {name: evaluate(models, test_data) for name, models in taggers.items()}
    return scores, {name: sum(map(_parameters, models)) for name, models in taggers.items()}


def tag_some(student: Path, files: Sequence[str], count: int = 4) -> dict[str, Tags]:
    """Tag some files through the public interface for tagging."""
    tagger = Tagger(student)
    return {file: tagger.tag(file)[0] for file in files[:: max(1, len(files) // count)][:count]}


@dataclass(frozen=True)
class DemoConfigs:
    """The configurations of a run; keys that are not set here have their defaults."""

    folder: Path
    settings: DemoSettings
    train_data: Path  # table of the pack
    classes: Path
    seconds: float  # of a chunk

    def teacher(self, name: str, seed: int) -> FinetuneConfig:
        """Return how a teacher is trained on the labels."""
        return FinetuneConfig(
            **self._training(self.settings.teachers[name], self.settings.teacher_epochs),
            classes=self.classes,
            task="single",
            chunk_length=self.seconds,
            seed=seed,
            wavtransforms=SHIFT,
            spectransforms=self._masks(),
        )

    def store(self, teachers: Mapping[str, Path]) -> StoreConfig:
        """Return how the views of the ensemble are stored."""
        return StoreConfig(
            train_data=self.train_data,
            outputpath=self.folder / "logits",
            model=[str(path) for path in teachers.values()],
            epochs=self.settings.stored_epochs,
            topk=self.settings.topk,
            chunk_length=self.seconds,
            mode="off",
            wavtransforms=SHIFT,
            spectransforms=self._masks(),
        )

    def student(self, logits: Path) -> TrainConfig:
        """Return how the student is trained on the store."""
        return TrainConfig(
            **self._training(self.settings.student, self.settings.student_epochs),
            logitspath=logits,
            num_classes=ViewStore(logits).meta.num_classes,
        )

    def begun(self, name: str) -> Path | None:
        """Return the newest experiment of a name, if an earlier run began one."""
        found = sorted((self.folder / "experiments" / name).glob("*/config.yaml"))
        return found[-1].parent if found else None

    def _masks(self) -> SpecTransforms:
        return SpecTransforms(
            TimeMasking=TimeMaskingArgs(time_mask_param=round(self.settings.mask * self._frames)),
            FrequencyMasking=FrequencyMaskingArgs(freq_mask_param=round(self.settings.mask * FrontEnd.n_mels)),
        )

    @property
    def _frames(self) -> int:
        return frames_of(round(self.seconds * SAMPLE_RATE))

    def _training(self, size: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        """Return the keys that teachers and student share; without validation, no held-out clip is used."""
        return {
            "train_data": self.train_data,
            "eval_data": None,
            "outputpath": self.folder / "experiments",
            "model": "ced_tiny",
            "model_args": {**size, "target_length": self._frames},
            "pretrained": False,
            "batch_size": self.settings.batch_size,
            "epochs": epochs,
            "warmup_epochs": self.settings.warmup_epochs,
            "optimizer": "Adam",
            "optimizer_args": {"lr": self.settings.lr},
            "mixup": self.settings.mixup,
            "mode": "off",
        }


class _Stages:
    """Announces and times the stages of a run."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.announce = announce
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str, what: str) -> Iterator[None]:
        self.announce(f"{what} ...")
        began = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - began


def _parameters(model: CED) -> int:
    return sum(weights.numel() for weights in model.parameters())


def _size_of_store(logits: Path) -> tuple[int, int]:
    """Return the number of views of a store, and the bytes of one."""
    views = ViewStore(logits)
    first = views.rows(1)
    return views.epochs * len(first), (first.values.nbytes + first.indexes.nbytes + first.seeds.nbytes) // len(first)
