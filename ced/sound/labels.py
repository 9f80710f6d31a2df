"""Class tables: what the outputs of a tagger are called."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ced.errors import TableError
from ced.text import decoded

AUDIOSET = "audioset"  # AudioSet's class table, where a file is expected


@dataclass(frozen=True)
class ClassTable:
    """The classes of a tagger, in the order of its outputs."""

    names: tuple[str, ...]
    mids: tuple[str, ...] | None = None  # AudioSet's machine identifiers, where the classes have any

    def __post_init__(self) -> None:
        if not self.names:
            raise TableError("a class table needs at least one class")
        for what, values in (("name", self.names), ("mid", self.mids or ())):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise TableError(f"class {what} {twice[0]!r} stands more than once in the class table")
        if self.mids is not None and len(self.mids) != len(self.names):
            raise TableError(f"a class table has {len(self.names)} names but {len(self.mids)} mids")

    def __len__(self) -> int:
        return len(self.names)


def numbered(count: int) -> ClassTable:
    """Return a table of `count` classes without names of their own."""
    return ClassTable(tuple(f"class {index}" for index in range(count)))


def default_classes(count: int) -> ClassTable:
    """Return what `count` classes are called when nothing says it: 527 are AudioSet's, others go by their index."""
    return audioset() if count == len(audioset()) else numbered(count)


@cache
def audioset() -> ClassTable:
    """Return AudioSet's 527 classes (Google, CC BY 4.0)."""
    return read_classes(Path(__file__).with_name("audioset_classes.tsv"))


def named(names: Iterable[str]) -> ClassTable:
    """Return the class table with these names; AudioSet's, with its identifiers, where the names are AudioSet's.

    The published `config.json` files cut AudioSet's names at the first comma, so that "Inside" stands for three
    classes. Such names, too, give AudioSet's table with its full names.

    Raises:
        TableError: a name occurs more than once.
    """
    names = tuple(names)
    if names in (audioset().names, _cut_audioset_names()):
        return audioset()
    return ClassTable(names)


def named_by_config(settings: object) -> ClassTable | None:
    """Return the class table of a Hugging Face configuration, restored as `named` does it.

    Only `id2label` is read: with cut names, classes overwrite each other in `label2id`. None if it is missing, does
    not count from 0, or gives two classes the same name.
    """
    given = settings.get("id2label") if isinstance(settings, dict) else None
    if not isinstance(given, dict) or not given:
        return None
    by_index = {str(index): str(name) for index, name in given.items()}
    if by_index.keys() != {str(index) for index in range(len(given))}:
        return None
    try:
        return named(by_index[str(index)] for index in range(len(given)))
    except TableError:
        return None


@cache
def _cut_audioset_names() -> tuple[str, ...]:
    return tuple(name.partition(",")[0] for name in audioset().names)


def class_table(source: Path) -> ClassTable:
    """Return AudioSet's table for the word `audioset`, and otherwise the one in a file.

    Raises:
        TableError: the file is not a class table.
    """
    return audioset() if source == Path(AUDIOSET) else read_classes(source)


def read_classes(path: Path) -> ClassTable:
    """Read a class table: tab-separated, or comma-separated when named .csv.

    Its columns are `index` (0, 1, 2, ... in order), `name` or `display_name`, and maybe `mid`, which is
    empty where classes have none; lines that begin with "#" are comments.

    Raises:
        TableError: a column is missing, the indices are not 0, 1, 2, ..., or a name is given twice.
    """
    try:
        text = decoded(Path(path).read_bytes(), strict=True)
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"cannot read class table {path}: {error}") from error
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    tabs = Path(path).suffix.lower() != ".csv"
    rows = list(csv.DictReader(lines, dialect="excel-tab" if tabs else "excel"))
    columns = list(rows[0]) if rows else []
    name_column = "name" if "name" in columns else "display_name"
    for column in ("index", name_column):
        if column not in columns:
            raise TableError(f"class table {path} has columns {columns}; it needs index and name")
    for number, row in enumerate(rows):
        if None in row or None in row.values():  # what the csv module makes of a field too many or too few
            raise TableError(f"class table {path}: row {number + 1} has another number of fields than the header")
        if row["index"] != str(number):
            raise TableError(f"class table {path}: row {number + 1} has index {row['index']!r}; expected {number}")
    mids = tuple(row.get("mid", "") for row in rows)
    return ClassTable(tuple(row[name_column] for row in rows), mids if any(mids) else None)


def matched(table: ClassTable, target: ClassTable) -> list[int]:
    """Return the index in `table` of each class of `target`, (len(target),); -1 for a class that it lacks.

    Classes are the same if they have the same mid; otherwise if their names have the same words, upper and lower case
    and punctuation aside; otherwise if the names do up to the first comma, as in published configurations. What is
    ambiguous does not match.
    """
    if table.names == target.names:
        return list(range(len(target)))
    columns = [-1] * len(target)
    keys: list[Callable[[ClassTable], list[str]]] = [
        lambda one: list(one.mids or [""] * len(one)),
        lambda one: [_words(name) for name in one.names],
        lambda one: [_words(name.partition(",")[0]) for name in one.names],
    ]
    for key in keys:
        ours, theirs = key(table), key(target)
        once = {word for words in (ours, theirs) for word, count in Counter(words).items() if word and count == 1}
        once -= {word for words in (ours, theirs) for word, count in Counter(words).items() if count > 1}
        places = {word: index for index, word in enumerate(ours) if word in once}
        taken = set(columns)
        for index, word in enumerate(theirs):
            if columns[index] < 0 and (place := places.get(word, -1)) not in taken:
                columns[index] = place
    return columns


def _words(name: str) -> str:
    return " ".join(re.findall(r"\w+", name.casefold()))
