from dataclasses import fields, replace
from typing import Any, get_type_hints

import numpy as np
import pytest

from ced.errors import ConfigError
from ced.sound.labels import ClassTable
from ced.tag.options import TagKeywords, TagOptions

CLASSES = ClassTable(("bark", "bell", "rain"))


def test_keywords_are_the_fields() -> None:
    hints = get_type_hints(TagOptions)
    assert get_type_hints(TagKeywords) == {field.name: hints[field.name] for field in fields(TagOptions)}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"window": 0.0}, "window is 0.0 s"),
        ({"window": "10"}, "window is '10'; it must be a number"),
        ({"top_k": "3"}, "top_k is '3'; it must be a whole number"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"events": "yes"}, "events is 'yes'; it must be True or False"),
        ({"threshold": "0.5"}, "threshold is '0.5'; it must be a number"),
        ({"threshold": ("a", "b", "c")}, "a number"),
        ({"window": float("nan")}, "window is nan"),
        ({"window": float("inf")}, "window is inf"),
        ({"hop": -1.0}, "hop is -1.0 s"),
        ({"hop": 20.0}, "hop is 20.0 s, window 10.0 s"),
        ({"columns": True, "hop": 1.0}, "twice"),
        ({"silence": 3.0}, "silence is 3.0"),
        ({"channel": "middle"}, "'middle'; it must be mean, left, right"),
        ({"channel": 0}, "channel is 0; it must"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1, "events": True}, "top_k 1 does not apply to events"),
        ({"threshold": -0.5}, "a threshold is -0.5"),
        ({"threshold": (0.5, float("nan"), 0.5)}, "a threshold is nan"),
        ({"events": True, "release": 0.0}, "release is 0.0"),
        ({"events": True, "gap": -1.0}, "gap is -1.0"),
        ({"events": True, "shortest": float("nan")}, "shortest is nan"),
        ({"gap": 1.0}, "options of events"),
        ({"labels": "bark"}, r"a list of labels, as \['bark'\]"),
    ],
)
def test_invalid_options_are_refused_on_creation(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        TagOptions(**changes)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"labels": ["barc"]}, "did you mean 'bark'"),
        ({"exclude": ["bark", "bell", "rain"]}, "no label remains"),
        ({"threshold": (0.5, 0.5)}, "3 classes"),
        ({"rollup": True}, "mids"),
    ],
)
def test_options_that_do_not_fit_the_classes_are_refused_by_a_check(changes: dict[str, Any], part: str) -> None:
    options = TagOptions(**changes)
    with pytest.raises(ConfigError, match=part):
        options.check(CLASSES)


def test_defaults_that_depend_on_other_options() -> None:
    def resolved(**changes: Any) -> tuple[Any, ...]:
        settings = TagOptions(**changes).settings()
        return settings["hop"], settings["top_k"], settings["thresholds"]

    assert resolved() == (10.0, 3, None)
    assert resolved(window=2.0, top_k=5) == (2.0, 5, None)
    assert resolved(hop=5.0, threshold=0.25) == (5.0, None, 0.25)
    assert resolved(threshold=0.25, top_k=2) == (10.0, 2, 0.25)
    assert resolved(events=True) == (10.0, None, 0.5)


def test_lists_and_arrays_are_kept_as_tuples() -> None:
    options = TagOptions(labels=["bark"], threshold=np.array([0.5, 0.25, 1.0], np.float32))  # type: ignore[arg-type]
    assert (options.labels, options.threshold) == (("bark",), (0.5, 0.25, 1.0))
    assert options == TagOptions(labels=("bark",), threshold=(0.5, 0.25, 1.0))
    assert options.selection(CLASSES) is options.selection(CLASSES)


def test_numbers_of_numpy_are_numbers() -> None:
    options = TagOptions(threshold=np.float32(0.5), window=np.float64(2.0), top_k=np.int64(2))  # type: ignore[arg-type]
    assert options.threshold == 0.5
    assert TagOptions(threshold=[0.5, 0.25, 1.0]).threshold == (0.5, 0.25, 1.0)  # type: ignore[arg-type]


def test_deprecated_names_of_options_are_accepted() -> None:
    with pytest.warns(DeprecationWarning, match="thresholds is deprecated; use threshold"):
        assert TagOptions(thresholds=0.25) == TagOptions(threshold=0.25)
    with pytest.warns(DeprecationWarning, match="only is deprecated; use labels"):
        assert replace(TagOptions(labels=("rain",), hop=1.0), only=["bark"]) == TagOptions(labels=("bark",), hop=1.0)
    assert replace(TagOptions(threshold=0.25), hop=1.0) == TagOptions(threshold=0.25, hop=1.0)


def test_journals_keep_the_names_that_they_had() -> None:
    """So that runs of earlier versions can be resumed."""
    settings = TagOptions(threshold=0.25, labels=("bark",)).settings()
    assert (settings["thresholds"], settings["only"]) == (0.25, ("bark",))
    assert settings.keys() == {field.name for field in fields(TagOptions)} - {"threshold", "labels"} | {
        "thresholds",
        "only",
    }
