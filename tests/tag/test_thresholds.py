from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve

from ced.errors import ConfigError, TableError
from ced.sound.labels import ClassTable, numbered
from ced.tag.tagger import Tagger
from ced.tag.thresholds import (
    NEVER,
    calibrate_thresholds,
    fit_thresholds,
    measure,
    read_thresholds,
    write_thresholds,
)

CLASSES = ClassTable(("Dog", "Meow, cat", 'A "quoted" one'), ("/m/d", "/m/c", "/t/q"))
Sample = tuple[NDArray[np.float32], NDArray[np.bool_]]


def columns(*values: list[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32).T


def test_best_f1() -> None:
    probs = columns([0.875, 0.75, 0.5, 0.25], [0.25, 0.25, 0.25, 0.5])
    targets = columns([1, 0, 1, 0], [0, 1, 0, 1]) > 0
    fit = fit_thresholds(probs, targets)
    # First class: F1 is 2/3, 1/2, 4/5, 2/3 for 1 to 4 called. Second: 2/3 for 1, also for all 4; the higher wins.
    assert fit.thresholds.tolist() == [0.375, 0.375]
    assert fit.f1.tolist() == pytest.approx([0.8, 2 / 3])
    assert fit.precision.tolist() == pytest.approx([2 / 3, 1])
    assert fit.recall.tolist() == [1, 0.5]
    assert fit.positives.tolist() == [2, 2]


def test_given_precision() -> None:
    probs = columns([0.75, 0.625, 0.5, 0.375, 0.25], [0.9, 0.8, 0.1, 0.1, 0.1])
    targets = columns([1, 0, 1, 1, 0], [0, 1, 0, 0, 0]) > 0
    fit = fit_thresholds(probs, targets, least_precision=0.75)
    assert fit.thresholds.tolist() == [0.3125, NEVER]  # the second class never reaches more than 1 of 2
    assert fit.precision.tolist() == pytest.approx([0.75, np.nan], nan_ok=True)
    assert fit.recall.tolist() == [1, 0]
    assert fit.f1.tolist() == pytest.approx([6 / 7, 0])
    assert fit_thresholds(probs, targets, least_precision=1.0).thresholds.tolist() == [0.6875, NEVER]
    # Calling the fifth as well keeps a precision of 0.6 but finds nothing more.
    assert fit_thresholds(probs, targets, least_precision=0.6).thresholds.tolist() == [0.3125, NEVER]


def test_a_class_without_positives_gets_what_is_best_for_all() -> None:
    probs = columns([0.9, 0.1], [0.2, 0.3], [0.3, 0.8])
    targets = columns([1, 0], [0, 0], [0, 1]) > 0
    fit = fit_thresholds(probs, targets)
    assert fit.thresholds.tolist() == pytest.approx([0.5, 0.55, 0.55])
    assert fit.f1.tolist() == pytest.approx([1, np.nan, 1], nan_ok=True)
    assert fit.recall.tolist() == pytest.approx([1, np.nan, 1], nan_ok=True)
    assert fit.positives.tolist() == [1, 0, 1]


def test_neighbouring_floats_stay_apart() -> None:
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    probs = np.array([[low], [high]], np.float32)
    fit = fit_thresholds(probs, np.array([[False], [True]]))
    assert (probs >= fit.thresholds)[:, 0].tolist() == [False, True]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Draw scores of which many are equal, and what is there, some of it in any class."""
    count = draw(st.integers(1, 25))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    probs = (generator.integers(0, draw(st.integers(2, 40)), (count, 4)) / 40).astype(np.float32)
    targets = generator.random((count, 4)) < draw(st.floats(0.05, 0.9))
    targets[generator.integers(count)] = True
    return probs, targets


def worth(said: NDArray[np.bool_], target: NDArray[np.bool_], precision: float | None) -> float:
    hits = int((said & target).sum())
    if precision is None:
        return 2 * hits / int(said.sum() + target.sum())
    return hits / int(target.sum()) if hits >= precision * int(said.sum()) else 0.0


@settings(max_examples=150, deadline=None)
@given(samples(), st.sampled_from([None, 0.25, 0.5, 0.75, 1.0]))
def test_no_threshold_does_better(sample: Sample, precision: float | None) -> None:
    probs, targets = sample
    fit = fit_thresholds(probs, targets, least_precision=precision)
    for index in range(4):
        scores, target = probs[:, index], targets[:, index]
        falling = sorted({float(score) for score in scores}, reverse=True)
        worths = [worth(scores >= threshold, target, precision) for threshold in falling]
        if max(worths) == 0:
            assert fit.thresholds[index] == NEVER
        else:
            best = falling[worths.index(max(worths))]
            assert ((scores >= fit.thresholds[index]) == (scores >= best)).all()
            assert fit.thresholds[index] <= best


@settings(max_examples=50, deadline=None)
@given(samples())
def test_it_agrees_with_scikit_learn(sample: Sample) -> None:
    probs, targets = sample
    best, precise = fit_thresholds(probs, targets), fit_thresholds(probs, targets, least_precision=0.6)
    for index in range(4):
        precision, recall, _ = precision_recall_curve(targets[:, index], probs[:, index])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        assert best.f1[index] == pytest.approx(f1.max())
        assert precise.recall[index] == pytest.approx(recall[precision >= 0.6].max())


def test_invalid_scores_and_labels_are_refused() -> None:
    probs, targets = columns([0.5, 0.25]), columns([1, 0]) > 0
    for precision in (0, 1.5, np.nan):
        with pytest.raises(ConfigError, match="it must be above 0 and at most 1"):
            fit_thresholds(probs, targets, least_precision=precision)
    with pytest.raises(TableError, match="none of 2 clips has a label"):
        fit_thresholds(probs, targets & False)
    with pytest.raises(TableError, match="not numbers"):
        fit_thresholds(probs * np.float32(np.nan), targets)


def test_written_thresholds_come_back(tmp_path: Path) -> None:
    probs = np.random.default_rng(0).random((20, 3), np.float32)
    targets = probs > 0.7
    targets[:, 2] = False
    fit = measure(probs, targets, np.array([1 / 3, NEVER, 1e-7], np.float32))
    path = tmp_path / "thresholds.tsv"
    write_thresholds(path, fit, CLASSES)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == [
        "# ced thresholds, format 1; inf: never",
        "index\tmid\tname\tthreshold\tprecision\trecall\tf1\tpositives",
    ]
    assert lines[2].startswith("0\t/m/d\tDog\t0.33333334\t0.")
    assert lines[3] == "1\t/m/c\tMeow, cat\tinf\t\t0.0000\t0.0000\t5"
    assert lines[4] == '2\t/t/q\t"A ""quoted"" one"\t1e-07\t0.0000\t\t\t0'
    assert read_thresholds(path, CLASSES) == tuple(fit.thresholds.tolist())
    write_thresholds(path, fit, numbered(3))
    assert path.read_text(encoding="utf-8").splitlines()[1].startswith("index\tname\tthreshold")
    assert read_thresholds(path, numbered(3)) == tuple(fit.thresholds.tolist())


def test_files_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text("name\tthreshold\n# loud\nMeow, cat\t0.25\n", encoding="utf-8")
    assert read_thresholds(path, CLASSES) == (0.5, 0.25, 0.5)
    assert read_thresholds(path, CLASSES, default=NEVER) == (NEVER, 0.25, NEVER)
    path.write_text("mid\tthreshold\n/t/q\tinf\n/m/d\t0\n", encoding="utf-8")
    assert read_thresholds(path, CLASSES) == (0, 0.5, NEVER)
    path.write_text("threshold\tindex\n0.75\t2\n", encoding="utf-8")
    assert read_thresholds(path, CLASSES) == (0.5, 0.5, 0.75)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("index\tname\n0\tDog\n", "has no column 'threshold'"),
        ("value\tthreshold\n1\t0.5\n", "have columns value, threshold; one of index, mid, name is needed"),
        ("index\tthreshold\n0\t0.5\n3\t0.5\n", "row 2: index '3' is not one of the model's 3 classes (Dog, ... A"),
        ("name\tthreshold\nDogs\t0.5\n", "row 1: name 'Dogs' is not one of"),
        ("index\tname\tthreshold\n1\tDog\t0.5\n", "row 1: index 1, name Dog are different classes"),
        ("name\tthreshold\nDog\t0.5\nDog\t0.6\n", "row 2: class 'Dog' is listed twice"),
        ("name\tthreshold\nDog\thigh\n", "row 1: threshold 'high' is not a number"),
        ("name\tthreshold\nDog\t-1\n", "row 1: threshold '-1' is not a number"),
        ("name\tthreshold\nDog\tnan\n", "row 1: threshold 'nan' is not a number"),
        ("# ced thresholds, format 2\nname\tthreshold\nDog\t1\n", "have format 2; this program reads format 1"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "thresholds.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TableError) as caught:
        read_thresholds(path, CLASSES)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"cannot read thresholds .*No such file"):
        read_thresholds(tmp_path / "none.tsv", CLASSES)


class Loudness:
    """Scores a wave by how loud it is; the third class never scores."""

    labels = ClassTable(("loud", "quiet", "none"))

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        loud = np.abs(waves).max(axis=1)
        return np.stack([loud, 0.5 - loud / 2, np.zeros_like(loud)], axis=1)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write clips of 3 s, the first of which is loud in its last second alone."""
    for name, levels in {"a": (0.0, 0.0, 0.5), "b": (0.25, 0.25, 0.25), "c": (0.0, 0.125, 0.0)}.items():
        wave = np.repeat(np.array(levels, np.float32), 16_000)
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000, subtype="FLOAT")
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    path = tmp_path / "clips.tsv"
    path.write_text("filename\tlabels\na.wav\t0\nb.wav\t0\nbad.wav\t1\nc.wav\t1\n", encoding="utf-8")
    return path


