"""Write the model in the package: its graph, its card with metrics, and the credits of its training recordings."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.esc10 import plan
from benchmarks.esc10.report import EXTRA_FOLD
from ced.files import written_aside
from ced.model.graph.compare import export_int8
from ced.model.graph.export import export, int8_path
from ced.model.loading import load_model, weights_of
from ced.model.metrics import accuracy, average_precision
from ced.model.runtime import OnnxModel
from ced.model.zoo import BOXED
from ced.sound.audio import load
from ced.sound.tables import multi_hot, read_labelled, read_table, write_table

GRAPH = BOXED["esc10"]
CARD = Path(__file__).with_name("card.md")  # with placeholders for measured values


@dataclass(frozen=True)
class Figures:
    """The metrics of a graph on the held-out recordings."""

    accuracy: float
    per_class: dict[str, float]  # average precision
    right: dict[str, tuple[int, int]]  # number of recordings with the right class first, and of all

    @property
    def map(self) -> float:
        """Mean of the classes' average precision."""
        return float(np.mean(list(self.per_class.values())))


def examine(graph: Path, table: Path) -> Figures:
    """Evaluate a graph on the files of a labelled table."""
    model = OnnxModel(graph)
    clips = read_labelled(table, model.labels)
    scores = np.concatenate([model(load(clip.path)[None]) for clip in clips])
    targets = multi_hot([clip.labels for clip in clips], len(model.labels))
    found = accuracy(targets, scores)
    assert found is not None  # each recording has one label
    hits = targets[np.arange(len(scores)), scores.argmax(1)]
    names = model.labels.names
    return Figures(
        found,
        {name: float(ap) for name, ap in zip(names, average_precision(targets, scores), strict=True)},
        {name: (int(hits[of].sum()), int(of.sum())) for name, of in zip(names, targets.T, strict=True)},
    )


def ship(work: Path, data: Path, graph: Path = GRAPH) -> None:
    """Export the student for the package, and write its card and its credits beside it."""
    folder = work / f"fold{EXTRA_FOLD}"
    *_, box = plan.box()
    network = load_model(folder / plan.MODELS / box.name)
    with TemporaryDirectory() as scratch:
        exact = Path(scratch) / "exact.onnx"
        export(weights_of(network), exact)
        export_int8(exact)
        graph.parent.mkdir(exist_ok=True)
        with written_aside(graph) as aside:
            aside.write_bytes(int8_path(exact).read_bytes())
        in_float = examine(exact, folder / "judge.tsv")
    found = examine(graph, folder / "judge.tsv")
    learned = [name for table in ("learn", "choose") for name in _names(folder / f"{table}.tsv")]
    _write_credits(data, learned, graph.with_name(f"{graph.stem}_credits.tsv"))
    values = {
        "count": len(network.labels),
        "classes": ", ".join(network.labels.names),
        "width": plan.BOX_WIDTH,
        "depth": plan.BOX_DEPTH,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "megabytes": graph.stat().st_size / 1e6,
        "clips": len(learned),
        "views": plan.STORED,
        "chosen": len(_names(folder / "choose.tsv")),
        "fold": EXTRA_FOLD,
        "commands": "\n".join(f"  `{line}`  " for line in _commands()),
        "judged": sum(of for _, of in found.right.values()),
        "accuracy": 100 * found.accuracy,
        "map": found.map,
        "float_accuracy": 100 * in_float.accuracy,
        "float_map": in_float.map,
        "rows": "\n".join(
            f"| {name} | {found.per_class[name]:.3f} | {right} of {of} |" for name, (right, of) in found.right.items()
        ),
    }
    with written_aside(graph.with_suffix(".md")) as aside:
        aside.write_text(CARD.read_text(encoding="utf-8").format(**values), encoding="utf-8")


def _names(table: Path) -> list[str]:
    return [Path(name).name for name in read_table(table).column("filename")]


def _commands() -> list[str]:
    """Return the commands of all jobs, in order."""
    lines = []
    for job in (*plan.groundwork(), *plan.box()):
        command = (
            f"python -m benchmarks.esc10.teachers {job.name}" if job.command == "teacher" else f"ced {job.command}"
        )
        lines.append(f"{command} {job.name}.yaml")
    return lines


def _write_credits(data: Path, names: list[str], out: Path) -> None:
    credit = read_table(data / "credits.tsv", required=("filename", "author", "license", "source"))
    rows = [row for row, name in enumerate(credit.column("filename")) if name in set(names)]
    columns = {name: [credit.column(name)[row] for row in rows] for name in ("filename", "author", "license", "source")}
    write_table(out, columns)
