"""Students of an outside teacher that was trained on AudioSet: the jobs of one fold, and their evaluation.

The students have AudioSet's 527 classes. No label is used: a table maps each class of ESC-10 to AudioSet classes,
and the most probable of those counts. All students are one network, are trained for the same number of steps, and keep
their last weights: no labelled clips choose checkpoints. Those of the teacher begin with the weights of a masked
pre-training on the same sounds, which is done once a fold.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.esc10 import plan, split, teachers
from benchmarks.esc10.judge import CPU, HELD_OUT, Clips, Verdict, divergences
from benchmarks.esc10.plan import MODELS, Job
from benchmarks.esc10.split import LENGTH
from ced.config import FinetuneConfig, PretrainConfig, StoreConfig, TeacherEntry, TrainConfig, check
from ced.distill.pack_reader import AudioPack
from ced.distill.store import store_folder
from ced.distill.teachers import Ensemble, load_teacher, teacher_name
from ced.distill.views import NO_VIEW
from ced.model.loading import TorchScorer, load_model
from ced.model.metrics import average_precision
from ced.sound.decode import to_float
from ced.sound.labels import audioset
from ced.sound.tables import read_table

TEACHER = "outside"  # the arm of the teacher itself
VIEWS = "outside_views"
MASKED = "outside_masked"  # the masked pre-training
CLASSES = 527
WIDTH, DEPTH = 128, 6
EPOCHS, STEPS, BATCH = 10, 150, 32
MASKED_EPOCHS = 20  # of the pre-training, with as many steps each
STORED, TOPK = 8, 20  # views of each clip, and scores of each view
MIXTURES = 2  # for each recording
PROBE_C = 0.1  # inverse strength of the probe's regularisation

FREE, FREE_MIXED = f"pack/labels/{split.FREE}.tsv", f"pack/labels/{split.FREE}_{split.MIXED}{MIXTURES}.tsv"
_VIEWS: Mapping[str, Any] = {
    "chunk_length": split.SECONDS,
    "wavtransforms": {"Shift": {}},
    "spectransforms": {"TimeMasking": {"time_mask_param": 160}, "FrequencyMasking": {"freq_mask_param": 24}},
}
_TRAINING: Mapping[str, Any] = {
    "model": "ced_tiny",
    "model_args": {
        "embed_dim": WIDTH,
        "num_heads": WIDTH // 32,
        "depth": DEPTH,
        "target_length": plan.FRAMES,
        "pad_last": False,
    },
    "mode": "amp_bf16",
    "num_workers": 0,
    "pretrained": False,
    "batch_size": BATCH,
    "optimizer": "Adam",
    "optimizer_args": {"lr": 1e-3},
    "warmup_iters": 100,
    "decay_frac": 0.01,
    "epochs": EPOCHS,
    "epoch_length": STEPS,
}
_MASKED: Mapping[str, Any] = {
    **_TRAINING,
    "decoder_args": {"embed_dim": WIDTH, "num_heads": WIDTH // 32, "depth": 2},
    "chunk_length": split.SECONDS,
    "epochs": MASKED_EPOCHS,
    "picture_every": MASKED_EPOCHS,
    "seed": 1,
}
LABELS: Mapping[str, Mapping[str, Any]] = {
    "outside_labels": {"wavtransforms": {}, "spectransforms": {}},
    "outside_labels_views": {},
    "outside_labels_mixup": {"mixup": 0.3},
    "outside_labels_mixtures": {"train_data": FREE_MIXED},
    # As many steps as the first weights of `outside_tuned` and its own together.
    "outside_labels_double": {"epochs": 2 * EPOCHS},
    "outside_labels_masked": {"pretrained": str(MODELS / MASKED)},
}
CED, OWN, TUNED = "outside_ced", "outside_own_views", "outside_tuned"
CED_ALL, RECORDINGS, FRESH = "outside_ced_all", "outside_recordings", "outside_ced_fresh"
_FRESH: Mapping[str, Any] = {"pretrained": False}
CHANGED: Mapping[str, Mapping[str, Any]] = {
    FRESH: _FRESH,
    "outside_ced_half": {"epochs": EPOCHS // 2},
    "outside_ced_double": {"epochs": 2 * EPOCHS},
    "outside_ced_fourfold": {"epochs": 4 * EPOCHS},
    "outside_ced_wide": {**_FRESH, "model_args": {**_TRAINING["model_args"], "embed_dim": 192, "num_heads": 6}},
    "outside_ced_deep": {**_FRESH, "model_args": {**_TRAINING["model_args"], "depth": 12}},
    "outside_ced_one_view": {"max_aug_epochs": 1},
    "outside_ced_last_half": {"label_type": "last_half"},
}
STORED_CHANGED: Mapping[str, Mapping[str, Any]] = {
    "outside_ced_topk_5": {"topk": 5},
    # The teacher was trained without masks in frequency.
    "outside_ced_freq_8": {
        "spectransforms": {**_VIEWS["spectransforms"], "FrequencyMasking": {"freq_mask_param": 8}},
    },
}
MAIN = (CED, OWN, "outside_labels_views", TUNED, *LABELS, CED_ALL, RECORDINGS)
ARMS = tuple(dict.fromkeys((*MAIN, *CHANGED, *STORED_CHANGED)))


def jobs(teacher: str, seed: int) -> list[Job]:
    """Return the arms of one seed, each after the jobs that it needs."""
    small = [f"{teachers.__name__}:{name}" for name in plan.TEACHERS]
    alone = _stored(VIEWS, [teacher])
    together = _stored(f"{VIEWS}_all", [teacher, *small])
    recordings = _stored(f"{VIEWS}_recordings", [teacher], train_data=FREE, epochs=(1 + MIXTURES) * STORED)
    ced = _distilled(CED, seed, alone)
    found = [
        Job(MASKED, "pretrain", check(PretrainConfig, {**_MASKED, "train_data": FREE_MIXED}, MASKED)),
        alone,
        ced,
        _distilled(OWN, seed, alone, disable_consistency=True),
        *(_labelled(arm, seed, changes) for arm, changes in LABELS.items()),
        _labelled(TUNED, seed, {"pretrained": str(MODELS / ced.name)}),
        together,
        _distilled(CED_ALL, seed, together),
        recordings,
        _distilled(RECORDINGS, seed, recordings),
        *(_distilled(arm, seed, alone, **changes) for arm, changes in CHANGED.items()),
    ]
    for arm, changes in STORED_CHANGED.items():
        views = _stored(f"{arm}_views", [teacher], **changes)
        found += [views, _distilled(arm, seed, views)]
    return [replace(job, outside=teacher) for job in found]


def _stored(name: str, who: list[str], **changes: Any) -> Job:
    values = {
        **_VIEWS,
        "train_data": FREE_MIXED,
        "outputpath": name,
        "model": who,
        "classes": "audioset",
        "epochs": STORED,
        "topk": TOPK,
        "batch_size": 32,
        "mode": "off",
        "num_workers": 0,
        **changes,
    }
    needs = tuple(plan.TEACHERS) if len(who) > 1 else ()
    return Job(name, "store", check(StoreConfig, values, name), needs)


def _distilled(arm: str, seed: int, views: Job, **changes: Any) -> Job:
    assert isinstance(views.config, StoreConfig)
    values = {
        **_TRAINING,
        "train_data": str(views.config.train_data),
        "logitspath": str(store_folder(views.config)),
        "pretrained": str(MODELS / MASKED),
        **changes,
        "seed": seed,
    }
    config = check(TrainConfig, values, arm)
    return Job(f"{arm}-{seed}", "train", config, (views.name, *plan.first_weights(config)), arm, seed)


def _labelled(arm: str, seed: int, changes: Mapping[str, Any]) -> Job:
    values = {**_TRAINING, **_VIEWS, "train_data": FREE, "classes": "classes.tsv", **changes, "seed": seed}
    config = check(FinetuneConfig, values, arm)
    return Job(f"{arm}-{seed}", "finetune", config, plan.first_weights(config), arm, seed)


def student(folder: Path, job: Job, fold: int) -> Verdict:
    """Evaluate a student: by ESC-10's classes, a linear probe on its embeddings, and its divergence from its teacher.

    The probe is trained with the labels of the recordings that the student was trained on. Adjusted scores need no
    labels: those of each class are divided by their mean over these recordings.
    """
    assert job.outside is not None
    network = load_model(folder / MODELS / job.name)
    scorer = TorchScorer(network)
    waves = {table: _waves(folder, table) for table in (HELD_OUT, FREE)}
    scores = {table: np.concatenate([scorer(wave[None]) for wave in found]) for table, found in waves.items()}
    vectors = {table: np.concatenate([scorer.embed(wave[None]) for wave in found]) for table, found in waves.items()}
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_C, max_iter=2000))
    probe.fit(vectors[FREE], _labels(folder, FREE))
    probed = probe.predict(vectors[HELD_OUT]) == _labels(folder, HELD_OUT)
    verdict = _verdict(job.arm or job.name, folder, fold, job.seed, scores[HELD_OUT], scores[FREE])
    assert verdict.clips is not None
    clips = replace(verdict.clips, probe=_digits(probed))
    apart: dict[str, float] = {}
    if len(network.labels) == CLASSES:
        by_clip = {table: divergences(found, _taught(folder, table, job.outside)) for table, found in scores.items()}
        apart = {table: round(float(values.mean()), 5) for table, values in by_clip.items()}
        clips = replace(clips, divergence=tuple(round(float(value), 5) for value in by_clip[HELD_OUT]))
    return replace(
        verdict,
        probe=round(float(probed.mean()), 4),
        divergence=apart.get(HELD_OUT),
        divergence_learned=apart.get(FREE),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        clips=clips,
        teacher=teacher_name(job.outside),
    )


def taught(folder: Path, fold: int, teacher: str) -> Verdict:
    """Evaluate the teacher itself."""
    scores = {table: _taught(folder, table, teacher) for table in (HELD_OUT, FREE)}
    verdict = _verdict(TEACHER, folder, fold, 1, scores[HELD_OUT], scores[FREE])
    return replace(verdict, divergence=0.0, divergence_learned=0.0, teacher=teacher_name(teacher))


def ten(scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return for each of ESC-10's classes the highest probability of its AudioSet classes, (n, 527) -> (n, 10)."""
    names = audioset().names
    groups = [[names.index(name) for name in cell.split(";")] for cell in read_table(split.AUDIOSET).column("audioset")]
    return np.stack([scores[:, group].max(1) for group in groups], axis=1)


