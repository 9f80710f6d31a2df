"""Losses of tiny deterministic runs, which change with the data order, the views, the targets or the arithmetic.

The values are those of this project's first release on a CPU in float32. They may differ in the last digits from one
processor to another, far less than by a change of the training.
"""

from pathlib import Path
from typing import Any

import pytest

from ced.config import FinetuneConfig, PretrainConfig, TrainConfig, check
from ced.distill.finetune import finetune
from ced.distill.pretrain import pretrain
from ced.distill.train import train
from tests.distill.trainings import MASKS, measurements, settings

GOLDEN = {
    "train": [0.56241328, 0.53225011, 0.51990384, 0.49298859],
    "finetune": [0.54750675, 0.51765412, 0.49171281, 0.47536540],
    "pretrain": [1.00682152, 0.96074659, 0.92314297, 0.91409010],
}


def losses(folder: Path) -> list[float]:
    return [epoch["loss"] for epoch in measurements(folder)]


def values(sounds: Path, out: Path, **more: Any) -> dict[str, Any]:
    return settings(sounds, out, epochs=4, warmup_epochs=1, optimizer_args={"lr": 0.003}, **more)


def test_the_losses_of_distillation_are_unchanged(sounds: Path, tmp_path: Path) -> None:
    config = values(sounds, tmp_path, logitspath=sounds / "store", num_classes=4, mixup=0.5, label_type="last_random")
    found = losses(train(check(TrainConfig, config, "test"), name="golden"))
    assert found == pytest.approx(GOLDEN["train"], rel=1e-4)


def test_the_losses_of_fine_tuning_are_unchanged(sounds: Path, tmp_path: Path) -> None:
    config = values(sounds, tmp_path, classes=sounds / "classes.tsv", chunk_length=0.8, spectransforms=MASKS)
    found = losses(finetune(check(FinetuneConfig, config, "test"), name="golden"))
    assert found == pytest.approx(GOLDEN["finetune"], rel=1e-4)


def test_the_losses_of_masked_pre_training_are_unchanged(sounds: Path, tmp_path: Path) -> None:
    decoder = {"embed_dim": 24, "num_heads": 2, "depth": 1}
    config = values(sounds, tmp_path, chunk_length=0.8, decoder_args=decoder)
    found = losses(pretrain(check(PretrainConfig, config, "test"), name="golden"))
    assert found == pytest.approx(GOLDEN["pretrain"], rel=1e-4)
