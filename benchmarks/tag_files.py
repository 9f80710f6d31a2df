"""Measure time and memory of tagging files, from the start of a command to its end, compared with plain PyTorch.

Run as `python -m benchmarks.tag_files` (some minutes on two cores). The sounds are generated, the weights random.

    start   one clip of 10 s: from the start of a process to its end, and its peak memory
    long    a file of three hours: speed and peak memory
    folder  400 clips of 10 s, OGG at 44.1 kHz, a folder in one run

"plain" reads with soundfile, resamples with soxr and scores with the torch network, file after file, as one would write
it in twenty lines; the sides take turns and figures are medians.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.scale.costs import Cost, of_command
from ced.model import loading
from ced.model.graph.compare import export_int8
from ced.model.graph.export import export, int8_path
from ced.model.loading import weights_of
from ced.model.vit import CED
from ced.model.zoo import MODELS

RATE = 44_100
PLAIN = """if True:
    import sys, numpy as np, soundfile, soxr, torch
    from ced.model.loading import load_model
    model = load_model(sys.argv[1]).eval()
    for path in sys.argv[2:]:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
        wave = soxr.resample(wave.mean(1), rate, 16000)
        for start in range(0, len(wave), 160000):
            with torch.inference_mode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                scores = model.probs(torch.from_numpy(wave[None, start : start + 160000]))[0]
            best = scores.topk(3)
            print(path, [(model.labels.names[i], float(p)) for p, i in zip(best.values, best.indices)], flush=True)
"""


@contextmanager
def models(name: str) -> Iterator[dict[str, Path]]:
    """Yield a network with random weights as a checkpoint, a graph and an int8 graph."""
    torch.manual_seed(0)
    network = CED(MODELS[name].config).eval()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, graph = Path(folder, "model.safetensors"), Path(folder, "model.onnx")
        loading.save(checkpoint, network)
        export(weights_of(network), graph)
        export_int8(graph)
        yield {"plain": checkpoint, "ced tag": graph, "ced tag int8": int8_path(graph)}


def write_sound(path: Path, seconds: int, channels: int, seed: int) -> None:
    """Write a sound of noise and a gliding tone, a second at a time."""
    rng = np.random.default_rng(seed)
    axis = np.arange(RATE) / RATE
    with soundfile.SoundFile(path, "w", RATE, channels) as file:
        for second in range(seconds):
            tone = 0.1 * np.sin(2 * np.pi * (200 + 7 * (second + seed) % 3000) * axis)[:, None]
            file.write((tone + 0.02 * rng.standard_normal((RATE, channels))).astype(np.float32))


def command(side: str, model: Path, sounds: list[Path]) -> list[str | Path]:
    """Return the command of one side; `ced tag` gets the folder of several sounds."""
    if side == "plain":
        return [sys.executable, "-c", PLAIN, model, *sounds]
    return [sys.executable, "-m", "ced", "tag", "-m", model, sounds[0] if len(sounds) == 1 else sounds[0].parent]


def compare(
    what: str, unit: str, sounds: list[Path], paths: dict[str, Path], rounds: int, figure: Callable[[float], float]
) -> None:
    """Run all sides in turn and print a row of the table for each."""
    results: dict[str, list[Cost]] = {side: [] for side in paths}
    for _ in range(rounds):
        for side, model in paths.items():
            results[side].append(of_command(command(side, model, sounds)))
    seconds = {side: statistics.median(cost.seconds for cost in values) for side, values in results.items()}
    for side, values in results.items():
        ratio = f"{seconds['plain'] / seconds[side]:.2f}" if "plain" in seconds else "-"
        memory = statistics.median(cost.memory or 0 for cost in values)
        print(f"| {what} | {side} | {figure(seconds[side]):.3g} {unit} | {ratio} | {memory:.0f} MB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in MODELS if name.startswith("ced")], default="ced_tiny")
    parser.add_argument("--only", nargs="+", choices=["start", "long", "folder"], default=["start", "long", "folder"])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print("| work | by | figure | times plain | peak memory |\n|---|---|---|---|---|")
    with models(given.model) as paths, tempfile.TemporaryDirectory() as folder:
        if "start" in given.only:
            clip = Path(folder, "clip.ogg")
            write_sound(clip, 10, 2, 0)
            compare("one clip, start to end", "s", [clip], paths, 2 * given.rounds, lambda seconds: seconds)
        if "folder" in given.only:
            clips = [Path(folder, "clips", f"{number}.ogg") for number in range(400)]
            clips[0].parent.mkdir()
            for number, clip in enumerate(clips):
                write_sound(clip, 10, 2, number)
            compare("400 clips", "clips/s", clips, paths, max(1, given.rounds // 2), lambda seconds: 400 / seconds)
        if "long" in given.only:
            long = Path(folder, "long.ogg")
            write_sound(long, 3 * 3600, 2, 0)
            ours = {side: path for side, path in paths.items() if side != "plain"}
            compare("three hours", "x real time", [long], ours, 1, lambda seconds: 3 * 3600 / seconds)


if __name__ == "__main__":
    main()
