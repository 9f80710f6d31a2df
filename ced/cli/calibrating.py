"""The command that fits thresholds: calibrate."""

from pathlib import Path
from typing import Annotated

import typer

from ced.cli.console import reporting, show
from ced.cli.options import Hop, Jobs, Model, Window
from ced.environment import cores

NAMES_SHOWN = 5  # of classes that are only mentioned


def calibrate(
    table: Annotated[
        Path, typer.Argument(help="Labelled clips: a table with filename and labels, or a folder with a meta.tsv.")
    ],
    model: Model = "ced_mini",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of thresholds to write.")] = Path("thresholds.tsv"),
    precision: Annotated[
        float | None,
        typer.Option(help="The least precision of each class, above 0, at most 1.", show_default="the best F1"),
    ] = None,
    window: Window = 10.0,
    hop: Hop = None,
    jobs: Jobs = None,
) -> None:
    """Fit a threshold for each class to labelled clips, for `ced tag --threshold FILE`.

    A clip that cannot be read is named on standard error and left out; the exit code is then 1.
    """
    from ced.tag.calibrate import USUAL_THRESHOLD
    from ced.tag.calibrate import calibrate as fit
    from ced.tag.tagger import Tagger

    jobs = jobs or cores()
    with reporting() as progress, Tagger(model, jobs=jobs, progress=progress) as tagger:
        found = fit(tagger, table, out, precision=precision, window=window, hop=hop, jobs=jobs, progress=progress)
    show(f"{found.out}: thresholds fitted to {found.clips} clips, in which {found.classes} classes are heard")
    show(
        f"F1, mean over these classes, on the clips fitted to: {found.f1_after:.3f}"
        f" ({found.f1_before:.3f} with {USUAL_THRESHOLD} for all); expect less on others"
    )
    if found.unseen:
        show(f"not heard, so with a threshold common to all: {_some(found.unseen)}")
    if found.never:
        show(f"never precise enough, so never a tag: {_some(found.never)}")
    if found.unreadable:
        raise typer.Exit(1)


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - NAMES_SHOWN
    return "; ".join(names[:NAMES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
