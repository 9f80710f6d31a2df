import time

import numpy as np
import pytest
from numpy.typing import NDArray

from ced.errors import ConfigError
from ced.sound.labels import ClassTable, audioset, audioset_ontology, numbered
from ced.tag.records import Scored, Tag, Tags
from ced.tag.select import Selection

ABC = ClassTable(("a", "b", "c", "d"))
PETS = ClassTable(("Bark", "Purr", "Dog", "Speech"), ("/m/05tny_", "/m/02yds9", "/m/0bt9lr", "/m/09x0r"))


def scores(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def names(selection: Selection, probs: NDArray[np.float32]) -> list[str]:
    return [tag.label for tag in selection.tags(Scored(0.0, 1.0, probs)).tags]


def test_the_most_probable_come_first_and_equal_ones_by_index() -> None:
    found = Selection(ABC, top_k=3).tags(Scored(1.5, 2.5, scores(0.25, 0.5, 0.125, 0.5)))
    assert found == Tags(1.5, 2.5, (Tag("b", 1, None, 0.5), Tag("d", 3, None, 0.5), Tag("a", 0, None, 0.25)))
    assert names(Selection(numbered(50), top_k=5), np.zeros(50, np.float32)) == [f"class {i}" for i in range(5)]
    assert names(Selection(ABC, top_k=None), scores(0.1, 0.4, 0.2, 0.3)) == ["b", "d", "c", "a"]


def test_thresholds() -> None:
    probs = scores(0.5, 0.3, 0.9, 0.1)
    assert names(Selection(ABC, thresholds=0.5), probs) == ["c", "a"]  # at the threshold is enough
    assert names(Selection(ABC, thresholds=0.5, top_k=1), probs) == ["c"]
    assert names(Selection(ABC, thresholds=(0.6, 0.2, np.inf, 0.0)), probs) == ["b", "d"]
    assert names(Selection(ABC, thresholds=0.95), probs) == []
    selection = Selection(ABC, thresholds=(0.6, 0.2, 2.0, 0.0), exclude=["d"])
    assert selection.reached(probs).tolist() == [False, True, False, False]
    assert selection.reached(probs, 0.5).tolist() == [True, True, False, False]
    assert selection.thresholds is not None
    assert selection.thresholds.tolist() == pytest.approx([0.6, 0.2, 2.0, 0.0])


def test_labels_are_chosen_by_name_or_mid_ignoring_case() -> None:
    probs = scores(0.4, 0.3, 0.2, 0.1)
    assert names(Selection(PETS, only=["dog", "/m/02yds9"]), probs) == ["Purr", "Dog"]
    assert names(Selection(PETS, exclude=["BARK", "Speech"], top_k=None), probs) == ["Purr", "Dog"]
    assert names(Selection(PETS, only=["Dog", "Purr"], exclude=["Dog"]), probs) == ["Purr"]
    assert Selection(PETS, only=["Dog"]).reached(probs).tolist() == [False, False, True, False]


def test_a_heading_stands_for_its_descendants() -> None:
    probs = scores(0.4, 0.3, 0.2, 0.1)
    assert names(Selection(PETS, only=["animal"]), probs) == ["Bark", "Purr", "Dog"]
    assert names(Selection(PETS, exclude=["/m/0jbk"], top_k=None), probs) == ["Speech"]
    assert names(Selection(PETS, only=["Dog"]), probs) == ["Dog"]  # a class stands for itself
    full = Selection(audioset(), only=["Human sounds"], top_k=None)
    kept = names(full, np.linspace(0, 1, 527, dtype=np.float32))
    assert {"Speech", "Snoring", "Clapping"} < set(kept)
    assert not {"Music", "Dog", "Human sounds"} & set(kept)


def test_roll_up() -> None:
    selection = Selection(PETS, top_k=None, rollup=True)
    mids = {node.name: node.mid for node in audioset_ontology().nodes.values()}
    added = ["Human sounds", "Human voice", "Animal", "Domestic animals, pets", "Cat"]
    assert list(selection.labels.names) == [*PETS.names, *added]
    assert selection.labels.mids is not None
    assert list(selection.labels.mids[4:]) == [mids[name] for name in added]
    rolled = selection.probs(scores(0.25, 0.5, 0.125, 0.75))
    assert rolled.tolist() == [0.25, 0.5, 0.25, 0.75, 0.75, 0.75, 0.5, 0.5, 0.5]
    tags = selection.tags(Scored(0, 1, scores(0.25, 0.5, 0.125, 0.75))).tags
    assert tags[:2] == (Tag("Speech", 3, "/m/09x0r", 0.75), Tag("Human sounds", None, mids["Human sounds"], 0.75))
    assert [tag.label for tag in tags[3:]] == ["Purr", "Animal", "Domestic animals, pets", "Cat", "Bark", "Dog"]


def test_roll_up_with_thresholds_and_labels() -> None:
    probs = scores(0.25, 0.5, 0.125, 0.75)
    thresholds = (0.2, 0.6, 0.3, 0.8)  # Bark reaches its own, so Dog and its parents do, but not Cat
    selection = Selection(PETS, thresholds=thresholds, rollup=True, top_k=None)
    assert names(selection, probs) == ["Animal", "Domestic animals, pets", "Bark", "Dog"]
    kept = Selection(PETS, thresholds=thresholds, rollup=True, only=["Dog"])
    assert names(kept, probs) == ["Dog"]  # for Bark, which is left out itself
    heading = Selection(PETS, rollup=True, only=["Animal"], top_k=None)
    assert names(heading, probs) == ["Purr", "Animal", "Domestic animals, pets", "Cat", "Bark", "Dog"]


def test_roll_up_of_audioset_is_the_maximum_over_the_audioset_ontology() -> None:
    classes = audioset()
    selection = Selection(classes, rollup=True)
    probs = np.random.default_rng(0).random(527, np.float32)
    rolled = selection.probs(probs)
    assert selection.labels.mids is not None
    assert classes.mids is not None
    index_of = {mid: index for index, mid in enumerate(classes.mids)}
    for index, mid in enumerate(selection.labels.mids):
        below = {mid, *audioset_ontology().descendants(mid)} & index_of.keys()
        assert rolled[index] == max(probs[index_of[kind]] for kind in below)
    assert len(selection.labels) == 527 + 30


def test_it_is_fast_enough_for_every_patch_column() -> None:
    selection = Selection(audioset(), thresholds=0.3, rollup=True)
    scored = Scored(0, 1, np.random.default_rng(0).random(527, np.float32))
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        selection.tags(scored)
        times.append(time.perf_counter() - begin)
    assert min(times) < 2e-3  # 0.1 ms is usual; this is a bound on going over classes one by one


def refused(labels: ClassTable, **arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        Selection(labels, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_invalid_selections_are_refused() -> None:
    assert "top_k is 0; it must be at least 1" in refused(ABC, top_k=0)
    assert "a threshold is -0.5; it must be 0 or more" in refused(ABC, thresholds=-0.5)
    assert "a threshold is nan" in refused(ABC, thresholds=scores(0, np.nan, 1, 1))
    assert "have shape (3,); allowed: one number" in refused(ABC, thresholds=scores(0, 1, 1))
    assert "no label 'Barc'; did you mean 'Bark'?" in refused(PETS, only=["Barc"])
    assert "no label 'speaking'; did you mean 'Male speech, man speaking'?" in refused(audioset(), only=["speaking"])
    assert "no label 'animals'; did you mean 'Domestic animals, pets'?" in refused(PETS, exclude=["animals"])
    assert refused(ABC, only=["Rain"]) == "there is no label 'Rain'; the labels are a, b, c, d"
    assert "'xyzzy'; the 527 labels range from Speech to Field recording" in refused(audioset(), only=["xyzzy"])
    assert "no label 'Animal'" in refused(ABC, only=["Animal"])
    assert "no label remains of a, b without b, a" in refused(ABC, only=["a", "b"], exclude=["b", "a"])
    assert "no label remains of all without a, b, c, d" in refused(ABC, exclude=["a", "b", "c", "d"])
    assert "roll-up needs classes with AudioSet's mids" in refused(ABC, rollup=True)
