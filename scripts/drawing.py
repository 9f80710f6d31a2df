"""SVG figures that are the same file whenever they show the same figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from ced.files import written_aside


@contextmanager
def figure(
    path: Path, width: float, height: float, *, rows: int = 1, columns: int = 1, share: str = ""
) -> Iterator[list[Axes]]:
    """Yield the axes of a figure, row by row, without upper and right spines; write the figure to `path` at the end.

    Args:
        path: the SVG file.
        width, height: of the figure, inches.
        rows, columns: of axes.
        share: "x", "y" or "xy": scales that all axes have in common.
    """
    matplotlib.rcParams.update({"svg.hashsalt": "ced", "svg.fonttype": "none"})
    drawn, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(width, height),
        sharex="x" in share,
        sharey="y" in share,
        squeeze=False,
        layout="constrained",
    )
    found = list(axes.flat)
    for one in found:
        one.spines[["top", "right"]].set_visible(False)
    yield found
    with written_aside(path) as aside:
        drawn.savefig(aside, format="svg", metadata={"Date": None})
    pyplot.close(drawn)
