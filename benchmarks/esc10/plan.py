"""The jobs of one fold, with their commands, configurations and dependencies: teachers, stores, and students.

All students are one network. They start from random weights, are trained for the same number of steps and chunks, and
their checkpoints are chosen in the same way. The arms differ in their targets and in their data: distillation needs no
labels, so its data includes mixtures of the recordings. Jobs run in the folder of their fold, and all paths are
relative to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.esc10 import teachers
from benchmarks.esc10.split import MIXED, MIXTURES, SECONDS
from ced.config import FinetuneConfig, PretrainConfig, Section, StoreConfig, TrainConfig, TrainerConfig, check
from ced.distill.store import store_folder
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import frames_of

MODELS = Path("models")  # folder of trained networks, which have the names of their jobs
CLASSES = 10
FRAMES = frames_of(round(SECONDS * SAMPLE_RATE))
EPOCHS, STEPS = 300, 9  # of students that are trained on labels; the steps of an epoch use each clip once
PATIENT_EPOCHS, PATIENT_STEPS = 100, 27  # of distilled ones, with three times the data; as many steps in all
VALID = 54  # steps between validations
STORED = 18  # views of each clip and mixture
BRIEF = 4  # the extra arms have this number of times fewer steps
LONGER = 2  # and one of them has this number of times more
TEACHERS = {"pictures": 60, "series": 80, "recurrent": 60}  # epochs

WIDTH, DEPTH = 96, 3  # of the students
BOX_WIDTH, BOX_DEPTH = 128, 4  # of the student in the package

LEARNED = "pack/labels/learn.tsv"
_LEARN: Mapping[str, Any] = {"train_data": LEARNED}
_WITH_MIXTURES: Mapping[str, Any] = {"train_data": f"pack/labels/{MIXED}.tsv"}


def _shape(width: int, depth: int) -> dict[str, Any]:
    return {"embed_dim": width, "num_heads": width // 32, "depth": depth, "target_length": FRAMES}


_NETWORK: Mapping[str, Any] = {
    "model": "ced_tiny",
    # Some clips are a few samples longer than the others; the rest is not scored.
    "model_args": {**_shape(WIDTH, DEPTH), "pad_last": False},
    "mode": "off",
    "num_workers": 0,
    "pretrained": False,
}
_VIEWS: Mapping[str, Any] = {
    "chunk_length": SECONDS,
    "wavtransforms": {"Shift": {}},
    "spectransforms": {"TimeMasking": {"time_mask_param": 160}, "FrequencyMasking": {"freq_mask_param": 24}},
}
_NO_VIEWS: Mapping[str, Any] = {"chunk_length": SECONDS, "wavtransforms": {}, "spectransforms": {}}
_MIXUP: Mapping[str, Any] = {"mixup": 0.3}
_STUDENT: Mapping[str, Any] = {
    **_NETWORK,
    "eval_data": "pack/labels/choose.tsv",
    "batch_size": 32,
    "optimizer": "Adam",
    "optimizer_args": {"lr": 2e-3},
    "warmup_iters": 54,
    "decay_frac": 0.01,
    "early_stop": None,
}
_TEACHER: Mapping[str, Any] = {
    **_LEARN,
    **_VIEWS,
    **_MIXUP,
    "model": "ced_tiny",  # required, but not used: a teacher is a network of its own
    "classes": "classes.tsv",
    "task": "single",
    "batch_size": 16,
    "optimizer": "AdamW",
    "optimizer_args": {"lr": 3e-3, "weight_decay": 1e-3},
    "decay_frac": 0,
    "seed": 1,
}
_PRETRAINING: Mapping[str, Any] = {
    **_LEARN,
    **_NETWORK,
    "chunk_length": SECONDS,
    "epochs": 80,
    "warmup_epochs": 5,
    "optimizer_args": {"lr": 2e-3},
    "picture_every": 80,
}

LABELS: Mapping[str, Mapping[str, Any]] = {
    "labels": _NO_VIEWS,
    "labels_views": _VIEWS,
    "labels_mixup": {**_VIEWS, **_MIXUP},
}
# Without mixtures: all recordings once an epoch, as for the students that are trained on labels.
_ALONE: Mapping[str, Any] = {**_LEARN, "epochs": EPOCHS, "epoch_length": STEPS, "valid_every": VALID // STEPS}
DISTILLED: Mapping[str, Mapping[str, Any]] = {
    "own_views": {"disable_consistency": True},
    "ced": {},
    "ced_mixup": _MIXUP,
}
OF_RECORDINGS: Mapping[str, Mapping[str, Any]] = {
    "own_recordings": {**_ALONE, "disable_consistency": True},
    "ced_recordings": _ALONE,
}
FILLS = ("last_mean", "last_half", "last_random", "527")


@dataclass(frozen=True)
class Job:
    """One thing to train or to store."""

    name: str  # of its configuration, its log and its output
    command: str  # of `ced`, or "teacher"
    config: Section
    needs: tuple[str, ...] = ()  # other jobs of the fold
    arm: str | None = None  # of its student, under which it is evaluated
    seed: int = 1
    outside: str | None = None  # the outside teacher, if its views are used


def teaching() -> list[Job]:
    """Return the training of the three teachers of a fold."""
    return [
        Job(name, "teacher", check(FinetuneConfig, {**_TEACHER, "epochs": epochs}, name))
        for name, epochs in TEACHERS.items()
    ]


def groundwork() -> list[Job]:
    """Return the jobs that all students of a fold need: three teachers and their views."""
    return [*teaching(), _stored("views")]


def main(seed: int) -> list[Job]:
    """Return the arms of every fold."""
    unmixed = _unmixed()
    return [
        *(_labelled(arm, seed, changes) for arm, changes in LABELS.items()),
        *(_distilled(arm, seed, changes) for arm, changes in DISTILLED.items()),
        unmixed,
        *(_distilled(arm, seed, changes, unmixed) for arm, changes in OF_RECORDINGS.items()),
    ]


def extra(seed: int) -> list[Job]:
    """Return the extra arms of one fold: each differs in one or two settings from `short`, a shorter `ced`.

    `longer` shows whether more steps would improve the result.
    """
    brief = {"epochs": PATIENT_EPOCHS // BRIEF}
    labelled = {**_VIEWS, "epochs": EPOCHS // BRIEF}
    patient = {"epoch_length": PATIENT_STEPS, "valid_every": VALID // PATIENT_STEPS}
    jobs = [
        _distilled("short", seed, brief),
        _labelled("labels_short", seed, labelled),
        _labelled("cross_entropy", seed, {**labelled, "task": "single"}),
        _labelled("labels_mixtures", seed, {**labelled, **_WITH_MIXTURES, **brief, **patient}),
    ]
    unmixed = _unmixed()
    jobs += [unmixed, _distilled("unmixed", seed, {**_ALONE, "epochs": EPOCHS // BRIEF}, unmixed)]
    first = _masked("mae", WIDTH, {})
    jobs += [first, _distilled("masked", seed, {**brief, "pretrained": str(MODELS / first.name)})]
    jobs += [_distilled(f"stored_{epochs}", seed, {**brief, "max_aug_epochs": epochs}) for epochs in (1, 5)]
    for topk in (3, 1):
        views = _stored(f"views_top{topk}", topk=topk)
        fills = FILLS if topk == 3 else ()
        jobs += [views, _distilled(f"top_{topk}", seed, brief, views)]
        jobs += [_distilled(f"top_{topk}_{fill}", seed, {**brief, "label_type": fill}, views) for fill in fills]
    for name in TEACHERS:
        views = _stored(f"views_{name}", [name])
        jobs += [views, _distilled(f"only_{name}", seed, brief, views)]
    return [*jobs, _distilled("longer", seed, {"epochs": LONGER * PATIENT_EPOCHS})]


def box() -> list[Job]:
    """Return first weights and the student that ships: as `ced`, but larger and more slowly."""
    # It tags sounds of any length, so unlike the others it is trained with the rest at the end of a sound, padded.
    shape = {"model_args": _shape(BOX_WIDTH, BOX_DEPTH), "optimizer_args": {"lr": 1e-3}}
    slowly = {"epochs": 108, "epoch_length": 25, "valid_every": 1, "warmup_iters": 27}
    first = _masked("mae_box", BOX_WIDTH, shape)
    return [first, _distilled("box", 1, {**shape, **slowly, "pretrained": str(MODELS / first.name)})]


def _masked(name: str, width: int, changes: Mapping[str, Any]) -> Job:
    decoder = {"embed_dim": width, "num_heads": width // 32, "depth": 2}
    return Job(name, "pretrain", check(PretrainConfig, {**_PRETRAINING, "decoder_args": decoder, **changes}, name))


def _stored(
    name: str,
    who: Sequence[str] = tuple(TEACHERS),
    *,
    topk: int = CLASSES,
    epochs: int = STORED,
    changes: Mapping[str, Any] = _WITH_MIXTURES,
) -> Job:
    values = {
        **changes,
        **_VIEWS,
        "outputpath": name,
        "model": [f"{teachers.__name__}:{teacher}" for teacher in who],
        "epochs": epochs,
        "topk": topk,
        "batch_size": 16,
        "mode": "off",
        "num_workers": 0,
    }
    return Job(name, "store", check(StoreConfig, values, name), tuple(who))


def _unmixed() -> Job:
    """Return the job that stores views of the recordings alone, as many in all as with mixtures."""
    return _stored("views_unmixed", epochs=(1 + MIXTURES) * STORED, changes=_LEARN)


def _labelled(arm: str, seed: int, changes: Mapping[str, Any]) -> Job:
    values = {**_STUDENT, **_ALONE, "classes": "classes.tsv", **changes, "seed": seed}
    return _student(
        arm, "finetune", check(FinetuneConfig, values, arm), tuple(TEACHERS)
    )  # its divergence from them is measured


def _distilled(arm: str, seed: int, changes: Mapping[str, Any], views: Job | None = None) -> Job:
    views = views or _stored("views")
    assert isinstance(views.config, StoreConfig)
    logits = store_folder(views.config)
    length = {"epochs": PATIENT_EPOCHS, "epoch_length": PATIENT_STEPS, "valid_every": VALID // PATIENT_STEPS}
    values = {
        **_STUDENT,
        **_WITH_MIXTURES,
        **length,
        "logitspath": str(logits),
        "num_classes": CLASSES,
        **changes,
        "seed": seed,
    }
    return _student(arm, "train", check(TrainConfig, values, arm), (views.name,))


def _student(arm: str, command: str, config: TrainerConfig, needs: tuple[str, ...]) -> Job:
    return Job(f"{arm}-{config.seed}", command, config, (*needs, *first_weights(config)), arm, config.seed)


def first_weights(config: TrainerConfig) -> tuple[str, ...]:
    """Return the job that makes the first weights of a student; none if they are random."""
    return (Path(config.pretrained).name,) if isinstance(config.pretrained, str) else ()
