"""Commands that hear sounds: tag and embed."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ced.cli.console import complain, reporting

if TYPE_CHECKING:
    from ced.sound.labels import ClassTable
    from ced.tag.inputs import Input
    from ced.tag.records import Record, Scored, Tags
    from ced.tag.select import Selection
    from ced.tag.tagger import Tagger

DEFAULT_THRESHOLD = 0.5  # of events, which need one

Files = Annotated[
    list[str],
    typer.Argument(
        metavar="SOUND...", help="Files, folders, patterns, http(s) addresses, @LIST (a file with a path a line), - (stdin)."
    ),
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="A model name (see `ced models`), an ONNX file, a checkpoint or experiment.")
]
Window = Annotated[float, typer.Option("--chunk", "-c", "--window", help="Seconds of a window, above 0.")]
Hop = Annotated[
    float | None, typer.Option(help="Seconds from one window to the next.", show_default="windows lie end to end")
]
Jobs = Annotated[
    int | None, typer.Option("--jobs", "-j", min=1, help="Windows scored at a time.", show_default="one a processor")
]
