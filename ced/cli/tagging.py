"""Commands that use a model: tag, models, export."""

from pathlib import Path
from typing import Annotated

import typer

from ced.cli.console import complain, reporting


def tag(
    files: Annotated[list[Path], typer.Argument(help="Sound files: WAV, FLAC, OGG, Opus, MP3, ...")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model name (see `ced models`), a checkpoint, or an experiment.")
    ] = "ced_mini",
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="Classes shown of each window.")] = 3,
    chunk: Annotated[float, typer.Option("--chunk", "-c", help="Seconds of a window, above 0.")] = 10.0,
) -> None:
    """Tag sounds: print the most probable classes of each file, window by window.

    A file that cannot be read is named on standard error, the others are tagged all the same; the exit code is then 1.
    """
    from ced.errors import AudioError
    from ced.tag.results import text
    from ced.tag.tagger import Tagger

    with reporting() as progress:
        tagger = Tagger(model, progress=progress)
    failed = False
    for file in files:
        try:
            for line in text(str(file), tagger.tag(file, top_k=topk, window=chunk)):
                print(line)
            print(flush=True)
        except AudioError as error:
            failed = True
            complain(str(error))
    if failed:
        raise typer.Exit(1)


def models() -> None:
    """List the published models, and which of them lie in the cache."""
    from ced.model.zoo import MODELS, cache_dir

    rows = [("name", "params", "mAP", "licence", "cached", "")]
    for entry in MODELS.values():
        score = "-" if entry.map is None else f"{entry.map:.1f}"
        cached = "yes" if (cache_dir() / entry.file).exists() else "no"
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
) -> None:
    """Export a model to ONNX (log-mel features in, probabilities out), in float and in int8."""
    from ced.model import onnx
    from ced.model.zoo import load_model

    path = out or Path(f"{Path(model).stem}.onnx")
    with reporting() as progress:
        network = load_model(model, progress=progress)
    report = onnx.export_feats(network, path)
    print(f"{report.path}: probabilities differ from the network's by {report.largest_difference:.1g} at most")
    if report.int8_path is not None:
        print(f"{report.int8_path}: by {report.int8_difference:.1g} at most")
    print(report.labels_path)
