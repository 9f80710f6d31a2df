"""Measure what masks cost an ONNX teacher: how many clips of ESC-10 it names right under random views.

Run as `python -m benchmarks.teacher_masks ESC10 mn04_as.onnx`, with the settings of the graph beside it; minutes on one
core. Each clip is scored under two views, by ESC-10's ten classes (`benchmarks/esc10/audioset.tsv`).
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from benchmarks.esc10.outside import ten
from benchmarks.esc10.split import LENGTH, fitted, read_clips
from ced.distill.onnx_teacher import OnnxTeacher
from ced.distill.views import ViewRecipe, draw, mask_uniforms, shift_into, sound_views
from ced.sound.audio import SAMPLE_RATE, load

VIEWS = 2  # of each clip
SHIFT = (-0.5, 0.5)
WIDTHS = ((None, None), (96, None), (None, 24), (None, 12), (None, 8), (96, 8), (96, 24))  # frames, mel bins


def share_right(teacher: OnnxTeacher, waves: list[NDArray[np.float32]], labels: list[int], recipe: ViewRecipe) -> float:
    """Return the share of views that a teacher names right."""
    found: list[bool] = []
    for number, (wave, label) in enumerate(zip(waves, labels, strict=True)):
        views = [draw(recipe, VIEWS * number + view, LENGTH) for view in range(VIEWS)]
        shifted = np.zeros((VIEWS, LENGTH), np.float32)
        for row, view in zip(shifted, views, strict=True):
            shift_into(row, wave, view.shift)
        scores = teacher(
            torch.from_numpy(shifted), SAMPLE_RATE, sound_views(mask_uniforms(views), recipe, LENGTH)
        ).numpy()
        found += (ten(scores).argmax(1) == label).tolist()
    return float(np.mean(found))


def variants(graph: Path, folder: Path) -> dict[str, OnnxTeacher]:
    """Return the teacher with each way to mask."""
    settings: dict[str, Any] = yaml.safe_load(graph.with_suffix(".yaml").read_text(encoding="utf-8"))
    features = settings["features"]
    changes: dict[str, dict[str, Any]] = {
        "on the wave": {"masks": "waves"},
        "on the features, filled with silence": {"masks": "features"},
        "on the features, filled with 0": {"masks": "features", "features": {**features, "fill": 0.0}},
    }
    found = {}
    for number, (name, change) in enumerate(changes.items()):
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump({**settings, "graph": str(graph.resolve()), **change}), encoding="utf-8")
        found[name] = OnnxTeacher(path)
    return found


def main() -> None:
    """Print a table with a row for each width of the masks, and a column for each way to mask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="ESC-10: meta.tsv, audio/")
    parser.add_argument("graph", type=Path, help="the teacher; its settings are in a YAML file beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clips, _ = read_clips(args.data)
    waves = [fitted(load(args.data / "audio" / clip.filename)) for clip in clips]
    labels = [clip.label for clip in clips]
    with TemporaryDirectory() as folder:
        teachers = variants(args.graph, Path(folder))
        print(f"| widest masks: frames, mel bins | {' | '.join(teachers)} |")
        print("|---" * (1 + len(teachers)) + "|")
        for time, frequency in WIDTHS:
            recipe = ViewRecipe(SHIFT, time, frequency)
            shares = [f"{100 * share_right(teacher, waves, labels, recipe):.1f} %" for teacher in teachers.values()]
            print(f"| {time or 'none'}, {frequency or 'none'} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
