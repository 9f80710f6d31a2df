"""Classes: the names of a tagger's outputs, and AudioSet's ontology of them."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from ced.errors import TableError
from ced.text import decoded

AUDIOSET = "audioset"  # AudioSet's class table, where a file is expected


@dataclass(frozen=True)
class ClassTable:
    """The classes of a tagger, in the order of its outputs."""

    names: tuple[str, ...]
    mids: tuple[str, ...] | None = None  # AudioSet's machine identifiers, if the classes have any

    def __post_init__(self) -> None:
        if not self.names:
            raise TableError("a class table needs at least one class")
        for what, values in (("name", self.names), ("mid", self.mids or ())):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise TableError(f"class {what} {twice[0]!r} occurs more than once in the class table")
        if self.mids is not None and len(self.mids) != len(self.names):
            raise TableError(f"a class table has {len(self.names)} names but {len(self.mids)} mids")

    def __len__(self) -> int:
        return len(self.names)


def numbered(count: int) -> ClassTable:
    """Return a table of `count` classes that have no names, only numbers."""
    return ClassTable(tuple(f"class {index}" for index in range(count)))


def default_classes(count: int) -> ClassTable:
    """Return the classes of a model that does not name its own: AudioSet's for 527, numbered ones otherwise."""
    return audioset() if count == len(audioset()) else numbered(count)


@cache
def audioset() -> ClassTable:
    """Return AudioSet's 527 classes (Google, CC BY 4.0)."""
    return read_classes(Path(__file__).with_name("audioset_classes.tsv"))


def named(names: Iterable[str]) -> ClassTable:
    """Return the class table with these names; AudioSet's, with its identifiers, where the names are AudioSet's.

    The published `config.json` files cut AudioSet's names at the first comma, so that three classes are named "Inside".
    Such names, too, give AudioSet's table with its full names.

    Raises:
        TableError: a name occurs more than once.
    """
    names = tuple(names)
    if names in (audioset().names, _cut_audioset_names()):
        return audioset()
    return ClassTable(names)


def named_by_config(settings: object) -> ClassTable | None:
    """Return the class table of a Hugging Face configuration, restored as by `named`.

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

    Its columns are `index` (0, 1, 2, ... in order), `name` or `display_name`, and optionally `mid`, empty for classes
    without one; lines that begin with "#" are comments.

    Raises:
        TableError: a column is missing, the indices are not 0, 1, 2, ..., or a name occurs twice.
    """
    columns, rows = _read_rows(path, "class table")
    name_column = "name" if "name" in columns else "display_name"
    for column in ("index", name_column):
        if column not in columns:
            raise TableError(f"class table {path} has columns {columns}; it needs index and name")
    for number, row in enumerate(rows):
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


def mostly_audioset(table: ClassTable) -> bool:
    """Return whether a table has more than half of AudioSet's classes, in any order."""
    return 2 * sum(column >= 0 for column in matched(table, audioset())) > len(audioset())


def _words(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def _read_rows(path: Path, what: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the rows of a small table, separated by tabs or, in a .csv file, by commas.

    Raises:
        TableError: it cannot be read, or a row has more or fewer fields than the header.
    """
    try:
        text = decoded(Path(path).read_bytes(), strict=True)
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"cannot read {what} {path}: {error}") from error
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    rows = list(csv.DictReader(lines, dialect="excel" if Path(path).suffix.lower() == ".csv" else "excel-tab"))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():  # csv's marks of a field too many or too few
            raise TableError(f"{what} {path}: row {number} has more or fewer fields than the header")
    return list(rows[0]) if rows else [], rows


@dataclass(frozen=True)
class Node:
    """A kind of sound in an ontology; some nodes are only headings, not classes of any model."""

    mid: str  # AudioSet's machine identifier
    name: str
    children: tuple[str, ...]  # mids


@dataclass(frozen=True)
class Ontology:
    """Kinds of sound by mid, in the order of the file; a directed acyclic graph, as a node may have several parents."""

    nodes: Mapping[str, Node]

    def descendants(self, mid: str) -> frozenset[str]:
        """Return the mids of all nodes below a node; an unknown mid has none."""
        below: set[str] = set()
        waiting = [mid]
        while waiting:
            node = self.nodes.get(waiting.pop())
            fresh = set(node.children) - below if node else set()
            below |= fresh
            waiting.extend(fresh)
        return frozenset(below)

    def ancestors(self, mid: str) -> frozenset[str]:
        """Return the mids of all nodes above a node; an unknown mid has none."""
        above: set[str] = set()
        waiting = [mid]
        while waiting:
            fresh = set(self._parents.get(waiting.pop(), ())) - above
            above |= fresh
            waiting.extend(fresh)
        return frozenset(above)

    @cached_property
    def _parents(self) -> dict[str, list[str]]:
        parents: dict[str, list[str]] = {}
        for node in self.nodes.values():
            for child in node.children:
                parents.setdefault(child, []).append(node.mid)
        return parents


@cache
def audioset_ontology() -> Ontology:
    """Return AudioSet's ontology, 632 nodes of which 527 are classes (Google, CC BY 4.0)."""
    return read_ontology(Path(__file__).with_name("audioset_ontology.tsv"))


def read_ontology(path: Path) -> Ontology:
    """Read an ontology: tab-separated, columns `mid`, `name` and `children` (mids joined by ",").

    Lines that begin with "#" are comments.

    Raises:
        TableError: the table cannot be read, a mid occurs twice, a child is unknown, or a node is its own descendant.
    """
    columns, rows = _read_rows(path, "ontology")
    for column in ("mid", "name", "children"):
        if column not in columns:
            raise TableError(f"ontology {path} has no column {column!r}; its columns are {', '.join(columns)}")
    nodes: dict[str, Node] = {}
    for number, row in enumerate(rows, 1):
        if row["mid"] in nodes:
            raise TableError(f"ontology {path}, row {number}: mid {row['mid']!r} occurs twice")
        children = tuple(row["children"].split(",")) if row["children"] else ()
        nodes[row["mid"]] = Node(row["mid"], row["name"], children)
    ontology = Ontology(nodes)
    for number, node in enumerate(nodes.values(), 1):
        for child in node.children:
            if child not in nodes:
                raise TableError(f"ontology {path}, row {number}: child {child!r} is not a mid of the table")
        if node.mid in ontology.descendants(node.mid):
            raise TableError(f"ontology {path}, row {number}: {node.name!r} is its own descendant")
    return ontology
