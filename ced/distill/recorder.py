"""What a training run measured, for people to look at: metrics.jsonl, TensorBoard events and curves.png."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from ced.distill.experiment import State
from ced.files import written_aside

METRICS_NAME = "metrics.jsonl"
CURVES_NAME = "curves.png"
DRAW_EVERY = 60  # seconds between drawings of the curves, each of which takes a third of a second


class Recorder:
    """Writes the history of a run to its folder, from the first epoch on, whatever an interrupted run left there."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state = folder, state
        for old in folder.glob("events.out.tfevents.*"):  # of a run that was cut short: its names may sort after ours
            old.unlink()
        self._board = SummaryWriter(str(folder))
        for line in state.history:
            self._show(line)
        self._write_metrics()
        self._drawn = time.monotonic()

    def epoch(self) -> None:
        """Write the state's newest line of history."""
        self._show(self.state.history[-1])
        self._write_metrics()
        if time.monotonic() - self._drawn >= DRAW_EVERY:
            draw_curves(self.state.history, self.folder / CURVES_NAME)
            self._drawn = time.monotonic()

    def close(self) -> None:
        """Draw the last curves."""
        draw_curves(self.state.history, self.folder / CURVES_NAME)
        self._board.close()

    def _show(self, line: Mapping[str, float]) -> None:
        for key, value in line.items():
            if key != "epoch":
                self._board.add_scalar(key, value, int(line["epoch"]))
        self._board.flush()

    def _write_metrics(self) -> None:
        """Write metrics.jsonl as a whole, so that it has each epoch once, whatever happened before."""
        with written_aside(self.folder / METRICS_NAME) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.state.history), encoding="utf-8")


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw loss, learning rate and mAP over the epochs, one above the other."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True)
    for axis, key in zip(axes, ("loss", "lr", "mAP"), strict=True):
        points = [(line["epoch"], line[key]) for line in history if key in line]
        axis.plot([epoch for epoch, _ in points], [value for _, value in points], marker=".")
        axis.set_ylabel(key)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("epoch")
    figure.savefig(path, dpi=100)
