"""AudioSet's ontology: which sounds are kinds of which others."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path

from ced.errors import TableError
from ced.sound.tables import Table, read_table


@dataclass(frozen=True)
class Node:
    """A kind of sound; some are only headings and no class of any model."""

    mid: str  # AudioSet's machine identifier
    name: str
    children: tuple[str, ...]  # mids


@dataclass(frozen=True)
class Ontology:
    """Kinds of sound by mid, in the order of the file; a node may have several parents, and none is below itself."""

    nodes: Mapping[str, Node]

    def descendants(self, mid: str) -> frozenset[str]:
        """Return the mids of all nodes below one; a mid that is no node has none."""
        below: set[str] = set()
        waiting = [mid]
        while waiting:
            node = self.nodes.get(waiting.pop())
            fresh = set(node.children) - below if node else set()
            below |= fresh
            waiting.extend(fresh)
        return frozenset(below)

    def ancestors(self, mid: str) -> frozenset[str]:
        """Return the mids of all nodes above one; a mid that is no node has none."""
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
def audioset() -> Ontology:
    """Return AudioSet's ontology, 632 nodes of which 527 are classes (Google, CC BY 4.0)."""
    with resources.as_file(resources.files("ced.sound") / "audioset_ontology.tsv") as path:
        return read_ontology(path)


def read_ontology(path: Path) -> Ontology:
    """Read an ontology: tab-separated, columns `mid`, `name` and `children` (mids joined by ",").

    Lines that begin with "#" are comments.

    Raises:
        TableError: the table cannot be read, a mid is there twice, a child is no node, or a node is below itself.
    """
    table = read_table(path, required=("mid", "name", "children"), comments=True)
    nodes: dict[str, Node] = {}
    for number, (mid, name, children) in enumerate(
        zip(table.column("mid"), table.column("name"), table.column("children"), strict=True), 1
    ):
        if mid in nodes:
            raise TableError(f"ontology {path}, row {number}: mid {mid!r} is there twice")
        nodes[mid] = Node(mid, name, tuple(children.split(",")) if children else ())
    ontology = Ontology(nodes)
    _check(ontology, table)
    return ontology


def _check(ontology: Ontology, table: Table) -> None:
    for number, node in enumerate(ontology.nodes.values(), 1):
        for child in node.children:
            if child not in ontology.nodes:
                raise TableError(f"ontology {table.path}, row {number}: child {child!r} is no mid of the table")
        if node.mid in ontology.descendants(node.mid):
            raise TableError(f"ontology {table.path}, row {number}: {node.name!r} is below itself")
