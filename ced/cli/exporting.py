"""Commands about models: list them, verify the cached files, export to ONNX."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ced.cli.console import reporting, show, show_error
from ced.model.zoo import DEFAULT_MODEL


def models(
    verify: Annotated[
        bool, typer.Option("--verify", help="Verify the cached files by their published checksum or their format.")
    ] = False,
) -> None:
    """List the models with sources and licences, whether they are cached, and the model in the package.

    With --verify, list the cached files; the exit code is 1 if one is damaged.
    """
    from ced.model import zoo

    if verify:
        _verify()
        return
    rows = [("name", "params", "mAP", "size", "source", "licence", "cached", "")]
    for entry in zoo.MODELS.values():
        score = "-" if entry.map is None else f"{entry.map:.1f}"
        cached = zoo.cached(entry)
        named = (entry.name, f"{entry.params:g} M", score, f"{entry.megabytes:.0f} MB")
        for number, source in enumerate(entry.sources):
            kept, note = "yes" if source in cached else "no", "" if number else entry.note
            rows.append((*(("",) * 4 if number else named), source.place, source.licence, kept, note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    show()
    show("mAP: as published, in percent, on AudioSet's evaluation set. Files from the hub are in the hub's cache,")
    show(f"files from Zenodo and graphs made from weights in {zoo.cache_dir()}.")
    for name, graph in zoo.BOXED.items():
        show(f"{name} is in the package and needs no download; its scope is described in {graph.with_suffix('.md')}")


def _verify() -> None:
    from ced.model import zoo

    damaged = 0
    found = [(entry, source, path) for entry in zoo.MODELS.values() for source, path in zoo.cached(entry).items()]
    for entry, source, path in found:
        if (wrong := zoo.damage(source, path)) is None:
            checked = "sha256" if isinstance(source, zoo.Hub) else "format"
            show(f"{entry.name}: {path}: {checked} correct")
        else:
            damaged += 1
            show_error(f"{entry.name}: {path} is damaged: {wrong}; delete it to download it again")
    if not found:
        show("no model is cached")
    if damaged:
        raise typer.Exit(1)


def export(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model name, a checkpoint, or an experiment.")
    ] = DEFAULT_MODEL,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: MODEL.onnx.")] = None,
    source: Annotated[
        Literal["wave", "feats"],
        typer.Option(
            "--input",
            help="Input of the graph: wave (with the front end inside) or feats (log-mel features, for sherpa-onnx).",
        ),
    ] = "wave",
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="Also write MODEL.int8.onnx.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Labelled clips to compare int8 on: a table (filename, and labels or label) or a folder with meta.tsv."
        ),
    ] = None,
    bound: Annotated[
        float, typer.Option(help="Points of mAP that int8 may lose there; if it loses more, its file is deleted.")
    ] = 0.3,
) -> None:
    """Export a model to one ONNX graph from waves or features to probabilities.

    If torch is installed, the graph is compared with the network before it is written.
    """
    from ced.model import zoo
    from ced.model.graph.compare import change_on_noise, export_int8
    from ced.model.graph.export import export as write
    from ced.model.graph.export import int8_path

    if check is not None and not int8:
        raise typer.BadParameter("--check compares int8 with float: it needs --int8")
    path = out or Path(f"{Path(model).stem}.onnx")
    with reporting() as progress:
        weights = zoo.read_weights(model, progress)
        report = write(weights, path, source)
        if report.largest_difference is None:
            show(f"{report.path}: not compared with the network, as torch is not installed")
        else:
            show(f"{report.path}: probabilities differ from the network's by {report.largest_difference:.1g} at most")
        if report.labels_path is not None:
            show(report.labels_path)
        if not int8:
            return
        found = export_int8(path, check=check, bound=bound, progress=progress)
    if found is None:
        change = change_on_noise(path, int8_path(path), weights.config)
        show(f"{int8_path(path)}: probabilities change by {change:.1g} at most on noise; --check compares on clips")
    else:
        show(f"{int8_path(path)}: {found.summary}")
