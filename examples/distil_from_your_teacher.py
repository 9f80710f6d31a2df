"""Distil a student from a teacher of your own: any callable from log-mel features to probabilities.

The teacher here follows a rule that can be checked by hand; a large network of yours is named in the same way, as
`module:callable`. No clip has a label: the student learns only from the scores of the teacher for its views.

python examples/distil_from_your_teacher.py --out distilled
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

from ced.sound.labels import ClassTable

RATE = 16_000
STUDENT = """\
model: ced_tiny
pretrained: false
model_args: {embed_dim: 64, num_heads: 2, depth: 2, target_length: 101}
train_data: pack/labels/train.tsv
eval_data: null      # no labels; the last checkpoint is the result
num_classes: 2
batch_size: 16
epochs: 30
warmup_epochs: 3
optimizer: Adam
optimizer_args: {lr: 0.002}
mode: off
"""


class LowOrHigh(torch.nn.Module):
    """A teacher of two classes: whether most energy lies in the lower or in the upper half of the mel bands."""

    labels = ClassTable(("low", "high"))

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Return probabilities, log-mel features in dB (b, 64, frames) -> (b, 2)."""
        low, high = mel[:, :32].mean((1, 2)), mel[:, 32:].mean((1, 2))
        probability = torch.sigmoid((high - low) / 2)
        return torch.stack([1 - probability, probability], dim=1)


teacher = LowOrHigh()  # named on the command line as distil_from_your_teacher:teacher


def make_sounds(folder: Path) -> None:
    """Write 48 clips to learn from, with a list of them, and two to try the student on."""
    rng = np.random.default_rng(0)
    (folder / "sounds").mkdir(parents=True, exist_ok=True)
    names = [*(f"sounds/{number}.wav" for number in range(48)), "low.wav", "high.wav"]
    for number, name in enumerate(names):
        band = (100, 900) if number % 2 == 0 else (3_000, 7_000)
        tones = [np.sin(2 * np.pi * rng.uniform(*band) * np.arange(RATE) / RATE) for _ in range(12)]
        soundfile.write(folder / name, 0.06 * sum(tones) + 0.01 * rng.standard_normal(RATE), RATE)
    (folder / "train.tsv").write_text("filename\n" + "\n".join(names[:48]) + "\n", encoding="utf-8")


def ced(folder: Path, command: str) -> str:
    """Run a command of ced in a folder, with this file where Python finds it, and return what it printed."""
    print(f"$ ced {command}", flush=True)
    here = str(Path(__file__).resolve().parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-m", "ced", *command.split()]
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)
    return done.stdout.strip()


def main() -> None:
    """Make sounds, then pack, store, train and tag."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("distilled"))
    folder = parser.parse_args().out
    make_sounds(folder)
    (folder / "student.yaml").write_text(STUDENT, encoding="utf-8")
    ced(folder, "pack train.tsv pack")
    store = ced(
        folder,
        "store --model distil_from_your_teacher:teacher --train-data pack/labels/train.tsv"
        " --chunk-length 1 --topk 2 --epochs 4 --mode off",
    )
    student = ced(folder, f"train student.yaml --logitspath {store}")
    ced(folder, f"tag -m {student} low.wav high.wav")


if __name__ == "__main__":
    main()
