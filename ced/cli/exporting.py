"""Commands about models: which there are, and how they leave as ONNX."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ced.cli.console import reporting


class Input(StrEnum):
    """What an exported graph takes; the names of `ced.model.graph.Input`."""

    WAVE = "wave"
    FEATS = "feats"


def models() -> None:
    """List the published models, and what of them lies in the cache."""
    from ced.model.zoo import MODELS, cache_dir

    rows = [("name", "params", "mAP", "licence", "cached", "")]
    for entry in MODELS.values():
        score = "-" if entry.map is None else f"{entry.map:.1f}"
        files = {"onnx": entry.onnx_file, "weights": entry.file}
        cached = " + ".join(kind for kind, file in files.items() if (cache_dir() / file).exists()) or "no"
        rows.append((entry.name, f"{entry.params:g} M", score, entry.licence, cached, entry.note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nmAP is the published one on AudioSet's evaluation set, percent. The cache is {cache_dir()}.")


def export(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model name, a checkpoint, or an experiment.")
    ] = "ced_mini",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: MODEL.onnx.")] = None,
    source: Annotated[
        Input,
        typer.Option("--input", help="wave: the front end is inside; feats: as sherpa-onnx has it."),
    ] = Input.WAVE,
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="Write MODEL.int8.onnx, too.")] = False,
) -> None:
    """Export a model to one ONNX graph that gives probabilities, compared with the network on the spot."""
    from ced.model.export import export as write
    from ced.model.loading import load_model
    from ced.model.quantize import quantize

    path = out or Path(f"{Path(model).stem}.onnx")
    with reporting() as progress:
        network = load_model(model, progress=progress)
        report = write(network, path, source.value)
    print(f"{report.path}: probabilities differ from the network's by {report.largest_difference:.1g} at most")
    if report.labels_path is not None:
        print(report.labels_path)
    if int8:
        print(quantize(path))
