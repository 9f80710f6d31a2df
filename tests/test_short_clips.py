"""The commands of docs/short-clips.md, run unchanged on clips of 0.6 s."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[1]
RATE = 16_000


def write_clips(folder: Path) -> None:
    """Write clicks, hums and hisses of 0.6 s, their class table, and lists for training and evaluation."""
    rng = np.random.default_rng(0)
    (folder / "my_clips").mkdir()
    rows: dict[str, list[str]] = {"train": [], "eval": []}
    for number in range(60):
        wave = 0.02 * rng.standard_normal(9_600)
        if number % 3 == 0:
            wave[rng.integers(1_000, 8_000, 3)] += 0.9
        elif number % 3 == 1:
            wave += 0.3 * np.sin(2 * np.pi * rng.uniform(200, 400) * np.arange(9_600) / RATE)
        else:
            wave += 0.1 * rng.standard_normal(9_600)
        name = f"my_clips/{chr(97 + number) if number < 3 else number}.wav"
        soundfile.write(folder / name, wave, RATE)
        rows["eval" if number % 5 == 0 else "train"].append(f"{name}\t{number % 3}\n")
    for stem, lines in rows.items():
        (folder / f"{stem}.tsv").write_text("filename\tlabels\n" + "".join(lines))
    (folder / "classes.tsv").write_text("index\tname\n0\tclick\n1\thum\n2\thiss\n")


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    write_clips(tmp_path)
    page = (ROOT / "docs/short-clips.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S)
    assert len(commands) == 6
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/ced"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ced "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(program.parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "CED_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = ["bash", "-euo", "pipefail", "-c", "\n".join(commands)]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning" not in done.stderr  # the page gives what every warning would ask for
    teacher, student = (float(found) for found in re.findall(r"^mAP [\d.]+, accuracy ([\d.]+)", done.stdout, re.M))
    assert teacher > 0.8  # chance is a third
    assert student > 0.6
    assert re.search(r"Topk-1 (click|hum|hiss) 0\.\d+", done.stdout)
    rows = (tmp_path / "teacher.tsv").read_text().splitlines()
    assert [row.split("\t")[1] for row in rows] == ["name", "click", "hum", "hiss"]
    stores = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("logits/**/meta.json")}
    both = "logits/teacher_my_teacher_loudness/train/chunk_0.6"
    assert stores == {"logits/teacher/train/chunk_0.6", both}