def adjusted(scores: NDArray[np.floating], learned: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return scores (n, c) divided by the mean of their class over the clips that were learned, (m, c)."""
    return np.asarray(scores / learned.mean(0))


def _verdict(
    arm: str, folder: Path, fold: int, seed: int, scores: NDArray[np.floating], learned: NDArray[np.floating]
) -> Verdict:
    labels = _labels(folder, HELD_OUT)
    found, usual = (ten(each) if each.shape[1] == CLASSES else each for each in (scores, learned))
    right = found.argmax(1) == labels
    right_adjusted = adjusted(found, usual).argmax(1) == labels
    names = read_table(folder / teachers.CLASSES).column("name")
    per_class = average_precision(np.eye(len(names), dtype=bool)[labels], found)
    return Verdict(
        arm,
        fold,
        seed,
        accuracy=round(float(right.mean()), 4),
        map=round(float(per_class.mean()), 4),
        divergence=None,
        divergence_learned=None,
        per_class={name: round(float(ap), 4) for name, ap in zip(names, per_class, strict=True)},
        parameters=None,
        adjusted=round(float(right_adjusted.mean()), 4),
        clips=Clips(_sources(folder, HELD_OUT), _digits(right), _digits(right_adjusted)),
    )


def _digits(right: NDArray[np.bool_]) -> str:
    return "".join(str(int(one)) for one in right)


@cache
def _waves(folder: Path, table: str) -> list[NDArray[np.float32]]:
    """Return the recordings of a table, each (t,) in [-1, 1]."""
    pack = AudioPack(folder / table)
    return [to_float(pack.read(clip, 0, pack.samples(clip))) for clip in range(len(pack))]


@cache
def _labels(folder: Path, table: str) -> NDArray[np.int64]:
    return np.array([int(label) for label in read_table(folder / table).column("labels")])


@cache
def _sources(folder: Path, table: str) -> tuple[str, ...]:
    """Return the recording that each clip was cut from: ESC-10's files are named FOLD-SOURCE-TAKE-LABEL."""
    return tuple(Path(name).name.split("-")[1] for name in read_table(folder / table).column("filename"))


@cache
def _taught(folder: Path, table: str, teacher: str) -> NDArray[np.float32]:
    """Return the outside teacher's probabilities of the recordings of a table, without a view, (n, 527)."""
    ensemble = open_teacher(teacher)
    waves = (torch.from_numpy(wave[None]) for wave in _waves(folder, table))
    return np.concatenate([ensemble(wave, torch.zeros(1, 2)).numpy() for wave in waves])


def open_teacher(teacher: str) -> Ensemble:
    """Return a teacher that scores AudioSet's classes, in their order, without masks."""
    return Ensemble([load_teacher(TeacherEntry(name=teacher), {}, CPU)], "off", NO_VIEW, LENGTH, CPU, audioset())
