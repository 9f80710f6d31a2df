"""The records of a training run: metrics.jsonl, TensorBoard events, curves, and pictures of features."""

import io
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

from ced.distill.experiment import METRICS_NAME, State
from ced.errors import WriteError
from ced.files import writing, written_aside

CURVES_NAME = "curves.png"
DRAW_EVERY = 60  # seconds between two drawings of the curves, each of which takes a third of a second


class Recorder:
    """Writes the history of a run to its folder; records left by an interrupted run are replaced."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state = folder, state
        for old in folder.glob("events.out.tfevents.*"):  # of an interrupted run: its name may sort after the new one
            old.unlink()
        self._board = _Board(folder)
        self._board.add(state.history)
        self._write_metrics()
        self._drawn = time.monotonic()

    def epoch(self) -> None:
        """Write the state's newest line of history."""
        self._board.add(self.state.history[-1:])
        self._write_metrics()
        if time.monotonic() - self._drawn >= DRAW_EVERY:
            draw_curves(self.state.history, self.folder / CURVES_NAME)
            self._drawn = time.monotonic()

    def close(self) -> None:
        """Draw the last curves."""
        draw_curves(self.state.history, self.folder / CURVES_NAME)

    def _write_metrics(self) -> None:
        """Rewrite metrics.jsonl completely, so that it has each epoch once, even after an interruption."""
        with written_aside(self.folder / METRICS_NAME) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.state.history), encoding="utf-8")


class _Board:
    """A file of TensorBoard events, written in this thread: TensorBoard's own writer thread dies on a full disk."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._append([Event(wall_time=time.time(), file_version="brain.Event:2")])

    def add(self, history: Sequence[Mapping[str, float]]) -> None:
        """Append the measurements of epochs."""
        self._append(
            [
                Event(
                    wall_time=time.time(),
                    step=int(line["epoch"]),
                    summary=Summary(
                        value=[
                            Summary.Value(tag=key, simple_value=value) for key, value in line.items() if key != "epoch"
                        ]
                    ),
                )
                for line in history
            ]
        )

    def _append(self, events: Sequence[Event]) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with writing(self._path), self._path.open("ab") as file:
                file.write(records.getvalue())
        except WriteError:
            with suppress(OSError):  # readers would take half a record for damage
                os.truncate(self._path, size)
            raise


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw loss, learning rate and, if it was measured, mAP against the epochs, one above the other."""
    keys = ("loss", "lr", "mAP") if any("mAP" in line for line in history) else ("loss", "lr")
    figure = Figure(figsize=(7, 1 + 2 * len(keys)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(keys), 1, sharex=True)
    for axis, key in zip(axes, keys, strict=True):
        points = [(line["epoch"], line[key]) for line in history if key in line]
        axis.plot([epoch for epoch, _ in points], [value for _, value in points], marker=".")
        axis.set_ylabel(key)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("epoch")
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100, format="png")


def draw_pictures(columns: Mapping[str, NDArray[np.floating]], path: Path) -> None:
    """Draw log-mel features side by side: each column, (rows, f, n), under its title; NaN is white.

    The colour range of a row is that of its first picture.
    """
    first = next(iter(columns.values()))
    figure = Figure(figsize=(4 * len(columns), 1.6 * len(first) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(first), len(columns), squeeze=False)
    for place, (title, column) in enumerate(columns.items()):
        axes[0, place].set_title(title)
        for axis, picture, shown in zip(axes[:, place], column, first, strict=True):
            axis.imshow(picture, origin="lower", aspect="auto", vmin=np.nanmin(shown), vmax=np.nanmax(shown))
            axis.set_axis_off()
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100, format="png")
