"""Commands on disks that are too small: a one-line error, no partial file, and a rerun with more space completes.

All of them run in one process, in a mount namespace of its own, on a file system in memory whose size is changed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ced.model import loading
from ced.model.config import ModelConfig
from ced.model.vit import CED
from ced.sound.labels import ClassTable

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ("pack", "store", "train", "finetune", "pretrain", "export", "tag")

DRIVER = """
import contextlib, json, os, shutil, subprocess, sys
from pathlib import Path

import safetensors.numpy

jobs, disk, parts = json.loads(sys.argv[1]), Path("disk").absolute(), (0.0, 0.3, 0.6, 0.85, 0.97)
sys.path.insert(0, os.getcwd())
from ced.cli import main

def mount(size, *options):
    how = ",".join([f"size={max(size, 4096)}", *options])
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(disk)], check=True)

def run(words):
    "Return exit code, standard output and all that was written to standard error, by C libraries as well."
    sys.argv = ["ced", *words]
    kept = os.dup(1), os.dup(2)
    with open("printed", "w+b") as printed, open("warned", "w+b") as warned:
        os.dup2(printed.fileno(), 1), os.dup2(warned.fileno(), 2)
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        printed.seek(0), warned.seek(0)
        return code, printed.read().decode(), warned.read().decode()

def contents():
    "Return the files of the disk; of trainings without the times of day in their names and in their measurements."
    found = {}
    for path in sorted(disk.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and "tfevents" not in path.name:
            name = str(path.relative_to(disk))
            if name.startswith("experiments/"):
                name = "/".join(name.split("/")[:2] + name.split("/")[3:])
            data = path.read_bytes()
            if path.name == "metrics.jsonl":
                data = repr([json.loads(line) | {"seconds": 0} for line in data.splitlines()]).encode()
            if path.name not in ("train.log", "curves.png", "resume.pt", "journal.jsonl"):
                found[name] = data
    return found

def is_whole(name, data):
    "Return whether a file that an interrupted run may leave in an earlier state is complete."
    try:
        if name.endswith(".safetensors"):
            return bool(safetensors.numpy.load(data))
        return bool(json.loads(data)) if name.endswith("meta.json") else name.endswith("metrics.jsonl")
    except (ValueError, safetensors.SafetensorError):
        return False

report = {}
for name, words in jobs.items():
    disk.mkdir(exist_ok=True)
    mount(1 << 28)
    code, printed, warned = run(words)
    assert code == 0, warned
    unbroken = contents()
    used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
    subprocess.run(["umount", str(disk)], check=True)
    report[name] = cases = []
    for part in parts:
        mount(int(part * used))
        code, printed, warned = run(words)
        after = contents()
        left = [str(path) for path in disk.rglob("*.partial")]
        mount(1 << 28, "remount")
        begun = sorted(disk.glob("experiments/*/*/config.yaml"))
        again = [*words[:1], "--resume", str(begun[0].parent)] if begun else words
        rerun, _, problem = run(again)
        ended = contents()
        cases.append({
            "part": part, "code": code, "warned": warned, "left": left, "rerun": rerun, "problem": problem,
            "differs": [key for key in ended.keys() | unbroken.keys() if ended.get(key) != unbroken.get(key)],
            "half": [key for key, data in after.items() if data != unbroken.get(key) and not is_whole(key, data)],
        })
        subprocess.run(["umount", str(disk)], check=True)
print(json.dumps(report))
"""

TEACHER = """
import torch

def teach(mel):
    return torch.sigmoid(mel.mean(2)[:, :4] / 20)
"""


@pytest.fixture(scope="module")
def report(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The outcome of each command on disks of several sizes."""
    here = tmp_path_factory.mktemp("full")
    alone = ["unshare", "--map-root-user", "--mount"]
    mounts = [*alone, "mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", str(here)]
    if shutil.which("unshare") is None or subprocess.run(mounts, capture_output=True, check=False).returncode:
        pytest.skip("no file system of a given size can be mounted here")
    torch.manual_seed(0)
    network = CED(ModelConfig(32, 2, depth=1, target_length=112, outputdim=4), ClassTable(("a", "b", "c", "d")))
    loading.save(here / "model.safetensors", network)
    (here / "homemade.py").write_text(TEACHER)
    rng = np.random.default_rng(0)
    names = [str(here / f"clip{number}.wav") for number in range(12)]
    for name in names:
        soundfile.write(name, rng.uniform(-0.3, 0.3, 8_000), 16_000)
    (here / "list.tsv").write_text("filename\n" + "".join(f"{name}\n" for name in names))
    small = ["--model", "ced_tiny", "--pretrained", "false", "--epochs", "2", "--batch_size", "16", "--mode", "off"]
    small += ["--model_args", "{embed_dim: 32, num_heads: 2, depth: 1, target_length: 112}", "--optimizer", "Adam"]
    small += ["--outputpath", "disk/experiments", "--train_data", str(sounds / "train.tsv"), "--num_workers", "0"]
    checked = ["--eval_data", str(sounds / "eval.tsv")]
    table = ["--classes", str(sounds / "classes.tsv"), "--chunk_length", "1"]
    storing = ["--topk", "2", "--chunk_length", "1", "--epochs", "3", "--num_workers", "0", "--outputpath", "disk"]
    decoder = ["--decoder_args", "{embed_dim: 16, num_heads: 2, depth: 1}", "--chunk_length", "1"]
    jobs = {
        "pack": ["pack", "list.tsv", "disk/out", "-s", "5", "-n", "2", "--duration"],
        "store": ["store", "--model", "homemade:teach", "--train_data", str(sounds / "train.tsv"), *storing],
        "train": ["train", *small, *checked, "--logitspath", str(sounds / "store"), "--num_classes", "4"],
        "finetune": ["finetune", *small, *checked, *table],
        "pretrain": ["pretrain", *small, *decoder],
        "export": ["export", "-m", "model.safetensors", "-o", "disk/out/model.onnx"],
        "tag": ["tag", "-m", "model.safetensors", "-o", "disk/out", "-f", "csv", "-f", "jsonl", *names],
    }
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = [*alone, sys.executable, "-c", DRIVER, json.dumps(jobs)]
    done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_a_one_line_error_and_a_rerun_completes_the_work(
    report: dict[str, list[dict[str, Any]]], command: str
) -> None:
    cases = report[command]
    assert sum(case["code"] == 1 for case in cases) >= 2  # the largest disks may be enough
    for case in cases:
        errors = [line for line in case["warned"].splitlines() if line.startswith("ced: error: ")]
        if case["code"]:
            assert len(errors) == 1, case
            assert "No space left on device" in errors[0]
            assert "disk/" in errors[0]
        assert all(line.startswith("ced: ") for line in case["warned"].splitlines()), case["warned"]
        assert case["left"] == []
        assert case["half"] == []
        assert case["rerun"] == 0, case["problem"]
        assert case["differs"] == [], (case["part"], case["problem"])
