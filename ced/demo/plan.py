"""What the job is told: how large its networks are, how long they learn, and the configurations that follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from ced.distill.view_store import ViewStore
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import FrontEnd, frames_of


@dataclass(frozen=True)
class Settings:
    """How large the networks are and how long they learn."""

    teachers: Mapping[str, Mapping[str, Any]]  # name: what is changed about ced_tiny's network
    student: Mapping[str, Any]
    teacher_epochs: int
    student_epochs: int
    stored_epochs: int  # views of each chunk
    lr: float
    batch_size: int
    chunk_seconds: float = 2.5  # of what is heard at once, unless most clips are shorter; more is slower to learn
    warmup_epochs: float = 3
    mixup: float | None = None
    mask: float = 0.1  # widest mask as a part of the picture, in time and in frequency
    topk: int = 5
    clips_per_class: int = 60  # of the generated sounds
    clip_seconds: float = 2.0


GENERATED = Settings(
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
RECORDED = Settings(
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
class Plan:
    """The configurations of the job; what is not named here has its default."""

    folder: Path
    settings: Settings
    train_data: Path  # table of the pack
    classes: Path
    seconds: float  # of a chunk

    def teacher(self, name: str, seed: int) -> FinetuneConfig:
        """Return how a teacher learns the labels."""
        return FinetuneConfig(
            **self._learning(self.settings.teachers[name], self.settings.teacher_epochs),
            classes=self.classes,
            task="single",
            chunk_length=self.seconds,
            seed=seed,
            wavtransforms=self.wavtransforms,
            spectransforms=self.spectransforms,
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
            wavtransforms=self.wavtransforms,
            spectransforms=self.spectransforms,
        )

    def student(self, logits: Path) -> TrainConfig:
        """Return how the student learns from the store."""
        return TrainConfig(
            **self._learning(self.settings.student, self.settings.student_epochs),
            logitspath=logits,
            num_classes=ViewStore(logits).meta.num_classes,
        )

    def begun(self, name: str) -> Path | None:
        """Return the newest experiment of a name, if an earlier run of the job began one."""
        found = sorted((self.folder / "experiments" / name).glob("*/config.yaml"))
        return found[-1].parent if found else None

    @property
    def wavtransforms(self) -> WavTransforms:
        """What a view does to a clip's wave."""
        return WavTransforms(Shift=ShiftArgs())

    @property
    def spectransforms(self) -> SpecTransforms:
        """What a view does to a clip's mel: masks up to a part of the picture."""
        return SpecTransforms(
            TimeMasking=TimeMaskingArgs(time_mask_param=round(self.settings.mask * self._frames)),
            FrequencyMasking=FrequencyMaskingArgs(freq_mask_param=round(self.settings.mask * FrontEnd.n_mels)),
        )

    @property
    def _frames(self) -> int:
        return frames_of(round(self.seconds * SAMPLE_RATE))

    def _learning(self, size: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        """Return what teachers and student share. There is no validation: nothing held out is seen before the end."""
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
