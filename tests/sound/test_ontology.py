from pathlib import Path

import pytest

from ced.errors import TableError
from ced.sound import labels, ontology
from ced.sound.ontology import Node, read_ontology

TREE = "# mine\nmid\tname\tchildren\n/a\tAnimal\t/d,/c\n/d\tDog\t/g,/b\n/c\tCat\t/g\n/g\tGrowl\t\n/b\tBark\t\n"


def names(mids: frozenset[str]) -> set[str]:
    return {ontology.audioset().nodes[mid].name for mid in mids}


def mid_of(name: str) -> str:
    (mid,) = [node.mid for node in ontology.audioset().nodes.values() if node.name == name]
    return mid


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "tree.tsv"
    path.write_text(TREE, encoding="utf-8")
    tree = read_ontology(path)
    assert list(tree.nodes) == ["/a", "/d", "/c", "/g", "/b"]
    assert tree.nodes["/d"] == Node("/d", "Dog", ("/g", "/b"))
    assert tree.descendants("/a") == {"/d", "/c", "/g", "/b"}
    assert tree.descendants("/g") == tree.descendants("/none") == set()
    assert tree.ancestors("/g") == {"/d", "/c", "/a"}  # by two ways
    assert tree.ancestors("/a") == tree.ancestors("/none") == set()


def test_audioset() -> None:
    tree = ontology.audioset()
    assert len(tree.nodes) == 632
    classes = labels.audioset()
    assert classes.mids is not None
    assert [tree.nodes[mid].name for mid in classes.mids] == list(classes.names)
    assert names(tree.ancestors(mid_of("Bark"))) == {"Dog", "Domestic animals, pets", "Animal"}
    assert names(tree.ancestors(mid_of("Bicycle bell"))) == {
        *("Bell", "Musical instrument", "Music", "Sounds of things"),
        *("Bicycle", "Non-motorized land vehicle", "Vehicle", "Alarm"),
    }
    assert names(tree.descendants(mid_of("Rain"))) == {"Raindrop", "Rain on surface"}
    tops = {mid for mid in tree.nodes if not tree.ancestors(mid)}
    assert names(frozenset(tops)) == {
        *("Human sounds", "Animal", "Music", "Natural sounds", "Sounds of things"),
        *("Source-ambiguous sounds", "Channel, environment and background"),
    }
    assert ontology.audioset() is tree


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mid\tname\n/a\tAnimal\n", "no column 'children'"),
        ("mid\tname\tchildren\n/a\tAnimal\t\n/a\tCat\t\n", "row 2: mid '/a' is there twice"),
        ("mid\tname\tchildren\n/a\tAnimal\t/d\n", "row 1: child '/d' is no mid of the table"),
        ("mid\tname\tchildren\n/a\tAnimal\t/d\n/d\tDog\t/a\n", "row 1: 'Animal' is below itself"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tree.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TableError) as caught:
        read_ontology(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
