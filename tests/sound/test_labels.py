import json
from pathlib import Path

import pytest

from ced.errors import TableError
from ced.sound.labels import (
    ClassTable,
    Node,
    audioset,
    audioset_ontology,
    default_classes,
    matched,
    named,
    named_by_config,
    numbered,
    read_classes,
    read_ontology,
)

HUB_CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"


def test_audioset() -> None:
    classes = audioset()
    assert len(classes) == 527
    assert classes.names[:2] == ("Speech", "Male speech, man speaking")
    assert classes.names[137] == "Music"
    assert classes.names[526] == "Field recording"
    assert classes.mids is not None
    assert (classes.mids[0], classes.mids[137], classes.mids[526]) == ("/m/09x0r", "/m/04rlf", "/m/07hvw1")
    assert audioset() is classes


def test_numbered() -> None:
    assert numbered(3) == ClassTable(("class 0", "class 1", "class 2"))
    assert default_classes(3) == numbered(3)
    assert default_classes(527) == audioset()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.tsv", "# mine\nindex\tmid\tname\n0\t/m/1\tdog, small\n\n1\t/m/2\tcat\n"),
        ("classes.txt", "index\tname\tmid\r\n0\tdog, small\t/m/1\r\n1\tcat\t/m/2\r\n"),
        ("class_labels_indices.csv", 'index,mid,display_name\n0,/m/1,"dog, small"\n1,/m/2,"cat"\n'),
        ("bom.CSV", '\ufeffindex,mid,display_name\n0,/m/1,"dog, small"\n1,/m/2,cat\n'),
    ],
)
def test_read(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    assert read_classes(path) == ClassTable(("dog, small", "cat"), ("/m/1", "/m/2"))


def test_read_without_mids(tmp_path: Path) -> None:
    path = tmp_path / "classes.tsv"
    path.write_text("index\tname\n0\tHund\n1\tKätzchen\n", encoding="utf-8")
    assert read_classes(path) == ClassTable(("Hund", "Kätzchen"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has columns []; it needs index and name"),
        ("index\tname\n", "it needs index and name"),
        ("index\tname\n0\n", "row 1 has more or fewer fields"),
        ("index\tname\n0\tdog\tbark\n", "row 1 has more or fewer fields"),
        ("number\tname\n0\tdog\n", "has columns ['number', 'name']"),
        ("index\tmid\n0\t/m/1\n", "has columns ['index', 'mid']"),
        ("index\tname\n1\tdog\n", "row 1 has index '1'; expected 0"),
        ("index\tname\n0\tdog\n2\tcat\n", "row 2 has index '2'; expected 1"),
        ("index\tname\n0\tdog\n1\tdog\n", "class name 'dog' occurs more than once"),
        ("index\tname\tmid\n0\tdog\t/m/1\n1\tcat\t/m/1\n", "class mid '/m/1' occurs more than once"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "classes.tsv"
    path.write_text(text)
    with pytest.raises(TableError) as caught:
        read_classes(path)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_files_that_are_not_tables(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "classes.tsv"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\x00index")
    with pytest.raises(TableError, match=r"cannot read class table .*classes\.tsv"):
        read_classes(path)


class TestNamedByConfig:
    @pytest.mark.parametrize("size", ["tiny", "mini", "small", "base"])
    def test_cut_names_of_the_published_models_are_restored(self, size: str) -> None:
        settings = json.loads((HUB_CONFIGS / f"{size}.json").read_text(encoding="utf-8"))
        cut = settings["id2label"]
        assert sum(cut[str(index)] != name for index, name in enumerate(audioset().names)) == 75
        assert len(settings["label2id"]) == 524  # classes of one name overwrote each other
        assert named_by_config(settings) is audioset()
        assert named(cut[str(index)] for index in range(527)) is audioset()

    def test_full_names_are_audiosets(self) -> None:
        assert named_by_config({"id2label": {str(i): name for i, name in enumerate(audioset().names)}}) is audioset()
        assert named_by_config({"id2label": dict(enumerate(audioset().names))}) is audioset()

    def test_one_different_name_is_another_table(self) -> None:
        cut = [name.partition(",")[0] for name in audioset().names]
        assert named_by_config({"id2label": dict(enumerate([*cut[:-1], "Other"]))}) is None  # "Inside" is ambiguous
        with pytest.raises(TableError, match="'Inside'"):
            named([*cut[:-1], "Other"])
        assert named_by_config({"id2label": dict(enumerate(cut[:100]))}) == ClassTable(tuple(cut[:100]))

    @pytest.mark.parametrize(
        "settings", [None, [], {}, {"id2label": {}}, {"id2label": ["a"]}, {"id2label": {"1": "a"}}]
    )
    def test_no_table(self, settings: object) -> None:
        assert named_by_config(settings) is None


def test_duplicate_class_names_are_refused() -> None:
    with pytest.raises(TableError, match="at least one class"):
        ClassTable(())
    with pytest.raises(TableError, match="2 names but 1 mids"):
        ClassTable(("dog", "cat"), ("/m/1",))


TREE = "# mine\nmid\tname\tchildren\n/a\tAnimal\t/d,/c\n/d\tDog\t/g,/b\n/c\tCat\t/g\n/g\tGrowl\t\n/b\tBark\t\n"


def names(mids: frozenset[str]) -> set[str]:
    return {audioset_ontology().nodes[mid].name for mid in mids}


def mid_of(name: str) -> str:
    (mid,) = [node.mid for node in audioset_ontology().nodes.values() if node.name == name]
    return mid


def test_read_an_ontology(tmp_path: Path) -> None:
    path = tmp_path / "tree.tsv"
    path.write_text(TREE, encoding="utf-8")
    tree = read_ontology(path)
    assert list(tree.nodes) == ["/a", "/d", "/c", "/g", "/b"]
    assert tree.nodes["/d"] == Node("/d", "Dog", ("/g", "/b"))
    assert tree.descendants("/a") == {"/d", "/c", "/g", "/b"}
    assert tree.descendants("/g") == tree.descendants("/none") == set()
    assert tree.ancestors("/g") == {"/d", "/c", "/a"}  # by two ways
    assert tree.ancestors("/a") == tree.ancestors("/none") == set()


def test_audioset_ontology() -> None:
    tree = audioset_ontology()
    assert len(tree.nodes) == 632
    classes = audioset()
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
    assert audioset_ontology() is tree


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mid\tname\n/a\tAnimal\n", "no column 'children'"),
        ("mid\tname\tchildren\n/a\tAnimal\t\n/a\tCat\t\n", "row 2: mid '/a' occurs twice"),
        ("mid\tname\tchildren\n/a\tAnimal\t/d\n", "row 1: child '/d' is not a mid"),
        ("mid\tname\tchildren\n/a\tAnimal\t/d\n/d\tDog\t/a\n", "row 1: 'Animal' is its own descendant"),
    ],
)
def test_invalid_ontologies(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tree.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TableError) as caught:
        read_ontology(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


NOT_IN_YAMNET = [
    "Male speech, man speaking",
    "Female speech, woman speaking",
    "Battle cry",
    "Male singing",
    "Female singing",
    "Funny music",
]


@pytest.mark.parametrize("known_by", ["mids", "names"])
def test_the_classes_of_yamnet_match_all_but_six_of_audioset(known_by: str) -> None:
    # YAMNet has AudioSet's classes and their order, without the six that its authors left out.
    classes = audioset()
    kept = [index for index, name in enumerate(classes.names) if name not in NOT_IN_YAMNET]
    assert len(kept) == 521
    assert classes.mids is not None
    names, mids = tuple(classes.names[index] for index in kept), tuple(classes.mids[index] for index in kept)
    table = ClassTable(tuple(f"class {index}" for index in kept), mids) if known_by == "mids" else ClassTable(names)
    columns = matched(table, classes)
    assert [name for name, column in zip(classes.names, columns, strict=True) if column < 0] == NOT_IN_YAMNET
    assert [kept[column] for column in columns if column >= 0] == kept
    assert matched(classes, table) == kept


def test_underscores_separate_words() -> None:
    table = ClassTable(("Acoustic_guitar", "Gunshot_or_gunfire"))
    assert matched(table, ClassTable(("gunshot or gunfire", "Acoustic guitar"))) == [1, 0]


def test_names_match_by_their_words_and_up_to_the_first_comma() -> None:
    target = ClassTable(
        ("Dog", "Vehicle horn, car horn, honking", "Inside, small room", "Inside, public space", "Rain")
    )
    assert matched(ClassTable(("rain", "vehicle-horn", "Inside", "DOG", "Cat")), target) == [3, 1, -1, -1, 0]


def test_one_class_matches_one_class() -> None:
    assert matched(ClassTable(("Bark, dog", "bark")), ClassTable(("Bark", "Bark, dog"))) == [1, 0]
    assert matched(ClassTable(("Bark, dog",)), ClassTable(("Bark", "Bark, dog"))) == [-1, 0]
    assert matched(ClassTable(("a b", "a-b")), ClassTable(("A B", "c"))) == [-1, -1]  # ambiguous