def test_thresholds_are_fitted_to_the_highest_of_a_clips_windows(table: Path, tmp_path: Path) -> None:
    told: list[int] = []
    out = tmp_path / "new" / "thresholds.tsv"
    tagger = Tagger(Loudness())

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        told.append(done)

    found = calibrate_thresholds(tagger, table, out, window=1.0, jobs=2, progress=progress)
    # The clips' scores are 0.5, 0.25, 0.125 for loud, and 0.5, 0.375, 0.5 for quiet, which is right of the last only.
    thresholds = read_thresholds(out, tagger.labels)
    assert list(thresholds) == pytest.approx([0.1875, 0.4375, thresholds[2]])
    assert (found.clips, found.classes, found.unseen, found.never) == (3, 2, ("none",), ())
    assert found.f1_before == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found.f1_after == pytest.approx((1 + 2 / 3) / 2)
    assert len(found.unreadable) == 1
    assert "bad.wav" in found.unreadable[0]
    assert told == [1, 2, 3, 4]
    assert out.read_text(encoding="utf-8").splitlines()[2] == "0\tloud\t0.1875\t1.0000\t1.0000\t1.0000\t2"


def test_calibration_with_a_precision(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "thresholds.tsv"
    found = calibrate_thresholds(Tagger(Loudness()), table, out, least_precision=0.9, window=1.0)
    assert found.never == ("quiet", "none")  # all classes together reach it as little
    assert read_thresholds(out, Loudness.labels)[:2] == (0.1875, NEVER)


def test_calibration_that_is_refused(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "thresholds.tsv"
    tagger = Tagger(Loudness())
    with pytest.raises(ConfigError, match="least_precision is 2"):
        calibrate_thresholds(tagger, table, out, least_precision=2)
    table.write_text("filename\tlabels\nbad.wav\t1\n", encoding="utf-8")
    with pytest.raises(TableError, match=r"none of 1 clips of .* can be read; the first: .*bad\.wav"):
        calibrate_thresholds(tagger, table, out)
    table.write_text("filename\tlabels\na.wav\t\n", encoding="utf-8")
    with pytest.raises(TableError, match="none of 1 clips has a label"):
        calibrate_thresholds(tagger, table, out)
    assert not out.exists()
