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
    """List the models: the published ones, what of them lies in the cache, and those that come with the package."""
    from ced.model.zoo import BOXED, MODELS, cache_dir

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
    for name, graph in BOXED.items():
        print(f"{name} is in the package and needs no network; what it is and is not: {graph.with_suffix('.md')}")


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
    check: Annotated[
        Path | None,
        typer.Option(
            help="Labelled clips (filename and labels or label; or a folder with meta.tsv) to compare int8 on."
        ),
    ] = None,
    bound: Annotated[
        float, typer.Option(help="Points of mAP that int8 may cost there; past it no file is left.")
    ] = 0.3,
) -> None:
    """Export a model to one ONNX graph that gives probabilities, compared with the network on the spot."""
    from ced.model.export import export as write
    from ced.model.export import largest_difference
    from ced.model.loading import load_model
    from ced.model.quantize import int8_path, quantize

    if check is not None and not int8:
        raise typer.BadParameter("--check compares int8 with float: it needs --int8")
    path = out or Path(f"{Path(model).stem}.onnx")
    with reporting() as progress:
        network = load_model(model, progress=progress)
        report = write(network, path, source.value)
        print(f"{report.path}: probabilities differ from the network's by {report.largest_difference:.1g} at most")
        if report.labels_path is not None:
            print(report.labels_path)
        if not int8:
            return
        found = quantize(path, check=check, bound=bound, progress=progress)
    if found is None:
        change = largest_difference(network, int8_path(path))
        print(f"{int8_path(path)}: by {change:.1g} at most on noise; --check tells what it costs")
    else:
        print(f"{int8_path(path)}: {found.summary}")
