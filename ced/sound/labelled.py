"""Labelled clips: a table of sound files and their classes."""

import os
from dataclasses import dataclass
from pathlib import Path

from ced.errors import TableError
from ced.sound.labels import ClassTable, numbered
from ced.sound.tables import Table, parse_labels, read_table

TABLE_OF_A_FOLDER = "meta.tsv"


@dataclass(frozen=True)
class LabelledClip:
    """A sound file and its classes."""

    path: Path
    labels: tuple[int, ...]  # indices of the class table


def read_labelled(table: str | os.PathLike[str], classes: ClassTable) -> list[LabelledClip]:
    """Read a table of labelled clips: tab-separated, columns `filename` and `labels` (class indices joined by ";").

    A column `label` (one class index) may replace `labels`. A file is searched for beside the table, in the folder
    `audio` beside it, and at its path as given.

    Args:
        table: the table, or a folder that holds one named meta.tsv.
        classes: the classes that the labels index.

    Raises:
        TableError: the table is invalid, a label is out of range or contradicts the table's column `name` (with its
            row), or files are missing (how many, and the first).
    """
    path = Path(table)
    if path.is_dir():
        path = path / TABLE_OF_A_FOLDER
    rows = read_table(path, required=("filename",))
    if "labels" not in rows.columns and "label" in rows.columns:
        rows = Table({**rows.columns, "labels": rows.columns["label"]}, path)
    labels = parse_labels(rows, len(classes))
    _check_names(rows, labels, classes)
    names = rows.column("filename")
    found = [_find(name, path.parent) for name in names]
    if missing := [name for name, file in zip(names, found, strict=True) if file is None]:
        raise TableError(
            f"table {path}: {len(missing)} of {len(names)} files are missing, the first is {missing[0]!r};"
            f" searched: {path.parent}, {path.parent / 'audio'}, and the path as given"
        )
    return [LabelledClip(file, indices) for file, indices in zip(found, labels, strict=True) if file is not None]


def _check_names(rows: Table, labels: list[tuple[int, ...]], classes: ClassTable) -> None:
    """Refuse labels of another class table, where a column names them."""
    if classes.names == numbered(len(classes)).names:  # they have no names
        return
    for row, (name, indices) in enumerate(zip(rows.columns.get("name", ()), labels, strict=False), start=1):
        if len(indices) == 1 and name.casefold() != classes.names[indices[0]].casefold():
            raise TableError(
                f"table {rows.path}, row {row}: label {indices[0]} is named {name!r}, but class {indices[0]} of the"
                f" model is {classes.names[indices[0]]!r}; labels are indices of the model's classes"
            )


def _find(name: str, folder: Path) -> Path | None:
    for place in (folder / name, folder / "audio" / name, Path(name)):
        if place.is_file():
            return place
    return None
